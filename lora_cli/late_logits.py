"""Logits that are computed when their loss is, a few tokens at a time: those of a batch never exist as a whole. Knows
where a model keeps the layer that makes them; nothing of tasks, adapters or training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_cli.families import FAMILIES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["LateLogits", "can_wait", "make_logits_late", "takes_late", "tokens_at_once"]

_WHOLE = 1 << 25
"""Logits of a batch up to which they are computed at once with train.logits_chunk=auto: 128 MiB in fp32."""


@dataclass(frozen=True)
class LateLogits:
    """Stands for `head(hidden)`, with gradients. Shapes: hidden (..., d), logits (..., vocabulary)."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    at_once: int
    """Tokens whose logits exist at the same time."""

    @property
    def ndim(self) -> int:
        """Dimensions of the logits."""
        return self.hidden.ndim

    def __getitem__(self, chosen: Any) -> LateLogits:
        """The logits of some tokens."""
        return replace(self, hidden=self.hidden[chosen])

    def cross_entropy(self, targets: Tensor, smoothing: float) -> Tensor:
        """Its sum over logits (T, vocabulary) for targets (T,), in float32. They are computed again in the backward
        pass, so that there too only those of `at_once` tokens exist.
        """
        import torch
        from torch.nn import functional
        from torch.utils.checkpoint import checkpoint

        def of(hidden: Tensor, wanted: Tensor) -> Tensor:
            logits = self.head(hidden).float()
            return functional.cross_entropy(logits, wanted, reduction="sum", label_smoothing=smoothing)

        parts = zip(torch.split(self.hidden, self.at_once), torch.split(targets, self.at_once), strict=True)
        if not self.hidden.requires_grad:
            sums = [of(*part) for part in parts]
        else:
            sums = [checkpoint(of, *part, use_reentrant=False) for part in parts]
        return torch.stack(sums).sum()


def tokens_at_once(setting: str, vocabulary: int) -> int:
    """Tokens whose logits exist at the same time with this train.logits_chunk, "auto" or a number."""
    return max(1, _WHOLE // vocabulary) if setting == "auto" else int(setting)


def can_wait(model: Any) -> bool:
    """Whether what `model` writes is known to be read off its last layer alone, or with a bias besides as in BART."""
    is_known = FAMILIES.get(model.config.model_type) is not None and model.get_output_embeddings() is not None
    return is_known and not getattr(model.config, "final_logit_softcapping", None)


def make_logits_late(model: torch.nn.Module, setting: str) -> None:
    """Let `model`, which `can_wait`, return LateLogits where it is called with late=True, and there are more than
    would be at once.
    """
    late = _Late(setting)
    model.register_forward_pre_hook(late.begin, with_kwargs=True)
    # Called whatever happens: a model that others share must have its layer back.
    model.register_forward_hook(late.end, always_call=True)
    model.takes_late = True  # type: ignore[assignment]


def takes_late(model: torch.nn.Module) -> bool:
    """Whether `model` can be called with late=True."""
    return getattr(model, "takes_late", False) is True


class _Late:
    """What is done to a model for the time of a call."""

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._at_once: int | None = None
        """None: this call is as any other."""
        self._bias: Tensor | None = None
        self._own: Callable[..., Any] | None = None
        """The output layer's `forward` where it has another than its kind."""

    def begin(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Let the output layer return what it is given."""
        if not kwargs.pop("late", False):
            return args, kwargs
        head = model.get_output_embeddings()
        at_once = tokens_at_once(self._setting, model.config.vocab_size)
        if _num_logits(kwargs) > at_once:
            self._at_once, self._own = at_once, head.__dict__.get("forward")
            head.forward = _unchanged
            self._bias = getattr(model, "final_logits_bias", None)
            if self._bias is not None:
                model.final_logits_bias = self._bias.new_zeros(1)
        return args, kwargs

    def end(self, model: Any, args: Any, output: Any) -> Any:
        """Give it back, and let `output` say how the logits are to be had."""
        if self._at_once is None:
            return None
        head, at_once, bias = model.get_output_embeddings(), self._at_once, self._bias
        del head.forward
        if self._own is not None:
            head.forward = self._own
        self._at_once = self._bias = self._own = None
        if bias is not None:
            model.final_logits_bias = bias
        if output is not None:
            output.logits = LateLogits(output.logits, head if bias is None else lambda x: head(x) + bias, at_once)
        return output


def _num_logits(kwargs: Mapping[str, Any]) -> int:
    """Tokens that a call computes logits for."""
    kept = kwargs.get("logits_to_keep")
    if kept is not None:
        return len(kept)
    return int(kwargs.get("decoder_input_ids", kwargs["input_ids"]).numel())


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
