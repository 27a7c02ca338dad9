"""lora compare: several trainings, each a run of its own, side by side."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from commands.conftest import FILMS, TINY, Finished, write_films
from conftest import Answer, Completed

WORDS = (*TINY, *FILMS, "train.epochs=1")
COUNTED = (*TINY, *FILMS, "compare.train=false")
NOWHERE = "rank_pattern: {nowhere: 2}\n"


@dataclass(frozen=True)
class Compared:
    """A comparison made by the real command line."""

    home: Path
    path: Path
    process: Completed


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, lora: Callable[..., Completed], blocked: dict[str, str]
) -> Compared:
    home = tmp_path_factory.mktemp("compared")
    write_films(home)
    words = ("compare.methods=[full,lora]", "compare.seeds=[1,2]", "compare.target=0.3")
    process = lora("compare", *WORDS, *words, cwd=home, env=blocked)
    assert process.returncode == 0, process.stderr
    (path,) = home.glob("runs/*_compare_*")
    return Compared(home, path, process)


def test_every_training_is_a_run_on_the_same_rows_in_the_same_order(compared: Compared) -> None:
    facts = {file.parent.name[:10]: json.loads(file.read_text()) for file in compared.path.glob("*/run.json")}
    assert sorted(facts) == ["full_seed1", "full_seed2", "lora_seed1", "lora_seed2"]
    for seed in (1, 2):
        full, lora = facts[f"full_seed{seed}"], facts[f"lora_seed{seed}"]
        assert full["data"] == lora["data"]
        assert full["data_seed"] == lora["data_seed"] == seed
        assert full["steps"] == lora["steps"] == 12
    assert facts["lora_seed1"]["targets"][0]["pattern"] == "all-linear"
    assert facts["full_seed1"]["targets"][0]["pattern"] == "everything"
    # Every one begins with an empty process: the last is no heavier than the first.
    peaks = [facts[name]["cost"]["peak_memory_mib"] for name in ("full_seed1", "full_seed2")]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.1)


def test_the_table_the_files_and_the_plot_say_what_the_runs_say(compared: Compared) -> None:
    whole = json.loads((compared.path / "compare.json").read_text())
    with (compared.path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("full", "1"),
        ("lora", "1"),
        ("full", "2"),
        ("lora", "2"),
    ]
    for row in rows:
        facts = json.loads((compared.home / row["run"] / "run.json").read_text())
        (weights,) = (compared.home / row["run"] / "adapter").glob("*.safetensors")
        assert float(row["validation/accuracy"]) == facts["metrics"]["validation"]["accuracy"]
        assert int(row["adapter_bytes"]) == weights.stat().st_size
        assert float(row["peak_memory_mib"]) == facts["cost"]["peak_memory_mib"]
    mine = [float(row["validation/accuracy"]) for row in rows if row["method"] == "lora"]
    assert whole["methods"]["lora"]["validation/accuracy"]["values"] == mine
    assert whole["differ_in"] == []
    heads, *methods = compared.process.stdout.splitlines()[1:4]
    assert heads.split()[:3] == ["method", "accuracy", "trains"]
    assert [line.split()[0] for line in methods] == ["full", "lora"]
    assert f"{sum(mine) / 2:.3f} ± " in methods[1]
    image = ElementTree.parse(compared.path / "plot.svg")
    assert len(list(image.iter("{http://www.w3.org/2000/svg}circle"))) == 4 * 4


def test_what_is_finished_is_used_again_and_a_failure_is_told(compared: Compared, call, monkeypatch) -> None:
    (compared.home / "conf" / "lora").mkdir(parents=True)
    (compared.home / "conf" / "lora" / "lost.yaml").write_text(NOWHERE)
    words = ("compare.methods=[lost,lora]", "compare.seeds=[2]")
    monkeypatch.chdir(compared.home)
    answer = call("compare", *WORDS, *words)
    assert answer.code == 1
    assert f"lora, seed 2, found in {compared.path.relative_to(compared.home)}/lora_seed2" in answer.err
    assert "1 of 2 trainings failed, the first of them lost, seed 2: " in answer.err.splitlines()[-1]
    assert "nowhere" in answer.err.splitlines()[-1]
    methods = answer.out.splitlines()[2:4]
    assert methods[0].startswith("lost (0 of 1 seeds)")
    assert methods[1].startswith("lora  ")
    folder = next(line for line in answer.out.splitlines() if line.startswith("runs/"))
    first, second = json.loads((compared.home / folder / "compare.json").read_text())["rows"]
    assert (first["reused"], second["reused"]) == (False, True)
    assert "nowhere" in first["error"]
    assert second["error"] is None
    (output,) = (compared.home / folder).glob("lost_*/output.txt")
    assert output.read_text().startswith("$ lora train ")


def test_a_finished_training_on_rows_that_have_changed_is_refused(compared: Compared, call, monkeypatch) -> None:
    monkeypatch.chdir(compared.home)
    file = compared.home / "train.csv"
    before = file.read_text()
    file.write_text(before.replace("train 0", "train zero"))
    try:
        answer = call("compare", *WORDS, "compare.methods=[lora]", "compare.seeds=[1]")
    finally:
        file.write_text(before)
    assert answer.code == 1
    assert "finished on other data, train changed since" in answer.err.splitlines()[-1]


def test_a_comparison_that_is_stopped_stops_its_training_and_goes_on_later(films: Path, call) -> None:
    long = ("train.epochs=4", "train.batch_size=2", "train.save_every=2")
    words = (*WORDS, "compare.methods=[lora]", "compare.seeds=[1]", *long)

    def stop_when_saved() -> None:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not list(films.glob("runs/*/*/checkpoints/step-*")):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_saved, daemon=True)
    thread.start()
    answer = call("compare", *words)
    thread.join()
    assert answer.code == 143
    assert answer.err.splitlines()[-1] == "lora compare: terminated; the same command goes on where it was"
    (run,) = films.glob("runs/*/lora_seed1_*")
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    answer = call("compare", *words)
    assert answer.code == 0, answer.err
    assert f"goes on in {run.name}" in answer.err
    assert "resumes" in (run / "output.txt").read_text()


def test_without_training_sizes_are_counted(films: Path, call: Callable[..., Answer], finished: Finished) -> None:
    methods = "compare.methods=[full,lora,dora,head]"
    answer = call("compare", *COUNTED, methods, "compare.tasks_stored=7")
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[1].rstrip().endswith("7 tasks")
    (file,) = films.glob("runs/*_compare_*/compare.json")
    sizes = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(sizes) == ["full", "lora", "dora", "head"]
    # The same words made a run, whose figures these must be.
    assert sizes["lora"]["trainable_parameters"] == finished.facts()["parameters"]["trainable"]
    assert sizes["lora"]["total_parameters"] == finished.facts()["parameters"]["total"]
    (weights,) = finished.path.glob("adapter/*.safetensors")
    assert 0 < weights.stat().st_size - sizes["lora"]["task_bytes"] < 8192, "the header"
    assert sizes["head"]["trainable_parameters"] < sizes["lora"]["trainable_parameters"]
    assert sizes["lora"]["trainable_parameters"] < sizes["dora"]["trainable_parameters"]
    assert sizes["full"]["storage_bytes"] == 7 * sizes["full"]["task_bytes"]
    assert not list(films.glob("runs/*/*/run.json"))


def test_a_folder_of_ones_own_is_used(films: Path, call: Callable[..., Answer]) -> None:
    assert call("compare", *COUNTED, "compare.methods=[head]", "hydra.run.dir=mine").code == 0
    assert (films / "mine" / "compare.csv").exists()
    assert not (films / "runs").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compare.methods=[lora,dra]"], "lora compare: compare.methods=dra: no such method. Did you mean dora?"),
        (["compare.methods=[]"], "compare.methods=[]: one or more, each once"),
        (["compare.methods=[lora,lora]"], "each once"),
        (["compare.methods=[../lora]"], "compare.methods=../lora: a plain name"),
        (["compare.seeds=[1,1]"], "compare.seeds=[1, 1]: one or more, each once"),
        (["compare.seeds=[-1]"], "compare.seeds=-1: a whole number from 0"),
        (["compare.tasks_stored=0"], "compare.tasks_stored=0: a whole number, 1 or more"),
        (["compare.target=nan"], "compare.target=nan: a finite number"),
        (["lora=dora"], "lora=dora: name the methods: compare.methods=[dora]"),
        (["compare.method=[lora]"], "compare.method: no such key. Did you mean compare.methods?"),
        (["seed=3"], "seed"),
        (["lora.r=0"], "lora.r=0: a whole number from 1"),
        (["task=e2e", "model=tiny-gpt2", "compare.target=0.5"], "needs train.metric=e2e_bleu"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_compared_is_refused_at_once(words: list[str], told: str, refused: Callable[..., str]) -> None:
    assert told in refused("compare", *words)


@pytest.mark.parametrize(
    ("method", "text", "told"),
    [
        ("longer", "# @package _global_\ntrain: {epochs: 9}\n", "its file sets train.epochs=9.0, lora has 3.0"),
        ("other", "# @package _global_\ntask: {max_length: 9}\n", "its file sets another task.* than that of lora"),
        ("rankless", "r: 0\n", "lora.r=0: a whole number from 1"),
        ("misspelt", "rnk: 1\n", "no such key"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_by_name(
    method: str, text: str, told: str, scratch: Path, refused: Callable[..., str]
) -> None:
    (scratch / "conf" / "lora").mkdir(parents=True)
    (scratch / "conf" / "lora" / f"{method}.yaml").write_text(text)
    line = refused("compare", f"compare.methods=[lora,{method}]")
    assert line.startswith(f"lora compare: compare.methods={method}: ")
    assert told in line


def test_words_about_adapters_leave_methods_without_one_alone(
    films: Path, call: Callable[..., Answer], finished: Finished
) -> None:
    words = ("lora.targets=[query]", "lora.r=2", "compare.methods=[head,full,lora]")
    assert call("compare", *COUNTED, *words).code == 0
    (file,) = films.glob("runs/*/compare.csv")
    with file.open() as handle:
        trained = {row["method"]: int(row["trainable_parameters"]) for row in csv.DictReader(handle)}
    head = trained["head"]
    # Two layers of 64 by 64, each with an A (2, 64) and a B (64, 2).
    assert trained["lora"] - head == 2 * 2 * (2 * 64)
    assert trained["full"] > trained["lora"]
