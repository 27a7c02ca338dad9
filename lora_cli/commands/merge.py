"""lora merge: a saved run in, a plain transformers folder out, and a certificate of what merging changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.disk import atomic_folder
from lora_cli.errors import ConfigError
from lora_cli.runs.directory import write_json
from lora_cli.screen import Screen
from lora_cli.spec import MergeRun
from lora_cli.tasks import load_rows

if TYPE_CHECKING:
    import torch

    from lora_cli.saved import Saved

__all__ = ["run"]

_BATCH = 8
"""Rows compared at a time: of a model that writes, all logits of all tokens are."""


def run(spec: MergeRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Write the base model with the adapter merged into its weights to `spec.output`.

    The certificate compares logits of real rows before and after, for every dtype that the weights might be stored in.

    Raises:
        UserError: the run, its data or the output cannot be used.
        AdapterError: a merged weight is not finite.
    """
    output = Path(spec.output)
    if output.exists():
        raise ConfigError("output", spec.output, "exists already; give a new folder")
    from lora_cli.merged import DTYPES, save_merged
    from lora_cli.nn import dequantize, merge, quantized_size, remove
    from lora_cli.saved import open_saved
    from lora_cli.tokenizer import save_tokenizer

    screen = Screen()
    saved = open_saved(spec)
    screen.fact("run", str(saved.path))
    examples = _examples(spec, saved)
    before = list(_compared(saved, examples))
    quantized = quantized_size(saved.model)
    changes = merge(saved.model)
    remove(saved.model)
    if quantized:
        dequantize(saved.model)
    base = _base(quantized.kind if quantized else "none", saved.quantization)
    if base:
        screen.fact("base", base)
    screen.fact("merged", f"{len(changes)} layers, largest change of a weight {max(changes.values(), default=0.0):.3g}")
    certificate = {}
    if examples:
        certificate = {dtype: _certificate(saved, examples, before, dtype) for dtype in DTYPES}
    for dtype, found in certificate.items():
        screen.fact(
            dtype,
            f"{found['changed']} of {found['predictions']:,} predictions change; logits differ by "
            f"{found['largest_difference']:.1e} at most, {found['mean_difference']:.1e} on average",
        )
    with atomic_folder(output) as temporary:
        save_merged(saved.model, temporary, dtype=spec.dtype, shard_size=spec.shard_size)
        save_tokenizer(saved.tokenizer, temporary)
        facts = {"run": str(saved.path), "split": spec.task.split, "rows": len(examples), "dtypes": certificate}
        facts["base"] = base or "as it was loaded"
        write_json(temporary / "certificate.json", facts)
    screen.line(f"{output}\nstored as {spec.dtype}; transformers loads it like any model, without an adapter")


def _base(kept: str, trained: str) -> str:
    """Into which base the adapter is merged, if there are two that it could be; kept as `kept`, `trained` on."""
    if kept != "none":
        return f"dequantised from {kept}; model.quantization=none merges into the weights as they were loaded"
    return "" if trained == "none" else f"as it was loaded; the adapter was trained on it in {trained}"


def _examples(spec: MergeRun, saved: Saved) -> Sequence[Any]:
    """The rows that the certificate is about: the first ones of the task's split."""
    if not spec.rows:
        return []
    rows = load_rows(saved.task, [spec.task.split], seed=saved.data_seed)[spec.task.split]
    return saved.task.encode(rows.select(range(min(spec.rows, len(rows)))), saved).examples


def _compared(saved: Saved, examples: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Logits of what is predicted, batch by batch: a row for each label, or for each token to be written."""
    from lora_cli.engine.evaluate import predict

    for _, logits, batch in predict(saved.model, saved.task, examples, device=saved.device, batch_size=_BATCH):
        yield saved.task.decisions(logits, batch)


def _certificate(saved: Saved, examples: Sequence[Any], before: Sequence[torch.Tensor], dtype: str) -> dict[str, float]:
    """How far the merged model, its weights rounded to `dtype` and computed with as before, is from the adapted one."""
    from lora_cli.merged import rounded

    with rounded(saved.model, dtype):
        after = list(_compared(saved, examples))
    gaps = [(new - old).abs() for new, old in zip(after, before, strict=True)]
    decisions = sum(len(gap) for gap in gaps)
    changed = sum(
        0 if old.shape[-1] == 1 else int((new.argmax(-1) != old.argmax(-1)).sum())
        for new, old in zip(after, before, strict=True)
    )
    return {
        "largest_difference": max(float(gap.max()) for gap in gaps),
        "mean_difference": sum(float(gap.sum()) for gap in gaps) / sum(gap.numel() for gap in gaps),
        "changed": changed,
        "predictions": decisions,
    }
