"""A headless chromium that is told what to do by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
Seen = tuple[Any, list[str], bytes]
"""(what a script returned, what the console complained of, a picture as PNG)"""


async def visit(address: str, script: str, folder: Path, *, width: int, dark: bool = False) -> Seen:
    """What is seen where the script is run on the page at `address`."""
    profile = f"--user-data-dir={folder / 'profile'}"
    words = [str(CHROMIUM), *FLAGS, "--remote-debugging-port=0", profile, "about:blank"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = await _port(folder / "profile" / "DevToolsActivePort")
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as found:
                targets = await found.json(content_type=None)
            page = next(target for target in targets if target["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                return await _drive(_Page(socket), address, script, width, dark)
    finally:
        process.terminate()
        process.wait(20)


async def _drive(page: _Page, address: str, script: str, width: int, dark: bool) -> Seen:
    for domain in ("Page", "Runtime", "Log"):
        await page.call(f"{domain}.enable")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    await page.call("Emulation.setDeviceMetricsOverride", **size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    await page.call("Emulation.setEmulatedMedia", features=[scheme])
    await page.call("Page.navigate", url=address)
    while (await page.evaluate("document.readyState + document.title")) != "completelora serve":
        await asyncio.sleep(0.05)
    result = await page.evaluate(f"(async () => {{ {script} }})()")
    picture = await page.call("Page.captureScreenshot", format="png")
    return result, page.complaints, base64.b64decode(picture["data"])


class _Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.complaints: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            told = json.loads((await self._socket.receive(60)).data)
            if told.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.complaints.append(json.dumps(told["params"]))
            if told.get("id") == self._number:
                assert "error" not in told, told
                return dict(told["result"])

    async def evaluate(self, script: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")


async def _port(file: Path) -> int:
    end = time.monotonic() + 30
    while not file.exists() or not file.read_text().strip():
        assert time.monotonic() < end, "chromium did not start"
        await asyncio.sleep(0.05)
    return int(file.read_text().split()[0])
