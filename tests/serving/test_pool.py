"""Adapters on one base: mixed rows are answered as alone; adapters come, go and change on disk."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.config import read_train_run
from lora_cli.engine.evaluate import predict
from lora_cli.errors import AdapterError, ConfigError, ModelError, RunError, UnknownName
from lora_cli.runs.directory import RunDirectory, read_saved_config
from lora_cli.runs.manifest import write_manifest
from lora_cli.saved import Saved, open_saved
from lora_cli.serving.adapters import Shelf
from lora_cli.serving.jobs import Job, LabelJob, Late
from lora_cli.serving.labelling import Labelling
from lora_cli.serving.pool import Full, Labelled, Pool, Unavailable
from lora_cli.spec import DeviceSpec, InferRun
from lora_cli.tasks import Classification, Rows

from .conftest import TEXTS, move

NAMES = ["a", "two", "b", "dora", "two", "c", "a", "dora", "b"]


def saved_run(path: Path) -> Saved:
    run = read_train_run(read_saved_config(path))
    device = DeviceSpec(name="cpu", threads=1)
    return open_saved(InferRun(run=str(path), text="", task=run.task, model=run.model, device=device))


def alone(path: Path, texts: Sequence[str]) -> list[torch.Tensor]:
    """The logits of each text, from a batch of its own, as `lora infer` computes them."""
    saved = saved_run(path)
    assert isinstance(saved.task, Classification)
    rows = Rows([{"text": text} for text in texts], source="", separator="", numbers=range(len(texts)))
    examples = saved.task.encode_texts(rows, saved).examples
    return [
        logits[0]
        for example in examples
        for _, logits, _ in predict(saved.model, saved.task, [example], device=saved.device, batch_size=1)
    ]


def items(pool: Pool, names: Sequence[str]) -> list[Labelled]:
    texts = [TEXTS[place % len(TEXTS)] for place in range(len(names))]
    pairs = zip(names, texts, strict=True)
    return [row for name, text in pairs for row in pool.encode(pool.ready(name), [{"text": text}])]


def test_rows_of_many_adapters_are_answered_as_each_alone(films: Path, pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(films)
    asked = items(pool, NAMES)
    found, answers = pool.logits(asked), pool.classify(asked)
    singles = {name: alone(films / name, TEXTS) for name in set(NAMES)}
    for place, name in enumerate(NAMES):
        wanted = singles[name][place % len(TEXTS)]
        torch.testing.assert_close(found[place][0], wanted, rtol=1e-5, atol=1e-5)
        assert list(answers[place]["probabilities"]) == (["no", "yes"] if name == "two" else ["bad", "fair", "good"])
        assert answers[place]["label"] == list(answers[place]["probabilities"])[int(wanted.argmax())]
    assert len({tuple(row[0].tolist()) for row in found}) == len(NAMES), "the adapters differ"


def test_the_least_recently_used_adapter_leaves_for_another(films: Path, pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(films, max_adapters=2)
    first = pool.classify(items(pool, ["a"]))
    for name in ("b", "a", "c"):
        pool.ready(name)
    assert pool.loaded == ["a", "c"]
    assert pool.num_evicted == 1
    pool.ready("b")
    assert pool.classify(items(pool, ["a"])) == first
    assert len(pool.bank.names) == 2


def test_adapters_leave_past_a_number_of_bytes(films: Path, pool_of: Callable[..., Pool]) -> None:
    whole = pool_of(films / "a")
    whole.ready("a")
    pool = pool_of(films, max_bytes=2 * whole.bytes)
    for name in ("a", "b", "c"):
        pool.ready(name)
    assert pool.loaded == ["b", "c"]
    assert pool.bytes == 2 * whole.bytes


def test_an_adapter_in_use_stays(films: Path, pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(films, max_adapters=1)
    held = pool.ready("a")
    pool.hold(held)
    with pytest.raises(Full):
        pool.ready("b")
    pool.drop("a")
    assert pool.bank.names == (held.key,)
    pool.release(held)
    assert pool.bank.names == ()
    assert pool.ready("b").entry.name == "b"


@pytest.fixture
def own(films: Path, tmp_path: Path) -> Path:
    """Runs a and b, to be changed."""
    for name in ("a", "b"):
        shutil.copytree(films / name, tmp_path / "runs" / name)
    return tmp_path / "runs"


@pytest.mark.parametrize("watch", [False, True])
def test_an_adapter_that_changed_on_disk_is_read_anew_if_wanted(
    watch: bool, own: Path, pool_of: Callable[..., Pool]
) -> None:
    pool = pool_of(own, watch=watch)
    before, other = pool.classify(items(pool, ["a"])), pool.classify(items(pool, ["b"]))
    held = items(pool, ["a"])
    pool.hold(held[0].ready)
    move(own / "a", 11)
    assert (pool.classify(items(pool, ["a"])) != before) == watch
    assert pool.num_reloaded == watch
    assert pool.classify(items(pool, ["b"])) == other
    assert pool.classify(held) == before, "what was begun ends as it was"
    pool.release(held[0].ready)
    assert len(pool.bank.names) == 2
    (wanted,) = alone(own / "a", TEXTS[:1])
    if watch:
        torch.testing.assert_close(pool.logits(items(pool, ["a"]))[0][0], wanted, rtol=1e-5, atol=1e-5)


def test_a_damaged_change_leaves_what_was_there(own: Path, pool_of: Callable[..., Pool]) -> None:
    warnings: list[str] = []
    pool = pool_of(own, watch=True, warn=warnings.append)
    before = pool.classify(items(pool, ["a"]))
    (own / "a" / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    assert pool.classify(items(pool, ["a"])) == before
    assert "adapter_model.safetensors" in warnings[0]


def test_a_damaged_change_leaves_what_was_there_where_there_is_room_for_one(
    own: Path, pool_of: Callable[..., Pool]
) -> None:
    warnings: list[str] = []
    pool = pool_of(own, watch=True, max_adapters=1, warn=warnings.append)
    before = pool.classify(items(pool, ["a"]))
    move(own / "a", 3, float("nan"))
    for _ in range(2):
        assert pool.classify(items(pool, ["a"])) == before
    assert len(warnings) == 1, "once for each version of a file"
    move(own / "b", 3)
    assert pool.classify(items(pool, ["b"])) != before
    assert len(pool.bank.names) == 1


def test_a_change_waits_until_there_is_room_for_it(own: Path, pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(own, watch=True, max_adapters=1)
    held = pool.ready("a")
    pool.hold(held)
    move(own / "a", 3)
    assert pool.ready("a") == held
    pool.release(held)
    assert pool.ready("a") != held
    assert len(pool.bank.names) == 1


def test_an_adapter_that_went_is_told_without_its_path(own: Path, pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(own)
    shutil.rmtree(own / "a")
    with pytest.raises(Unavailable, match=r"^the adapter a cannot be loaded$"):
        pool.ready("a")
    assert pool.ready("b").entry.name == "b"


def test_an_adapter_that_changed_while_it_was_not_in_memory_is_read_as_it_is(
    own: Path, pool_of: Callable[..., Pool]
) -> None:
    pool = pool_of(own)
    move(own / "a", 12)
    (wanted,) = alone(own / "a", TEXTS[:1])
    torch.testing.assert_close(pool.logits(items(pool, ["a"]))[0][0], wanted, rtol=1e-5, atol=1e-5)


def test_adapters_come_and_go_by_name(own: Path, pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(own)
    pool.drop("a")
    with pytest.raises(UnknownName, match="a"):
        pool.ready("a")
    shutil.copytree(own / "b", own / "new")
    for name in ("a", "new"):
        pool.put(name)
    assert list(pool.entries) == ["b", "a", "new"]
    assert pool.classify(items(pool, ["new"])) == pool.classify(items(pool, ["b"]))
    for name in ("..", "../runs/b", str(own / "b"), "b/adapter", ""):
        with pytest.raises(UnknownName):
            pool.put(name)


def test_what_does_not_fit_the_base_is_refused_by_name(
    films: Path, talks: Path, own: Path, pool_of: Callable[..., Pool]
) -> None:
    with pytest.raises(AdapterError, match=r"runs/x: it writes, and .*runs/a classifies"):
        pool_of(films / "a", talks / "x")
    with pytest.raises(ConfigError, match="another adapter is called a"):
        pool_of(films / "a", own / "a")
    facts = own / "b" / "adapter" / "lora.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"fingerprint": "0" * 64}))
    write_manifest(own / "b")
    with pytest.raises(
        AdapterError, match=r"runs/b: trained on another base than .*runs/a \(.*\): the same name, other"
    ):
        pool_of(own)
    assert list(pool_of(own, force_base=True).entries) == ["a", "b"]


def test_a_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished run and no adapter"):
        Shelf([str(tmp_path)])
    with pytest.raises(UnknownName):
        Shelf([str(tmp_path / "nothing")])


def flip(file: Path) -> None:
    """Change the last byte of a file."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "adapter/lora.json", "tokenizer/tokenizer.json"])
def test_a_file_that_is_not_as_the_run_left_it_is_refused_by_name(name: str, own: Path) -> None:
    flip(own / "b" / name)
    with pytest.raises(RunError, match=rf"runs/b: {name} changed since the run ended \(manifest\.json\)"):
        Shelf([str(own)])


def test_what_describes_an_adapter_or_lies_beside_it_does_no_harm(own: Path) -> None:
    (own / "b" / "adapter" / "plot.png").touch()
    (own / "b" / "adapter" / "README.md").write_text("An adapter of ours.")
    assert list(Shelf([str(own)]).entries) == ["a", "b"]


def test_a_run_that_goes_on_may_save_another_adapter(own: Path) -> None:
    flip(own / "b" / "adapter" / "adapter_model.safetensors")
    RunDirectory(own / "b").update(status="running")
    assert list(Shelf([str(own)]).entries) == ["a", "b"]


def test_all_damaged_runs_of_a_folder_are_named(own: Path) -> None:
    for name in ("a", "b"):
        flip(own / name / "adapter" / "adapter_model.safetensors")
    with pytest.raises(RunError, match=r"^a, b cannot be used; the first: .*runs/a: adapter/"):
        Shelf([str(own)])


def test_a_damaged_tokenizer_is_found_at_the_start(own: Path, pool_of: Callable[..., Pool]) -> None:
    (own / "b" / "tokenizer" / "tokenizer.json").write_text("{}")
    (own / "b" / "manifest.json").unlink()
    with pytest.raises(ModelError, match=r"runs/b/tokenizer: its tokenizer cannot be loaded"):
        pool_of(own)


def test_a_run_that_became_a_link_is_not_followed(films: Path, own: Path, pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(own)
    shutil.rmtree(own / "a")
    (own / "a").symlink_to(films / "two")
    with pytest.raises(Unavailable, match=r"^the adapter a cannot be loaded$"):
        pool.ready("a")
    (own / "named").symlink_to(own / "b")
    assert list(pool_of(own / "named").entries) == ["named"], "a link that is named is followed"


def test_links_in_a_folder_are_no_adapters(own: Path) -> None:
    (own / "latest").symlink_to(own / "a")
    assert list(Shelf([str(own)]).entries) == ["a", "b"]


def label(name: str, texts: Sequence[str], told: list[Any], **settings: Any) -> LabelJob:
    return LabelJob(name=name, rows=[{"text": text} for text in texts], tell=told.append, **settings)


def finish(work: Labelling, waiting: deque[Job]) -> None:
    while waiting or not work.is_idle:
        work.begin(waiting)
        work.step()


def test_jobs_are_answered_in_batches_of_a_budget(films: Path, pool_of: Callable[..., Pool]) -> None:
    pool, told, sizes = pool_of(films), [list[Any](), list[Any]()], list[int]()
    classify = pool.classify
    pool.classify = lambda rows: sizes.append(len(rows)) or classify(rows)  # type: ignore[method-assign]
    finish(Labelling(pool, 30), deque([label("a", TEXTS, told[0]), label("two", TEXTS, told[1])]))
    assert [[row["label"] for row in each[0]] for each in told] == [
        [row["label"] for row in classify(items(pool, [name] * 5))] for name in ("a", "two")
    ]
    assert len(sizes) > 3, "no batch has more tokens than may be"
    assert max(sizes) > 1
    assert not pool._held


def test_a_row_that_fails_fails_alone(films: Path, pool_of: Callable[..., Pool]) -> None:
    pool, good, bad = pool_of(films), list[Any](), list[Any]()
    classify = pool.classify

    def fail(rows: Sequence[Labelled]) -> list[dict[str, Any]]:
        if any(row.ready.entry.name == "two" for row in rows):
            raise RuntimeError("out of registers")
        return classify(rows)

    pool.classify = fail  # type: ignore[method-assign]
    finish(Labelling(pool, 4096), deque([label("a", TEXTS, good), label("two", TEXTS, bad)]))
    assert [row["label"] for row in good[0]] == [row["label"] for row in classify(items(pool, ["a"] * 5))]
    assert [str(error) for error in bad] == ["out of registers"], "told once"
    assert not pool._held


def test_who_is_late_or_gone_is_not_computed(films: Path, pool_of: Callable[..., Pool]) -> None:
    pool, told = pool_of(films), [list[Any](), list[Any](), list[Any]()]
    jobs = [label("a", TEXTS, each) for each in told]
    work = Labelling(pool, 4096)
    work.begin(deque(jobs))
    jobs[0].is_cancelled, jobs[1].deadline = True, 0.0
    finish(work, deque())
    assert told[0] == []
    assert isinstance(told[1][0], Late)
    assert len(told[2][0]) == 5
    assert not pool._held


def test_texts_whose_adapter_has_no_room_are_passed_over_once(films: Path, pool_of: Callable[..., Pool]) -> None:
    pool, order = pool_of(films, max_adapters=1), list[str]()
    jobs = [label(name, ["aa"], [], deadline=float("inf")) for name in ("a", "b", "a", "b", "a")]
    for job in jobs:
        job.tell = lambda _, name=job.name: order.append(name)  # type: ignore[misc]
    finish(Labelling(pool, 4096), deque(jobs))
    assert order == ["a", "a", "a", "b", "b"]
    assert pool.num_loaded == 2
