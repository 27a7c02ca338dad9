"""lora eval by the real command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands.conftest import MODEL, Finished, read_jsonl


def test_eval_gives_the_runs_figures_to_the_last_digit(finished: Finished, lora) -> None:
    answer = lora("eval", "run=latest", cwd=finished.home, env=finished.env)
    assert answer.returncode == 0, answer.stderr
    written = json.loads((finished.path / "eval" / "validation" / "metrics.json").read_text())
    assert written["metrics"] == finished.facts()["metrics"]["validation"]
    assert written["rows"] == 30
    assert sum(map(sum, written["confusion"])) == 30
    assert read_jsonl(finished.path / "eval" / "validation" / "predictions.jsonl") == read_jsonl(
        finished.path / "predictions" / "validation.jsonl"
    )
    assert "accuracy" in answer.stdout
    assert not Path(finished.env["DIALLED"]).exists()


@pytest.fixture
def copy(finished: Finished, films: Path) -> Path:
    """A copy of the run in the current directory, to be damaged."""
    return shutil.copytree(finished.path, films / "copy")


def test_another_split_into_another_folder(finished: Finished, copy, call) -> None:
    answer = call("eval", "run=copy", "task.split=test", "output=out", "task.data.test_limit=10", "batch_size=3")
    assert answer.code == 0, answer.err
    metrics = json.loads(Path("out/metrics.json").read_text())["metrics"]
    assert metrics["accuracy"] == finished.facts()["metrics"]["test"]["accuracy"]
    assert not (copy / "eval" / "test").exists()


def test_a_bare_adapter_in_pefts_format_is_scored_with_task_and_model(finished: Finished, copy, call) -> None:
    (copy / "adapter" / "lora.json").unlink(missing_ok=True)
    words = ["run=copy/adapter", *MODEL, "task=text_classification", "task.label=verdict"]
    data = ["task.data.validation=validation.csv", "task.labels=[bad,fair,good]", "output=out"]
    answer = call("eval", *words, *data)
    assert answer.code == 0, answer.err
    metrics = json.loads(Path("out/metrics.json").read_text())["metrics"]
    assert metrics["accuracy"] == finished.facts()["metrics"]["validation"]["accuracy"]
    assert "a bare adapter does not say which; give" in call("eval", "run=copy/adapter").err


def broken_config(copy: Path) -> None:
    (copy / "config.yaml").write_text("a: &x [1]\nb: *x\n")


def resolver(copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("name: text_classification", "name: ${oc.env:HOME}"))


def target(copy: Path) -> None:
    with (copy / "config.yaml").open("a") as file:
        file.write("_target_: os.system\n")


def bomb(copy: Path) -> None:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    (copy / "config.yaml").write_text("\n".join(lines))


def tag(copy: Path) -> None:
    (copy / "config.yaml").write_text("task: !!python/object/apply:os.system ['true']\n")


def binary(copy: Path) -> None:
    (copy / "config.yaml").write_bytes(b"\xff\x00\xfe")


def a_list(copy: Path) -> None:
    (copy / "config.yaml").write_text("- 1\n")


def empty(copy: Path) -> None:
    (copy / "config.yaml").write_text("")


def a_link(copy: Path) -> None:
    (copy / "config.yaml").unlink()
    (copy / "config.yaml").symlink_to("/etc/passwd")


def huge(copy: Path) -> None:
    (copy / "config.yaml").write_text("a: " + "x" * (1 << 21))


def foreign_key(copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("task:\n", "task:\n  surprise: 1\n"))


def wrong_type(copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("max_length: 128", "max_length: many"))


def newer(copy: Path) -> None:
    facts = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(facts | {"format": 99}))


def no_json(copy: Path) -> None:
    (copy / "run.json").write_text("{")


def unfinished(copy: Path) -> None:
    shutil.rmtree(copy / "adapter")


def cut_adapter(copy: Path) -> None:
    file = copy / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def itself(copy: Path) -> None:
    (copy / "config.yaml").write_text("task: &task [*task]\n")


def adapter_elsewhere(copy: Path) -> None:
    (copy / "adapter").rename(copy.parent / "elsewhere")
    (copy / "adapter").symlink_to(copy.parent / "elsewhere")


def results_elsewhere(copy: Path) -> None:
    shutil.rmtree(copy / "eval", ignore_errors=True)
    (copy / "eval").symlink_to(copy.parent)


def code(copy: Path) -> None:
    config, base = copy / "config.yaml", copy.parent / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}))
    (base / "evil.py").write_text(f"open({str(copy.parent / 'ran')!r}, 'w')")
    lines = [line for line in config.read_text().splitlines() if "trust_remote_code" not in line]
    config.write_text("\n".join(lines).replace("  path: null", "  trust_remote_code: true\n  path: ./base", 1))


def edit_tensors(copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = copy / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def no_tensors(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.clear())


def base_tensor(copy: Path) -> None:
    name = "base_model.model.bert.embeddings.word_embeddings.weight"
    edit_tensors(copy, lambda tensors: tensors.update({name: torch.zeros(261, 64)}))


def edit_settings(copy: Path, **values: object) -> None:
    file = copy / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def huge_rank(copy: Path) -> None:
    edit_settings(copy, r=20_000_000)


def expression(copy: Path) -> None:
    edit_settings(copy, target_modules="([a-z0-9._]+)+!")


def pickle_weights(copy: Path) -> None:
    file = copy / "adapter" / "adapter_model.safetensors"
    file.rename(file.with_suffix(".bin"))


def other_base(copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("intermediate_size: 64", "intermediate_size: 96"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (target, "row 5: key _target_ is not allowed"),
        (bomb, "row 6: aliases"),
        (broken_config, "row 6: aliases"),
        (tag, "row 6: tags"),
        (binary, "row 6: not UTF-8"),
        (a_list, "row 6: no mapping"),
        (empty, "row 6: no mapping"),
        (huge, "row 6: bytes; at most"),
        (resolver, "row 7: interpolation"),
        (a_link, "row 8: not a regular file"),
        (foreign_key, "row 8: surprise"),
        (wrong_type, "row 8: max_length"),
        (newer, "row 10: made by a newer lora"),
        (no_json, "row 10: not readable as JSON"),
        (unfinished, "row 35: has no adapter"),
        (cut_adapter, "row 54: adapter_model.safetensors"),
        (itself, "row 6: aliases"),
        (adapter_elsewhere, "row 8: adapter: not a regular file"),
        (results_elsewhere, "row 8: eval: not a regular file"),
        (code, "row 8: would run code of its own"),
        (no_tensors, "row 55: tensors are missing"),
        (base_tensor, "row 56: word_embeddings"),
        (huge_rank, "row 58: lora.r=20000000"),
        (expression, "row 59: expressions are not run"),
        (pickle_weights, "row 60: never opened"),
        (other_base, "row 34: trained on another base model"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_run_is_refused(damage, says, copy, refused) -> None:
    damage(copy)
    assert says.partition(": ")[2] in refused("eval", "run=copy")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run=cop"], "no such run"),
        (["run=train.csv"], "no such run"),
        (["run=."], "neither a run"),
        (["run=copy", "output=train.csv"], "output=train.csv: is a file"),
        (["run=copy", "task.labels=[good,bad,fair]"], "but it was trained with bad, fair, good"),
        (["run=copy", "task.split=nope"], "no split 'nope'"),
        (["run=copy", "lora.r=4"], "only for an adapter trained with lora=dylora"),
        (["run=copy", "batch_size=0"], "batch_size=0: a whole number, 1 or more"),
        (["run=copy", "task.data.validation=gone.csv"], "gone.csv: no such file"),
        (["run=copy", "train.lr=1"], "train: no such key"),
        (["latest"], "latest: overrides look like key=value"),
        (["run="], "run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_eval_is_refused(words, says, copy, refused) -> None:
    assert says in refused("eval", *words)


def test_a_label_that_the_run_does_not_know_is_refused_with_its_line(copy, refused) -> None:
    Path("validation.csv").write_text("text,verdict\na,bad\nb,awful\n")
    line = refused("eval", "run=copy")
    assert "validation.csv:3" in line, "row 17"
    assert "awful" in line
    assert "bad, fair, good" in line
