"""lora inspect by the real command line: a table, a JSON file and a plot, without the base model."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands.conftest import Finished
from conftest import Completed


@pytest.fixture(scope="module")
def inspected(finished: Finished, lora: Callable[..., Completed], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    words = (f"output={folder / 'spectrum.json'}", f"plot={folder / 'spectrum.svg'}", "energy=0.8")
    process = lora("inspect", "run=latest", *words, cwd=finished.home, env={**finished.env, "COLUMNS": "100"})
    assert process.returncode == 0, process.stderr
    (folder / "out.txt").write_text(process.stdout)
    return folder


def test_figures_are_those_of_the_dense_update(inspected: Path, finished: Finished) -> None:
    tensors = load_file(finished.path / "adapter" / "adapter_model.safetensors")
    for layer in json.loads((inspected / "spectrum.json").read_text())["layers"]:
        key = f"base_model.model.{layer['layer']}.lora_"
        values = torch.linalg.svdvals(2 * tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double())[:8]
        assert layer["singular_values"] == pytest.approx(values.tolist(), rel=1e-6, abs=1e-9)
        kept = values.square().cumsum(0) / values.square().sum()
        assert layer["rank_at_energy"] == int((kept < 0.8).sum()) + 1


def test_the_table_is_sorted_and_fits_a_narrow_terminal(inspected: Path) -> None:
    lines = (inspected / "out.txt").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("layer"))
    rows = [line.split() for line in lines[start + 1 : start + 14]]
    norms = [float(row[2]) for row in rows]
    assert norms == sorted(norms, reverse=True)
    assert max(map(len, lines[: start + 14])) <= 100
    assert "to keep 0.8 of every update: lora.r=" in "\n".join(lines)


def test_the_plot_is_an_svg(inspected: Path) -> None:
    assert ElementTree.parse(inspected / "spectrum.svg").getroot().tag.endswith("svg")


def test_the_suggested_ranks_can_be_trained_with(inspected: Path, finished: Finished, call, monkeypatch) -> None:
    import shlex

    monkeypatch.chdir(finished.home)
    (line,) = (line for line in (inspected / "out.txt").read_text().splitlines() if line.startswith("to keep"))
    words = shlex.split(line.partition(": ")[2])
    answer = call("train", "model=tiny-bert", *words, "--cfg", "job")
    assert answer.code == 0, answer.err
    assert f"r: {words[0].removeprefix('lora.r=')}" in answer.out


@pytest.mark.parametrize(("words", "said"), [(["run=nope"], "no such run"), (["run=latest", "energy=2"], "energy=2")])
def test_what_cannot_be_looked_at_is_one_line(words, said, finished, call, monkeypatch) -> None:
    monkeypatch.chdir(finished.home)
    answer = call("inspect", *words)
    assert answer.code == 2
    assert said in answer.err
    assert len(answer.err.strip().splitlines()) == 1
