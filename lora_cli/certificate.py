"""How far a changed model is from the one it was made of, on real rows. Knows tasks and scoring; nothing of files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lora_cli.engine.evaluate import predict
from lora_cli.tasks import Task

if TYPE_CHECKING:
    import torch

    from lora_cli.engine.device import Device

__all__ = ["decisions", "difference", "in_words"]

_BATCH = 8
"""Rows compared at a time: of a model that writes, all logits of all tokens are."""


def decisions(
    model: torch.nn.Module, task: Task, examples: Sequence[Any], *, device: Device, batch_size: int = _BATCH
) -> Iterator[torch.Tensor]:
    """Logits of what is predicted, batch by batch: a row for each label, or for each token to be written."""
    for _, logits, batch in predict(model, task, examples, device=device, batch_size=batch_size):
        yield task.decisions(logits, batch)


def difference(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> dict[str, float]:
    """The largest and the mean difference of logits, and of how many predictions how many change."""
    gaps = [(new - old).abs() for new, old in zip(after, before, strict=True)]
    changed = sum(
        0 if old.shape[-1] == 1 else int((new.argmax(-1) != old.argmax(-1)).sum())
        for new, old in zip(after, before, strict=True)
    )
    return {
        "largest_difference": max(float(gap.max()) for gap in gaps),
        "mean_difference": sum(float(gap.sum()) for gap in gaps) / sum(gap.numel() for gap in gaps),
        "changed": changed,
        "predictions": sum(len(gap) for gap in gaps),
    }


def in_words(found: dict[str, float]) -> str:
    """A difference on one line."""
    return (
        f"{found['changed']} of {found['predictions']:,} predictions change; logits differ by "
        f"{found['largest_difference']:.1e} at most, {found['mean_difference']:.1e} on average"
    )
