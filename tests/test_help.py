"""Help tells every key once, and neither help nor a mistake waits for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli import help as lora_help
from lora_cli.spec import VERBS

QUICK = [
    ["--help"],
    ["train", "--help"],
    ["eval", "--help"],
    ["train", "--cfg", "job"],
    ["train", "lora.rnk=8"],
    ["train", "task.data.train=nope.csv"],
    ["trian"],
    ["--version"],
]


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_answers_that_need_no_model_do_without_heavy_libraries(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from lora_cli.cli import main; main(sys.argv[1:]);"
        "print('HEAVY', {'torch', 'transformers', 'datasets', 'evaluate', 'sklearn'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.splitlines()[-1] == "HEAVY set()"


def test_the_overview_names_every_verb(call) -> None:
    answer = call()
    assert answer.code == 0
    assert answer.err == ""
    assert all(f"  {verb} " in answer.out for verb in VERBS)
    assert call("--help").out == call("-h").out == call("help").out == answer.out


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_help_lists_every_key_once_with_type_default_and_help(verb: str, call, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    answer = call(verb, "--help")
    assert answer.code == 0
    keys = list(lora_help.keys_of(VERBS[verb]))
    assert len({key.name for key in keys}) == len(keys)
    for key in keys:
        assert key.help.endswith("."), f"{key.name} has no help"
        (line,) = [line for line in answer.out.splitlines() if line.startswith(f"  {key.name} ")]
        assert key.type in line
        assert key.default in line
        assert key.help in line


def test_the_help_of_train_says_how_a_sweep_is_run(call, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    said = call("train", "--help").out
    assert "hydra/launcher=fused       Jobs with the same base model" in said
    for setting in ("hydra.launcher.n_jobs=1", "hydra.launcher.mixed=null", "hydra.sweeper.trials=20"):
        assert setting in said
    assert "basic, optuna" in said


def test_help_wins_over_what_stands_beside_it(call) -> None:
    assert call("train", "lora.r=nonsense", "--help").code == 0
    assert call("train", "-h", "--foo").code == 0


def test_the_version_is_the_packages(call) -> None:
    from lora_cli import __version__

    assert call("--version").out == f"lora {__version__}\n"


def test_help_into_a_pipe_that_closes_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m lora_cli train --help | head -1"
    answer = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert answer.stderr == ""
    assert answer.stdout.startswith("lora train: ")


@pytest.fixture
def tab(call, scratch: Path, monkeypatch):
    """What TAB offers at the end of a line."""

    def complete(line: str) -> list[str]:
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        answer = call("-sc", "query=bash")
        assert answer.code == 0
        assert answer.err == ""
        return answer.out.split()

    return complete


def test_tab_completes_verbs_groups_keys_and_runs(tab, scratch: Path) -> None:
    assert tab("lora ") == list(VERBS)
    assert tab("lora tr") == ["train"]
    assert {"task=sst2", "task=stsb", "task=snli"} <= set(tab("lora train task=s"))
    assert "lora.rank_pattern=" in " ".join(tab("lora train lora.ra")) or tab("lora train lora.ra")
    assert "lora.r=" in tab("lora train lora.r")
    assert "train.lr=" in tab("lora train task=sst2 train.l")
    (scratch / "runs" / "2026_a").mkdir(parents=True)
    (scratch / "runs" / "2026_a" / "run.json").write_text("{}")
    assert tab("lora eval run=") == ["run=latest", "run=2026_a"]
    assert tab("lora infer run=20") == ["run=2026_a"]
    assert tab("lora nope x") == []
    assert tab("lora eval run=gone ba") is not None


def test_bash_is_told_how_to_complete(call) -> None:
    answer = call("-sc", "install=bash")
    assert answer.code == 0
    assert "complete -o nospace" in answer.out
    assert " lora" in answer.out
