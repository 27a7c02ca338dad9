"""A terminal session as a picture: python docs/record.py FILE.svg "lora train ..." "lora infer ...".

Runs each command in a pseudo-terminal of its own, in one scratch folder, and draws what a person saw at the end.
Folders that the commands read are lent to the scratch folder by --lend FOLDER, under their last name.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 116
_CONTROL = re.compile(r"\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r\n|\r|\n")
_FONT_FACES = re.compile(r"@font-face \{\{.*?\}\}", re.DOTALL)
"""They name a font on another host; a picture in a repository must not dial out."""
_INDENTED = re.compile(r'x="([\d.]+)"( y="[\d.]+" textLength=)"([\d.]+)"([^>]*)>((?:&#160;)+)')
"""Text that begins with blanks: some viewers drop them, and draw the text too far to the left."""
_CHARACTER = 12.2
"""Width of one in rich's pictures."""


def record(command: str, folder: Path) -> str:
    """What `command` writes to a terminal of `COLUMNS` columns, standard error included.

    Raises:
        RuntimeError: it fails.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": str(COLUMNS), "LINES": "60", "TERM": "xterm-256color"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, shell=True, cwd=folder, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = bytearray()
    try:
        while block := os.read(ours, 1 << 16):
            written += block
    except OSError:
        pass  # How Linux says that the other end is closed.
    finally:
        os.close(ours)
    if process.wait():
        raise RuntimeError(f"{command}: exit code {process.returncode}\n{written.decode(errors='replace')}")
    return written.decode()


def final_lines(written: str) -> list[str]:
    """The lines on the screen at the end: a live bar is drawn over itself, and only its last state counts."""
    lines, row, position = [""], 0, 0
    for match in [*_CONTROL.finditer(written), None]:
        lines[row] += written[position : match.start() if match else len(written)]
        if match is None:
            break
        position, control = match.end(), match.group()
        if control == "\x1b[2K":
            lines[row] = ""
        elif control == "\x1b[1A":
            row = max(0, row - 1)
        elif control.endswith("\n"):
            row += 1
            lines += [""] * (row - len(lines) + 1)
    while lines and not Text.from_ansi(lines[-1]).plain.strip():
        lines.pop()
    return lines


def draw(sessions: list[tuple[str, list[str]]]) -> str:
    """An SVG of commands and the lines each left on the screen."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    for number, (command, lines) in enumerate(sessions):
        console.print(Text.assemble("" if number == 0 else "\n", ("$ ", "bold green"), (command, "bold")))
        for line in lines:
            console.print(Text.from_ansi(line), soft_wrap=False)
    code_format = _FONT_FACES.sub("", CONSOLE_SVG_FORMAT).replace("Fira Code", "DejaVu Sans Mono, Menlo, Consolas")
    svg = console.export_svg(title="lora", theme=MONOKAI, code_format=code_format)
    return "".join(_INDENTED.sub(_moved, line).rstrip() + "\n" for line in svg.splitlines())


def _moved(text: re.Match[str]) -> str:
    """The same text begun where its first blanks end."""
    indent = _CHARACTER * text[5].count(";")
    return f'x="{float(text[1]) + indent:.1f}"{text[2]}"{max(0.0, float(text[3]) - indent):.1f}"{text[4]}>'


def main(target: Path, commands: list[str], lent: list[Path]) -> None:
    """Run `commands`, with the folders `lent` to them, and draw them to `target`."""
    with tempfile.TemporaryDirectory() as folder:
        for path in lent:
            (Path(folder) / path.name).symlink_to(path.resolve())
        sessions = [(command, final_lines(record(command, Path(folder)))) for command in commands]
    target.write_text(draw(sessions), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("commands", nargs="+")
    parser.add_argument("--lend", type=Path, action="append", default=[])
    words = parser.parse_args()
    main(words.target, words.commands, words.lend)
