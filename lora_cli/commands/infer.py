"""lora infer: texts in, one JSON line each out, in order; or a prompt in, and its answer out as it comes."""

from __future__ import annotations

import io
import itertools
import json
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.errors import ConfigError, DataError, printable
from lora_cli.screen import Screen
from lora_cli.spec import ClassificationSpec, InferRun, TextSpec
from lora_cli.tasks import Classification, Query, Rows
from lora_cli.tasks.chat import Chat
from lora_cli.tasks.rows import stream
from lora_cli.tasks.writing import check_format, write_rows
from lora_cli.terminal import Streamer

if TYPE_CHECKING:
    from lora_cli.saved import Saved

__all__ = ["run", "write_answer"]

Row = tuple[str, dict[str, Any]]
"""(where it stands, its cells)"""
_BATCHES_AHEAD = 16
"""Batches read at a time from a file, so that rows of like length can be put together. Where text is written, a batch
takes long, and its answers do not wait for those of the next one."""


def run(spec: InferRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Predict every text of `spec` and write the answers to `spec.output`, or to standard output as they come.

    Raises:
        UserError: the run, the input or the output cannot be used.
    """
    _check(spec)
    from lora_cli.saved import open_saved

    if isinstance(sys.stdout, io.TextIOWrapper):
        # JSON lines are UTF-8, whatever the terminal is; half of a character pair stays as JSON writes it.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    saved = open_saved(spec)
    if spec.prompt is not None:
        _answer_prompt(saved, spec)
        return
    chunks = enumerate(_chunks(spec, saved))
    answers = itertools.chain.from_iterable(_answers(saved, chunk, spec.seed + number) for number, chunk in chunks)
    if spec.output is not None:
        write_rows(Path(spec.output), answers)
        return
    for answer in answers:
        sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def _check(spec: InferRun) -> None:
    """Refuse what cannot be answered, read or written before a model is loaded."""
    if spec.prompt is not None and isinstance(spec.task, ClassificationSpec):
        raise ConfigError("prompt", spec.prompt, f"{printable(spec.task.name, 40)} writes no text; give it as text=")
    if spec.text_pair is not None and not isinstance(spec.task, ClassificationSpec):
        raise ConfigError("text_pair", spec.text_pair, f"{printable(spec.task.name, 40)} reads one text")
    if spec.input not in (None, "-") and not Path(str(spec.input)).exists():
        raise DataError(spec.input, "no such file")
    if spec.output is not None:
        check_format(Path(spec.output))
        if spec.input is not None and Path(spec.output).resolve() == Path(spec.input).resolve():
            raise ConfigError("output", spec.output, "is the input, which would be lost")


def _chunks(spec: InferRun, saved: Saved) -> Iterator[list[Row]]:
    """The rows, as many at a time as are answered together."""
    rows, most = _rows(spec, saved), saved.batch_size
    if spec.input == "-":
        # What is drawn depends on who is in the batch, which must not depend on how fast the lines come in.
        return _as_they_come(rows, 1 if isinstance(spec.task, TextSpec) and spec.task.decode.sample else most)
    if isinstance(spec.task, ClassificationSpec):
        most *= _BATCHES_AHEAD
    return iter(lambda: list(itertools.islice(rows, most)), [])


def _rows(spec: InferRun, saved: Saved) -> Iterator[Row]:
    task, columns = saved.task, saved.task.columns
    if spec.input is not None:
        for where, row in stream(spec.input, column=columns[0]):
            # A line of text is the whole of a conversation.
            if isinstance(task, Chat) and isinstance(text := row.get(columns[0]), str):
                row = {**row, **task.row_of(text)}
            yield where, row
        return
    if not isinstance(task, Classification):
        yield "text", task.row_of(str(spec.text))
        return
    texts = [text for text in (spec.text, spec.text_pair) if text is not None]
    if len(texts) != len(columns):
        wanted = f"this task reads {', '.join(columns)}"
        raise ConfigError(
            "text", spec.text, f"{wanted}: {'give text and text_pair' if len(columns) == 2 else 'use input=FILE'}"
        )
    yield "text", dict(zip(columns, texts, strict=True))


def _as_they_come(rows: Iterator[Row], most: int) -> Iterator[list[Row]]:
    """Chunks of what standard input holds by now: a slow writer gets its answers at once, a fast one full batches."""
    waiting: queue.Queue[Row | BaseException | None] = queue.Queue(maxsize=4 * most)

    def read() -> None:
        try:
            for row in rows:
                waiting.put(row)
            waiting.put(None)
        except BaseException as error:
            waiting.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        items = [waiting.get()]
        while len(items) < most and not waiting.empty():
            items.append(waiting.get())
        if chunk := [item for item in items if isinstance(item, tuple)]:
            yield chunk
        if isinstance(items[-1], BaseException):
            raise items[-1]
        if items[-1] is None:
            return


def write_answer(saved: Saved, query: Query, *, streamer: Streamer, seed: int) -> None:
    """Give `streamer` the answer to one prompt: as it comes, or at once where beams may still change its beginning."""
    from lora_cli.engine.generate import generate

    assert isinstance(saved.task.spec, TextSpec)
    decode = saved.task.spec.decode
    streams = decode.num_beams == 1
    found = generate(
        saved.model,
        [query],
        decode,
        tokenizer=saved.tokenizer,
        device=saved.device,
        batch_size=1,
        seed=seed,
        streamer=streamer if streams else None,
    )
    for _, text in found:
        if not streams:
            streamer.write(text)


def _answer_prompt(saved: Saved, spec: InferRun) -> None:
    """Write the answer to `spec.prompt` to standard output as plain text."""
    task = saved.task
    assert not isinstance(task, Classification)
    rows = Rows([task.row_of(str(spec.prompt))], source="prompt", separator="", numbers=[""])
    (query,), num_cut = task.encode_queries(rows, saved)
    if num_cut:
        Screen().warning(f"the prompt is cut to {query.num_tokens:,} tokens")
    streamer = Streamer(saved.tokenizer, sys.stdout, stops=task.spec.decode.stop)
    try:
        write_answer(saved, query, streamer=streamer, seed=spec.seed)
    finally:  # an error, or Ctrl-C, gets a line of its own
        sys.stdout.write("\n")
        sys.stdout.flush()


def _answers(saved: Saved, chunk: Sequence[Row], seed: int) -> Iterator[dict[str, Any]]:
    """The row's text columns and the prediction of each, in order; inside the chunk batches are sorted by length."""
    found = Rows([row for _, row in chunk], source="", separator="", numbers=[where for where, _ in chunk])
    answers = _labelled(saved, found) if isinstance(saved.task, Classification) else _written(saved, found, seed)
    for index, (_, row) in enumerate(chunk):
        yield {column: row.get(column) for column in saved.task.columns} | answers[index]


def _labelled(saved: Saved, rows: Rows) -> dict[int, dict[str, Any]]:
    from lora_cli.engine.evaluate import predict

    task = saved.task
    assert isinstance(task, Classification)
    encoded = task.encode_texts(rows, saved)
    if encoded.num_truncated or encoded.num_empty:
        Screen().warning(f"{encoded.num_truncated:,} texts cut, {encoded.num_empty:,} empty")
    answers: dict[int, dict[str, Any]] = {}
    batches = predict(saved.model, task, encoded.examples, device=saved.device, batch_size=saved.batch_size)
    for indices, logits, _ in batches:
        answers.update(zip(indices, map(_rounded, task.decode(logits)), strict=True))
    return answers


def _written(saved: Saved, rows: Rows, seed: int) -> dict[int, dict[str, Any]]:
    from lora_cli.engine.generate import generate

    task = saved.task
    assert not isinstance(task, Classification)
    queries, num_cut = task.encode_queries(rows, saved)
    if num_cut:
        Screen().warning(f"{num_cut:,} prompts cut")
    found = generate(
        saved.model,
        queries,
        task.spec.decode,
        tokenizer=saved.tokenizer,
        device=saved.device,
        batch_size=saved.batch_size,
        seed=seed,
    )
    return {index: {"prediction": text} for index, text in found}


def _rounded(answer: dict[str, Any]) -> dict[str, Any]:
    """Probabilities to six digits: more is noise, and hard to read."""
    found = answer.get("probabilities")
    return answer if found is None else answer | {"probabilities": {name: round(p, 6) for name, p in found.items()}}
