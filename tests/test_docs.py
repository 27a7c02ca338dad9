"""README and docs tell the truth: every command in a console block runs, every link leads somewhere.

A page's commands run through the real command line, in order, in a scratch folder of the page's own. Trainings are cut
to a few steps, and models that need a download are swapped for tiny ones of the same family.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml

from lora_cli import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ["train.max_steps=2", "task.data.train_limit=32", "task.data.validation_limit=16"]
STAND_INS = {
    "minilm": "tiny-bert",
    "bert-base": "tiny-bert",
    "roberta-base": "tiny-roberta",
    "deberta-v3-base": "tiny-deberta-v2",
    "modernbert-base": "tiny-modernbert",
    "gpt2": "tiny-gpt2",
    "smollm2-135m": "tiny-llama",
    "t5-small": "tiny-t5",
}
"""Model in a page → what the test trains."""
RECIPES = {"roberta-base-glue": "tiny-roberta", "gpt2-medium-nlg": "tiny-gpt2", "mine": "tiny-bert"}
"""Recipe in a page → what the test trains."""
SHORT_RECIPE = ["train.batch_size=8", "train.accumulation=1", "task.max_length=64", "task.data.test_limit=4"]
DEFAULT_MODEL = "model=tiny-bert"
NOT_RUN = {"git", "eval", "export", "hf", "tensorboard", "rm", "curl"}
"""First words of commands that reach outside the scratch folder."""

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED_FILE = re.compile(r"\A(?:# @package _global_\n)?# ([\w./-]+\.yaml)\n")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


@dataclass(frozen=True)
class Command:
    """One `$ ` line. `fails`: its block shows an error, which is `output` to the letter."""

    line: str
    fails: bool
    output: str


def blocks(page: Path) -> list[Command | tuple[str, str]]:
    """Commands, and (name, text) of files that a page tells to write, in order."""
    found: list[Command | tuple[str, str]] = []
    for language, mark, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if named := NAMED_FILE.match(body):
            found.append((named[1], body))
        if language == "console":
            for part in re.split(r"^\$ ", body.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
                line, _, output = part.partition("\n")
                found.append(Command(line, "fails" in mark, output.strip()))
    return found


def shortened(words: list[str]) -> list[str]:
    """The words of a lora command, made quick and in need of no download."""
    verb, *rest = [f"model={STAND_INS.get(w[6:], w[6:])}" if w.startswith("model=") else w for w in words]
    if verb == "serve" and "--help" not in rest:
        return [verb, *rest, "serve.port=0"]
    if verb != "train" or "--help" in rest:
        return [verb, *rest]
    recipe = next((w.removeprefix("recipe=") for w in rest if w.startswith("recipe=")), None)
    own = [f"model={RECIPES[recipe]}", *SHORT_RECIPE] if recipe in RECIPES else [DEFAULT_MODEL]
    chosen = any(w.startswith("model=") for w in rest)
    return [verb, *([] if chosen else own), *rest, *SHORT]


def needs_mirror(words: list[str]) -> bool:
    """Whether a task is a data set of the hub."""
    keys = dict(word.split("=", 1) for word in words if "=" in word)
    named = keys["tasks"].strip("[]").split(",") if "tasks" in keys else [keys.get("task", "support_intents")]
    files = [file for name in named if (file := ROOT / "conf" / "task" / f"{name}.yaml").exists()]
    return any("hub" in (yaml.safe_load(file.read_text(encoding="utf-8")).get("data") or {}) for file in files)


def run_lora(words: list[str], stdin: bytes | None, monkeypatch: pytest.MonkeyPatch) -> int:
    """`lora` in this process: importing torch anew for each command would take minutes."""
    with monkeypatch.context() as patch:
        if stdin is not None:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return cli.main(words)


def piped(line: str) -> tuple[bytes | None, str]:
    """What a pipe feeds to the command, and the command."""
    before, pipe, after = line.partition(" | ")
    return (subprocess.run(before, shell=True, capture_output=True, check=True).stdout, after) if pipe else (None, line)


def check_outside(words: list[str]) -> None:
    """Commands of other programs: what they name is there."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "pip":
        assert set(re.findall(r"\[(\w+)\]", words[-1])) <= set(metadata("lora-cli").get_all("Provides-Extra") or ())
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] in ("cat", "head", "ls"):
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    else:
        assert words[0] in NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # A server does all that comes before it waits for requests.
    monkeypatch.setattr("lora_cli.serving.server.listen", lambda *_: None)
    shutil.copytree(ROOT / "examples", "examples")
    skipped = []
    for block in blocks(page):
        if isinstance(block, tuple):
            Path(block[0]).parent.mkdir(parents=True, exist_ok=True)
            Path(block[0]).write_text(block[1], encoding="utf-8")
            continue
        stdin, line = piped(block.line)
        words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
        if words[0] != "lora":
            check_outside(words)
        elif block.fails:
            capsys.readouterr()
            assert run_lora(words[1:], stdin, monkeypatch) == 2
            assert capsys.readouterr().err.strip() == block.output
        elif needs_mirror(words) and "LORA_HUB_ROOT" not in os.environ:
            skipped.append(block.line)
        else:
            assert run_lora(shortened(words[1:]), stdin, monkeypatch) == 0, block.line
    if skipped:
        pytest.skip(f"all but these ran, LORA_HUB_ROOT is not set: {'; '.join(skipped)}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_to_files(page: Path) -> None:
    assert [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


def test_the_configuration_page_is_up_to_date() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
    assert module["TARGET"].read_text(encoding="utf-8") == module["render"](), "run python docs/make_configuration.py"


def test_the_architecture_page_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = [path for path in (ROOT / "lora_cli").rglob("*.py") if not path.stem.startswith("__")]
    assert [str(path.relative_to(ROOT)) for path in modules if path.name not in text] == []


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "python_api.py"), run_name="__main__")
    assert "saved and loaded: outputs differ by 0" in capsys.readouterr().out


def test_a_recording_shows_the_last_state_of_a_live_bar() -> None:
    final_lines = runpy.run_path(str(ROOT / "docs" / "record.py"))["final_lines"]
    assert final_lines("step 1\r\x1b[2Kscored\r\nstep 2\r\x1b[2Kdone\r\n\x1b[?25h") == ["scored", "done"]
