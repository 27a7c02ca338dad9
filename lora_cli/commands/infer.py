"""lora infer: texts in, one JSON line each out, in the order of the input; or a prompt in, its answer out as it comes."""

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

from lora_cli.errors import ConfigError, DataError
from lora_cli.screen import Screen
from lora_cli.spec import InferRun
from lora_cli.tasks import Classification
from lora_cli.tasks.rows import Rows, stream
from lora_cli.tasks.writing import check_format, write_rows

if TYPE_CHECKING:
    from lora_cli.saved import Saved

__all__ = ["run"]

Row = tuple[str, dict[str, Any]]
"""(where it stands, its cells)"""
_BATCHES_AHEAD = 16
"""Batches read at a time from a file, so that rows of like length can be put together."""


def run(spec: InferRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Predict every text of `spec` and write the answers to `spec.output`, or to standard output as they come.

    Raises:
        UserError: the run, the input or the output cannot be used.
    """
    _check_files(spec)
    from lora_cli.saved import open_saved

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # JSON lines are UTF-8, whatever the terminal is
    saved = open_saved(spec)
    if spec.prompt is not None:
        _stream(saved, spec)
        return
    rows = _rows(spec, saved)
    if spec.input == "-":
        chunks = _as_they_come(rows, saved.batch_size)
    else:
        chunks = iter(lambda: list(itertools.islice(rows, _BATCHES_AHEAD * saved.batch_size)), [])
    answers = itertools.chain.from_iterable(_answers(saved, chunk, spec.seed) for chunk in chunks)
    if spec.output is not None:
        write_rows(Path(spec.output), answers)
        return
    for answer in answers:
        sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def _check_files(spec: InferRun) -> None:
    """Refuse files that cannot be read or written before a model is loaded."""
    if spec.input not in (None, "-") and not Path(str(spec.input)).exists():
        raise DataError(spec.input, "no such file")
    if spec.output is not None:
        check_format(Path(spec.output))
        if spec.input is not None and Path(spec.output).resolve() == Path(spec.input).resolve():
            raise ConfigError("output", spec.output, "is the input, which would be lost")


def _rows(spec: InferRun, saved: Saved) -> Iterator[Row]:
    columns = saved.task.columns
    if spec.input is not None:
        yield from stream(spec.input, column=columns[0])
        return
    if not isinstance(saved.task, Classification):
        yield "text", saved.task.row_of(str(spec.text))
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


def _stream(saved: Saved, spec: InferRun) -> None:
    """Write the answer to a prompt as plain text, word by word where there is no beam search."""
    from lora_cli.engine.generate import generate
    from lora_cli.terminal import Streamer

    task = saved.task
    if isinstance(task, Classification):
        raise ConfigError("prompt", spec.prompt, f"{task.spec.name} has labels, and writes nothing: text=...")
    rows = Rows([task.row_of(str(spec.prompt))], source="prompt", separator="", numbers=[""])
    queries, num_cut = task.encode_queries(rows, saved)
    if num_cut:
        Screen().warning(f"the prompt is cut at {queries[0].num_tokens} tokens")
    streamer = Streamer(saved.tokenizer, sys.stdout) if task.spec.decode.num_beams == 1 else None
    found = generate(
        saved.model,
        queries,
        task.spec.decode,
        tokenizer=saved.tokenizer,
        device=saved.device,
        batch_size=1,
        seed=spec.seed,
        streamer=streamer,
    )
    for _, text in found:
        sys.stdout.write("\n" if streamer else f"{printable_text(text)}\n")


def _answers(saved: Saved, chunk: Sequence[Row], seed: int) -> Iterator[dict[str, Any]]:
    """The row's text columns and the prediction of each, in order; inside the chunk batches are sorted by length."""
    found = Rows([row for _, row in chunk], source="", separator="", numbers=[where for where, _ in chunk])
    answers = _labelled(saved, found) if isinstance(saved.task, Classification) else _written(saved, found, seed)
    for index, (_, row) in enumerate(chunk):
        yield {column: row[column] for column in saved.task.columns if column in row} | answers[index]


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
