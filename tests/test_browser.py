"""Pages in a real browser: they render, nothing is complained of, nothing is asked for. Needs Debian's chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from commands.conftest import FILMS, TINY, write_films

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--enable-logging=stderr",
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, forked) -> dict[str, Path]:
    """The pages of a run and of a sweep over two keys."""
    home = tmp_path_factory.mktemp("pages")
    write_films(home)
    short = ("train", *TINY, *FILMS, "train.max_steps=12", "train.eval_every=3", "train.log_every=2")
    done = forked(*short, "-m", "lora.r=2,4", "lora=lora,dora", "hydra.sweep.dir=sweep", cwd=home)
    assert done.returncode == 0, done.stderr
    done = forked("report", "run=sweep/0", cwd=home)
    assert done.returncode == 0, done.stderr
    return {"run": home / "sweep" / "0" / "report.html", "sweep": home / "sweep" / "report.html"}


def browse(page: Path, *flags: str, address: str | None = None) -> subprocess.CompletedProcess[str]:
    profile = f"--user-data-dir={page.parent / 'profile'}"
    words = [str(CHROMIUM), *FLAGS, profile, *flags, address or page.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_page_renders_without_a_complaint(name: str, pages) -> None:
    shown = browse(pages[name], "--dump-dom")
    assert not re.findall(r"CONSOLE.*", shown.stderr)
    assert "<h2>" in shown.stdout
    assert "<polyline" in shown.stdout


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_page_asks_for_nothing_but_itself(name: str, pages) -> None:
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(pages[name].parent)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        browse(pages[name], "--dump-dom", address=f"http://127.0.0.1:{server.server_port}/report.html")
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/report.html"]
    addresses = re.findall(r'(?:src|href|action)="?([^" >]*)', pages[name].read_text())
    assert set(addresses) == {"data:,"}, "nor of any other host"


def measured(page: Path, width: int, number: str, folder: Path) -> int:
    """A number that a script finds in `d`, the page's document in a window of this width."""
    probe = folder / "probe.html"
    script = f"const d = f.contentDocument; document.title = {number}"
    frame = f'<iframe id=f src="{page.as_uri()}" width={width} height=900 onload="{script}"></iframe>'
    probe.write_text(f"<!doctype html><title>none</title>{frame}")
    shown = browse(probe, "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=5000")
    (title,) = re.findall(r"<title>(.*?)</title>", shown.stdout)
    return int(title)


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_page_fits_a_phone_and_a_desk(name: str, width: int, pages, tmp_path: Path) -> None:
    """No part is wider than the window, but for tables and plots, which scroll in a box of their own."""
    widest = "Math.max(0, ...[...d.body.children].map(e => e.scrollWidth))"
    assert 0 < measured(pages[name], width, widest, tmp_path) <= width


def test_no_table_is_cut_at_a_desk(pages, tmp_path: Path) -> None:
    hidden = "Math.max(...[...d.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth))"
    assert measured(pages["sweep"], 1280, hidden, tmp_path) == 0


def test_letters_of_a_plot_stay_readable_on_a_phone(pages, tmp_path: Path) -> None:
    height = "Math.round(Math.min(...[...d.querySelectorAll('.tick')].map(e => e.getBoundingClientRect().height)))"
    assert measured(pages["sweep"], 360, height, tmp_path) >= 10


def test_what_a_configuration_is_called_stays_in_sight_where_its_figures_scroll(pages, tmp_path: Path) -> None:
    left = "d.querySelector('.named td').getBoundingClientRect().left"
    moved = f"(d.querySelector('.scroll').scrollLeft = 200, Math.round({left}))"
    assert measured(pages["sweep"], 360, moved, tmp_path) == measured(
        pages["sweep"], 360, f"Math.round({left})", tmp_path
    )
