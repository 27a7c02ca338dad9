"""Answers written together are those written alone, whoever joins and leaves, and what is drawn depends on the seed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.config import read_train_run
from lora_cli.engine.generate import generate
from lora_cli.runs.directory import read_saved_config
from lora_cli.saved import open_saved
from lora_cli.serving.jobs import Late, Piece, WriteJob
from lora_cli.serving.models import row_of
from lora_cli.serving.pool import Pool
from lora_cli.serving.writing import Writing, _Answer
from lora_cli.spec import DeviceSpec, InferRun, TextSpec
from lora_cli.tasks import Rows

from .conftest import copies, move, train

PROMPTS = ["hi", "a rather long question about the weather of tomorrow", "ok then", "b"]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tiny-gpt2", "tiny-bloom")]


@pytest.fixture(scope="session", params=["tiny-llama", "tiny-t5", *SLOW])
def writers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, forked) -> Path:
    """A folder of runs x and y that answer prompts, of one family."""
    home = tmp_path_factory.mktemp("writers")
    (home / "rows.csv").write_text("prompt,target\n" + "".join(f"a{n},b{n} c\n" for n in range(16)))
    files = ("task.data.train=rows.csv", "task.data.validation=rows.csv", "task.decode.max_new_tokens=10")
    run = train(forked, home, "runs/x", "task=text_generation", f"model={request.param}", *files)
    copies(run, "y", size=1.0)
    move(run, 7, 1.0)
    return home / "runs"


def job(pool: Pool, name: str, prompt: str, told: list[Any], **settings: Any) -> WriteJob:
    entry = pool.entries[name]
    assert isinstance(entry.task.spec, TextSpec)
    own = {key: settings.pop(key) for key in ("n", "seed", "logprobs", "streams") if key in settings}
    decode = replace(entry.task.spec.decode, **settings)
    return WriteJob(name=name, row=row_of(entry, prompt), decode=decode, tell=told.append, **own)


def finish(work: Writing, waiting: deque[Any]) -> None:
    while waiting or not work.is_idle:
        work.begin(waiting)
        work.step()


def alone(path: Path, prompts: list[str]) -> list[str]:
    """The answers as `lora infer` writes them, one at a time."""
    run = read_train_run(read_saved_config(path))
    device = DeviceSpec(name="cpu", threads=1)
    saved = open_saved(InferRun(run=str(path), text="", task=run.task, model=run.model, device=device))
    rows = [saved.task.row_of(prompt) for prompt in prompts]  # type: ignore[union-attr]
    queries, _ = saved.task.encode_queries(Rows(rows, source="", numbers=range(len(rows))), saved)  # type: ignore
    decode = saved.task.spec.decode  # type: ignore[union-attr]
    common = {"tokenizer": saved.tokenizer, "device": saved.device, "batch_size": 1}
    return [text for query in queries for _, text in generate(saved.model, [query], decode, **common)]


def test_answers_are_those_of_each_adapter_alone_whoever_joins_and_leaves(
    writers: Path, pool_of: Callable[..., Pool]
) -> None:
    pool = pool_of(writers)
    singles = {name: alone(writers / name, PROMPTS) for name in ("x", "y")}
    wanted = {(name, prompt): text for name in singles for prompt, text in zip(PROMPTS, singles[name], strict=True)}
    work, told = Writing(pool, 4096), {key: list[Any]() for key in wanted}
    for number, (name, prompt) in enumerate(wanted):
        # Each comes a step or two after the one before, when some are on their way and, later, some are gone.
        work.begin(deque([job(pool, name, prompt, told[name, prompt])]))
        for _ in range(number % 3):
            work.step()
    finish(work, deque())
    assert {key: pieces[-1].text for key, pieces in told.items()} == wanted
    assert all(len(pieces) == 1 and pieces[0].finish in ("stop", "length") for pieces in told.values())
    assert len(set(wanted.values())) > 2, "the answers differ"


def test_draws_of_every_family_go_by_seeds_that_follow_and_are_counted(
    writers: Path, pool_of: Callable[..., Pool]
) -> None:
    pool = pool_of(writers)
    drawing = {"sample": True, "temperature": 1.5, "prompt": "hi", "max_new_tokens": 4}
    pieces = sorted(answer(pool, seed=7, n=3, **drawing), key=lambda piece: piece.choice)
    singles = [answer(pool, seed=seed, **drawing)[0] for seed in (7, 8, 9)]
    assert pieces == [replace(piece, choice=number) for number, piece in enumerate(singles)]
    assert len({piece.text for piece in pieces}) > 1
    assert all((piece.num_written, piece.finish) == (4, "length") or piece.num_written <= 4 for piece in pieces)
    assert not pool.is_in_use


def test_answers_that_draw_nothing_are_the_same(writers: Path, pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(writers)
    assert [piece.choice for piece in answer(pool, n=2)] == [0, 1]
    assert len({(piece.text, piece.num_written, piece.finish) for piece in answer(pool, n=2)}) == 1


@pytest.mark.parametrize("after", [0, 1])
def test_a_draw_that_fails_ends_its_job_alone(
    after: int, writers: Path, pool_of: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, good, bad = pool_of(writers), list[Any](), list[Any]()
    # A penalty lets a decoder be answered by whole calls too.
    jobs = [job(pool, "x", "hi", bad, sample=True, n=3, repetition_penalty=1.1), job(pool, "y", "hi", good)]
    whole, calls = Writing._generated, iter(range(10))

    def fail(self: Writing, chosen: Any) -> Any:
        if chosen[0].job is jobs[0] and next(calls) == after:
            raise RuntimeError("out of registers")
        return whole(self, chosen)

    monkeypatch.setattr(Writing, "_generated", fail)
    finish(Writing(pool, 4096), deque(jobs))
    assert [str(each) for each in bad[after:]] == ["out of registers"]
    assert [piece.text for piece in good] == [answer(pool, "y")[0].text]
    assert not pool.is_in_use


@pytest.fixture
def pool(talks: Path, pool_of: Callable[..., Pool]) -> Pool:
    return pool_of(talks)


def answer(pool: Pool, name: str = "x", prompt: str = "hi", **settings: Any) -> list[Piece]:
    told: list[Any] = []
    finish(Writing(pool, 4096), deque([job(pool, name, prompt, told, **settings)]))
    return told


def test_what_is_drawn_depends_on_the_seed_and_not_on_company(pool: Pool) -> None:
    drawing = {"sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 5}
    single = answer(pool, **drawing)[0].text
    told: list[Any] = []
    jobs = [job(pool, "y", "other", [], sample=True, seed=1), job(pool, "x", "hi", told, **drawing)]
    finish(Writing(pool, 4096), deque(jobs))
    assert told[0].text == single
    assert answer(pool, **{**drawing, "seed": 6})[0].text != single


def test_several_answers_are_drawn_by_seeds_that_follow(pool: Pool) -> None:
    drawing = {"sample": True, "seed": 5}
    pieces = sorted(answer(pool, n=3, **drawing), key=lambda piece: piece.choice)
    assert [piece.choice for piece in pieces] == [0, 1, 2]
    assert len({piece.text for piece in pieces}) == 3
    assert pieces[1].text == answer(pool, sample=True, seed=6)[0].text


def test_low_temperature_and_a_small_share_take_the_likeliest(pool: Pool) -> None:
    likeliest = answer(pool)[0].text
    assert answer(pool, sample=True, temperature=1e-4, seed=1)[0].text == likeliest
    assert answer(pool, sample=True, top_p=1e-6, seed=2)[0].text == likeliest
    assert answer(pool, sample=True, top_k=1, seed=3)[0].text == likeliest


def test_what_is_streamed_is_the_whole(pool: Pool) -> None:
    drawing = {"sample": True, "seed": 9, "max_new_tokens": 40}
    pieces = answer(pool, streams=True, **drawing)
    assert len(pieces) > 5
    assert "".join(piece.text for piece in pieces) == answer(pool, **drawing)[0].text
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


def test_an_answer_ends_before_a_stop_text(pool: Pool) -> None:
    drawing = {"sample": True, "seed": 9, "max_new_tokens": 40}
    text = answer(pool, **drawing)[0].text
    stop = text[10:12]
    for streams in (False, True):
        pieces = answer(pool, **drawing, stop=[stop], streams=streams)
        assert "".join(piece.text for piece in pieces) == text.partition(stop)[0].strip()
        assert pieces[-1].finish == "stop"
        assert pieces[-1].num_written < 40


def test_tokens_of_a_stop_text_are_not_told(pool: Pool) -> None:
    drawing = {"sample": True, "seed": 9, "max_new_tokens": 40, "logprobs": 0}
    (whole,) = answer(pool, **drawing)
    stop = whole.text[10:12]
    for streams in (False, True):
        pieces = answer(pool, **drawing, stop=[stop], streams=streams)
        tokens = [token for piece in pieces for token in piece.tokens]
        assert 0 < len(tokens) < pieces[-1].num_written
        assert tokens == list(whole.tokens[: len(tokens)])
        assert stop not in "".join(token.text for token in tokens)


def test_log_probabilities_are_those_of_the_tokens(pool: Pool) -> None:
    (piece,) = answer(pool, logprobs=3)
    assert len(piece.tokens) == piece.num_written == 12
    for token in piece.tokens:
        assert token.logprob == max(logprob for _, logprob in token.top), "the likeliest was taken"
        assert sorted((p for _, p in token.top), reverse=True) == [p for _, p in token.top]
        assert -20 < token.logprob < 0


def test_room_is_made_by_those_that_end(pool: Pool) -> None:
    told: list[Any] = []
    waiting = deque(job(pool, "xyz"[number % 3], "hi", told) for number in range(9))
    work = Writing(pool, 150)
    most = 0
    while waiting or not work.is_idle:
        work.begin(waiting)
        most = max(most, work.num_tokens)
        work.step()
    assert most <= 150
    assert len(told) == 9
    assert len(pool.bank.names) == 3
    pool.drop("x")
    assert len(pool.bank.names) == 2, "nobody holds it"


def test_who_is_gone_or_late_leaves_between_steps(pool: Pool) -> None:
    told: list[list[Any]] = [[], [], []]
    jobs = [job(pool, "x", "hi", each, streams=True) for each in told]
    work = Writing(pool, 4096)
    work.begin(deque(jobs))
    work.step()
    jobs[0].is_cancelled, jobs[1].deadline = True, 0.0
    work.step()
    assert isinstance(told[1][-1], Late)
    before = len(told[0])
    finish(work, deque())
    assert len(told[0]) == before
    assert "".join(piece.text for piece in told[2]) == answer(pool)[0].text


@pytest.mark.parametrize("setting", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"top_p": 5e-324}], ids=str)
def test_however_small_the_numbers_nobody_else_is_touched(setting: dict[str, float], pool: Pool) -> None:
    usual, likeliest = answer(pool)[0].text, answer(pool, name="y")[0].text
    told, cold = list[Any](), list[Any]()
    jobs = [job(pool, "x", "hi", told), job(pool, "y", "hi", cold, sample=True, seed=1, **setting)]
    finish(Writing(pool, 4096), deque(jobs))
    assert [told[0].text, cold[0].text] == [usual, likeliest]


@pytest.mark.parametrize("after", [0, 3])
def test_an_answer_whose_token_cannot_be_chosen_fails_with_its_job_alone(
    after: int, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = list[Any](), list[Any]()
    jobs = [job(pool, "x", "hi", good), job(pool, "y", "hi", bad, sample=True, n=2), job(pool, "x", "hi", good)]
    choose = _Answer.choose

    def chosen(self: _Answer, logits_V: torch.Tensor, likeliest: int) -> bool:
        if self.job is jobs[1] and self.number and len(self.ids) == after:
            raise RuntimeError("probability tensor contains nan")
        return choose(self, logits_V, likeliest)

    monkeypatch.setattr(_Answer, "choose", chosen)
    finish(Writing(pool, 4096), deque(jobs))
    assert [str(each) for each in bad] == ["probability tensor contains nan"]
    assert [piece.text for piece in good] == [answer(pool)[0].text] * 2
    assert not pool.is_in_use


def test_a_long_prompt_is_cut_without_a_word(
    pool: Pool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pool.ready("x").tokenizer.model_max_length = 100
    assert answer(pool, prompt="hi " * 100)[0].num_prompt == 88
    assert caplog.messages == []


def test_a_prompt_that_fails_fails_alone(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = list[Any](), list[Any]()
    work = Writing(pool, 4096)
    jobs = [job(pool, "x", "hi", good), job(pool, "y", "a prompt with which the model cannot cope", bad)]
    broken = Writing._start

    def start(self: Writing, new: list[Any]) -> None:
        if any(answer.job is jobs[1] for answer in new):
            raise RuntimeError("out of registers")
        broken(self, new)

    monkeypatch.setattr(Writing, "_start", start)
    finish(work, deque(jobs))
    assert isinstance(bad[0], RuntimeError)
    assert good[0].text == answer(pool)[0].text
