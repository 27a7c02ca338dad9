"""lora merge: a saved run in, a plain transformers folder out, and a certificate of what merging changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.disk import atomic_folder
from lora_cli.errors import ConfigError
from lora_cli.runs.directory import write_json
from lora_cli.screen import Screen
from lora_cli.spec import MergeRun

if TYPE_CHECKING:
    import torch

    from lora_cli.saved import Saved

__all__ = ["run"]


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
    from lora_cli.certificate import decisions, in_words
    from lora_cli.merged import DTYPES, merge_all, save_merged
    from lora_cli.nn import quantized_size
    from lora_cli.saved import open_saved
    from lora_cli.tokenizer import save_tokenizer

    screen = Screen()
    saved = open_saved(spec)
    screen.fact("run", str(saved.path))
    examples = saved.first_examples(spec.rows, spec.task.split)
    before = list(decisions(saved.model, saved.task, examples, device=saved.device))
    quantized = quantized_size(saved.model)
    changes = merge_all(saved.model)
    base = _base(quantized.kind if quantized else "none", saved.quantization)
    if base:
        screen.fact("base", base)
    screen.fact("merged", f"{len(changes)} layers, largest change of a weight {max(changes.values(), default=0.0):.3g}")
    certificate = {}
    if examples:
        certificate = {dtype: _rounded(saved, examples, before, dtype) for dtype in DTYPES}
    for dtype, found in certificate.items():
        screen.fact(dtype, in_words(found))
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


def _rounded(saved: Saved, examples: Sequence[Any], before: Sequence[torch.Tensor], dtype: str) -> dict[str, float]:
    """How far the merged model, its weights rounded to `dtype` and computed with as before, is from the adapted one."""
    from lora_cli.certificate import decisions, difference
    from lora_cli.merged import rounded

    with rounded(saved.model, dtype):
        after = list(decisions(saved.model, saved.task, examples, device=saved.device))
    return difference(before, after)
