"""lora eval: a saved run and a split in, metrics and predictions out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import ConfigError
from lora_cli.runs.directory import write_json, write_jsonl
from lora_cli.screen import Screen
from lora_cli.spec import EvalRun
from lora_cli.tasks import Encoded, Scorer, TextScorer, load_rows

if TYPE_CHECKING:
    from lora_cli.saved import Saved

__all__ = ["run", "score"]


def run(spec: EvalRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> float | None:
    """Score `spec.task.split` with the saved run; returns the primary metric.

    metrics.json and predictions.jsonl go to `spec.output`, else to eval/<split> in the run, for rank 4 eval/<split>-r4.

    Raises:
        UserError: the run, the data or the base model do not fit together.
    """
    from lora_cli.saved import open_saved

    if spec.output is not None and Path(spec.output).is_file():
        raise ConfigError("output", spec.output, "is a file; give a folder")
    screen, split = Screen(), spec.task.split
    saved = open_saved(spec)
    rows = load_rows(saved.task, [split], seed=saved.data_seed)[split]
    encoded = saved.task.encode(rows, saved)
    screen.fact("run", str(saved.path))
    screen.fact(split, f"{len(rows):,} rows of {spec.task.name}")
    if spec.lora.r is not None:
        screen.fact("rank", str(spec.lora.r))
    screen.fact("device", str(saved.device))
    seen = saved.data.get(split, {})
    if seen and seen["fingerprint"] != rows.fingerprint:
        screen.warning(f"not the {seen['rows']:,} {split} rows that the run was scored on: limits or data differ")
    if encoded.num_truncated or encoded.num_empty:
        screen.fact("texts", f"{encoded.num_truncated:,} cut, {encoded.num_empty:,} empty")
    scorer = score(saved, encoded, progress=screen.counter("answers"))
    screen.close()
    metrics = scorer.result()
    for name, reason in scorer.undefined.items():
        screen.warning(f"{name} is undefined: {reason}")
    name = split if spec.lora.r is None else f"{split}-r{spec.lora.r}"
    output = Path(spec.output) if spec.output else directory or (saved.folder and saved.path / "eval" / name)
    if output:
        write_json(
            output / "metrics.json",
            {"split": split, "r": spec.lora.r, "rows": len(rows), "metrics": metrics, "confusion": scorer.confusion},
        )
        write_jsonl(output / "predictions.jsonl", scorer.predictions)
    screen.results({split: metrics})
    return metrics[spec.task.metrics[0]]


def score(
    saved: Saved, encoded: Encoded, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Scorer | TextScorer:
    """A saved model on an encoded split, scored as its run was."""
    from lora_cli.experiment import score_split

    return score_split(
        saved.model,
        saved.task,
        encoded,
        tokenizer=saved.tokenizer,
        device=saved.device,
        batch_size=saved.batch_size,
        progress=progress,
    )
