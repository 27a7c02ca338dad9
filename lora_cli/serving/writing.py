"""Prompts answered, those of all adapters and all requests together: one step writes a token of each running answer,
and requests join and leave between steps. Knows adapters and jobs; nothing of threads or HTTP.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_cli.engine.batches import by_length
from lora_cli.engine.generate import ends_of, generate, has_stop, padded, text_of
from lora_cli.errors import LoraError
from lora_cli.serving.cache import Rows, prefill
from lora_cli.serving.jobs import Job, Piece, Token, WriteJob
from lora_cli.serving.pool import Full, Pool, Ready
from lora_cli.serving.sampling import drawn, generator_of, ranked
from lora_cli.spec import DecodeSpec
from lora_cli.tasks import Classification, Query, build_task
from lora_cli.tasks import Rows as TaskRows
from lora_cli.terminal import Streamer

__all__ = ["Writing", "is_stepwise"]


@dataclass(eq=False)
class _Answer:
    """One answer that is being written."""

    job: WriteJob
    number: int
    ready: Ready
    prompt: list[int]
    ends: Sequence[int]
    generator: torch.Generator | None
    ids: list[int] = field(default_factory=list)
    told: list[Token] = field(default_factory=list)
    """Log probabilities that were not told yet."""

    def __post_init__(self) -> None:
        self._out = io.StringIO()
        self._streamer = Streamer(self.ready.tokenizer, self._out, stops=self.job.decode.stop)
        self._streamer.put(torch.tensor(self.prompt))
        self._sent = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt) + self.job.decode.max_new_tokens

    def choose(self, logits_V: Tensor, likeliest: int) -> bool:
        """Take the next token; whether the answer ends with it."""
        decode = self.job.decode
        token = likeliest if self.generator is None else drawn(logits_V, decode, self.generator)
        self.ids.append(token)
        is_end = token in self.ends
        if self.job.logprobs is not None and not is_end:
            logprob, top = ranked(logits_V, token, self.job.logprobs)
            named = tuple((self._text(other), value) for other, value in top)
            self.told.append(Token(self._text(token), logprob, named))
        if self.job.streams and not is_end:
            self._streamer.put(torch.tensor(token))
        stops = is_end or has_stop(self.ids, self.ready.tokenizer, decode.stop)
        finish = "stop" if stops else "length" if len(self.ids) == decode.max_new_tokens else None
        self._tell(finish)
        return finish is not None

    def _tell(self, finish: str | None) -> None:
        if not self.job.streams and finish is None:
            return
        if self.job.streams:
            if finish is not None:
                self._streamer.end()
            text = self._streamer.text[self._sent :]
            self._sent += len(text)
        else:
            text = self._text_of(len(self.ids))
        if finish == "stop" and self.ids[-1] not in self.ends:
            self._forget_what_is_cut()
        if text or finish:
            self.job.tell(Piece(self.number, text, tuple(self.told), finish, len(self.prompt), len(self.ids)))
            self.told = []

    def _forget_what_is_cut(self) -> None:
        """Tokens of the stop text are none of the answer's."""
        number, text = len(self.ids), self._text_of(len(self.ids))
        while self.told and self._text_of(number - 1).startswith(text):
            number -= 1
            self.told.pop()

    def _text_of(self, number: int) -> str:
        return text_of(self.ids[:number], self.ready.tokenizer, self.ends, self.job.decode.stop)

    def _text(self, token: int) -> str:
        return str(self.ready.tokenizer.decode([token], clean_up_tokenization_spaces=False))


@dataclass(frozen=True, eq=False)
class _Whole:
    """What one call of transformers' `generate` answers: all answers of a job, which are the same; of one that draws,
    one."""

    job: WriteJob
    numbers: range
    """Of the answers."""
    ready: Ready
    query: Query

    @property
    def num_tokens(self) -> int:
        """Tokens that it may come to."""
        return self.query.num_tokens + self.job.decode.max_new_tokens

    def tell(self, text: str, ids: list[int], ends: Sequence[int]) -> None:
        """Tell the answer."""
        stops = ids[-1] in ends or has_stop(ids, self.ready.tokenizer, self.job.decode.stop)
        for number in self.numbers:
            finish = "stop" if stops else "length"
            self.job.tell(Piece(number, text, (), finish, self.query.num_tokens, len(ids)))


class Writing:
    """See `jobs.Work`. What runs at once may come to `batch_tokens` tokens, or is one job.

    A decoder goes token by token. An encoder-decoder, and a decoder with beams or penalties, answers a batch of like
    jobs at once, and others wait meanwhile.
    """

    def __init__(self, pool: Pool, batch_tokens: int) -> None:
        self._pool, self._budget = pool, batch_tokens
        self._running: list[_Answer] = []
        self._rows: Rows | None = None
        """What the model keeps of `_running`."""
        self._new: list[_Answer] = []
        self._whole: list[_Whole] = []

    @property
    def is_idle(self) -> bool:
        """Whether nothing is begun."""
        return not (self._running or self._new or self._whole)

    @property
    def num_tokens(self) -> int:
        """Tokens that what is begun may come to."""
        # Copies: other threads ask, for the metrics.
        answers = sum(answer.num_tokens for answer in (*self._running, *self._new))
        return answers + sum(each.num_tokens for each in tuple(self._whole))

    def begin(self, waiting: deque[Job]) -> None:
        """Take jobs from the left, as many as there is room for."""
        while waiting:
            job = waiting[0]
            assert isinstance(job, WriteJob)
            if job.is_over:
                job.give_up()
            else:
                try:
                    if not self._begin(job):
                        return
                except Full as error:
                    if not self.is_idle:
                        return
                    job.tell(error)
                except Exception as error:
                    job.tell(error)
            waiting.popleft()

    def step(self) -> bool:
        """Read the new prompts, and write one token of each running answer."""
        self._leave([answer for answer in (*self._running, *self._new) if answer.job.is_over], tell=True)
        self._leave_whole([each for each in self._whole if each.job.is_over], tell=True)
        if self._whole:
            self._answer_whole()
        if self._new:
            self._join()
        if self._running:
            try:
                tokens = [answer.ids[-1] for answer in self._running]
                assert self._rows is not None
                with torch.inference_mode(), self._pool.device.autocast(), self._named(self._running):
                    logits_NV = self._rows.step(self._pool.bank.model, tokens)
            except Exception as error:
                self._fail(self._running, error)
                return True
            self._choose(self._running, logits_NV)
        return True

    def end(self, error: LoraError) -> None:
        """Break off what is begun."""
        self._fail([*self._running, *self._new], error)
        for job in _jobs(self._whole):
            job.tell(error)
        self._leave_whole(self._whole)

    def _begin(self, job: WriteJob) -> bool:
        """Whether there was room for it."""
        ready = self._pool.ready(job.name)
        query = _query(ready, job)
        size = (query.num_tokens + job.decode.max_new_tokens) * job.n
        if not self.is_idle and self.num_tokens + size > self._budget:
            return False
        if not is_stepwise(self._pool, job.decode):
            alike = [range(n, n + 1) for n in range(job.n)] if job.decode.sample else [range(job.n)]
            for numbers in alike:
                self._pool.hold(ready)
                self._whole.append(_Whole(job, numbers, ready, query))
            return True
        ends = ends_of(self._pool.bank.model, ready.tokenizer, job.decode.stop)
        for number in range(job.n):
            self._pool.hold(ready)
            generator = generator_of(job.seed + number) if job.decode.sample else None
            self._new.append(_Answer(job, number, ready, query.input_ids, ends, generator))
        return True

    def _join(self) -> None:
        """The new prompts in one forward pass; if it fails, each is tried alone, so that the one at fault does."""
        new, self._new = self._new, []
        try:
            self._start(new)
        except Exception as error:
            for answer in new:
                try:
                    if len(new) == 1:
                        raise error
                    self._start([answer])
                except Exception as reason:
                    self._fail([answer], reason)

    def _start(self, new: list[_Answer]) -> None:
        pad = int(self._pool.base.tokenizer.pad_token_id)
        batch = self._pool.device.move(padded([answer.prompt for answer in new], pad, left=True))
        with torch.inference_mode(), self._pool.device.autocast(), self._named(new):
            rows, logits_NV = prefill(self._pool.bank.model, batch)
            if self._rows is None:
                self._rows = rows
            else:
                self._rows.join(rows)
        self._running += new
        self._choose(new, logits_NV)

    def _choose(self, answers: Sequence[_Answer], logits_NV: Tensor) -> None:
        likeliest = logits_NV.argmax(-1).tolist()
        pairs = list(zip(answers, logits_NV, likeliest, strict=True))
        ended, failed = list[_Answer](), dict[WriteJob, Exception]()
        for answer, logits_V, best in pairs:
            try:
                if answer.choose(logits_V, best):
                    ended.append(answer)
            except Exception as error:
                # Such as logits of one adapter that are no numbers: with it goes its job, and nobody else.
                failed[answer.job] = error
        self._leave([answer for answer in ended if answer.job not in failed])
        for job, reason in failed.items():
            self._fail([answer for answer in self._running if answer.job is job], reason)

    def _leave(self, answers: Sequence[_Answer], *, tell: bool = False) -> None:
        """These are done."""
        if not answers:
            return
        gone = set(answers)
        kept = [place for place, answer in enumerate(self._running) if answer not in gone]
        if len(kept) < len(self._running):
            assert self._rows is not None
            self._running = [self._running[place] for place in kept]
            if kept:
                self._rows.keep(kept)
            else:
                self._rows = None
        self._new = [answer for answer in self._new if answer not in gone]
        for answer in answers:
            self._pool.release(answer.ready)
            if tell:
                answer.job.give_up()

    def _fail(self, answers: Sequence[_Answer], error: Exception) -> None:
        for job in _jobs(answers):
            job.tell(error)
        self._leave(list(answers))

    def _named(self, answers: Sequence[_Answer]) -> Any:
        return self._pool.bank.rows([answer.ready.key for answer in answers])

    def _answer_whole(self) -> None:
        """Jobs that are decoded alike, in one call of transformers' `generate`; what is drawn, one by one."""
        first = self._whole[0]
        job, tokenizer = first.job, first.ready.tokenizer
        alike = [each for each in self._whole if each.job.decode == job.decode and each.ready.tokenizer is tokenizer]
        chosen = [first] if job.decode.sample else alike
        try:
            found = self._generated(chosen)
        except Exception as error:
            failed = _jobs(chosen)
            chosen = [each for each in self._whole if each.job in failed]
            for each in failed:
                each.tell(error)
        else:
            ends = ends_of(self._pool.bank.model, tokenizer, job.decode.stop)
            for whole, (text, ids) in zip(chosen, found, strict=True):
                whole.tell(text, ids, ends)
        self._leave_whole(chosen)

    def _generated(self, chosen: Sequence[_Whole]) -> list[tuple[str, list[int]]]:
        """(answer, its tokens) of each."""
        first, queries = chosen[0], [each.query for each in chosen]
        (order,) = by_length([query.num_tokens for query in queries], len(queries))
        ids: dict[int, list[int]] = {}
        with self._pool.bank.rows([chosen[index].ready.key for index in order]):
            found = generate(
                self._pool.bank.model,
                queries,
                first.job.decode,
                tokenizer=first.ready.tokenizer,
                device=self._pool.device,
                batch_size=len(queries),
                seed=first.job.seed + first.numbers[0],
                wrote=ids.__setitem__,
            )
            texts = dict(found)
        return [(texts[index], ids[index]) for index in range(len(chosen))]

    def _leave_whole(self, gone: Sequence[_Whole], *, tell: bool = False) -> None:
        """These are done."""
        self._whole = [each for each in self._whole if each not in gone]
        for each in gone:
            self._pool.release(each.ready)
        if tell:
            for job in _jobs(gone):
                job.give_up()


def _jobs(answers: Iterable[_Answer | _Whole]) -> list[WriteJob]:
    """Those that the answers are of, each once."""
    return list(dict.fromkeys(each.job for each in answers))


def is_stepwise(pool: Pool, decode: DecodeSpec) -> bool:
    """Whether the answer is written token by token, so that it can be told as it comes."""
    plain = (decode.num_beams, decode.no_repeat_ngram, decode.repetition_penalty) == (1, 0, 1.0)
    return plain and pool.base.decoder_start is None


def _query(ready: Ready, job: WriteJob) -> Query:
    """The prompt as the run's own task makes it, with room for the answer that is wanted.

    Raises:
        UserError: the row cannot be put to the model, or there is no room.
    """
    own = ready.entry.task
    assert not isinstance(own, Classification)
    task = build_task(replace(own.spec, decode=job.decode))
    assert not isinstance(task, Classification)
    (query,), _ = task.encode_queries(TaskRows([job.row], source="prompt", separator="", numbers=[""]), ready)
    return query
