"""The adapter: the keys of lora.*."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lora_cli.errors import ConfigError
from lora_cli.spec.checks import at_least, check_seed, one_of, positive, share
from lora_cli.spec.names import BIASES, INITS, MAX_RANK, MAX_SCALING, SCALINGS, VARIANTS

__all__ = ["AdaLoraSpec", "LoraSpec"]


@dataclass(kw_only=True)
class AdaLoraSpec:
    """How AdaLoRA takes ranks away while it trains (Zhang et al. 2023, arXiv:2303.10512)."""

    target_r: int = 8
    """Ranks a layer has in the end, on average; `lora.r` is what each begins with."""
    start: float = 0.1
    """Share of all steps before the first rank goes."""
    end: float = 0.3
    """Share of all steps after the last one went."""
    interval: int = 1
    """Steps between two decisions."""
    beta1: float = 0.85
    """Smoothing of a parameter's sensitivity."""
    beta2: float = 0.85
    """Smoothing of its uncertainty."""
    orthogonality: float = 0.1
    """Weight of the penalty that keeps A and B orthogonal."""

    def __post_init__(self) -> None:
        for name in ("target_r", "interval"):
            at_least(f"lora.adalora.{name}", getattr(self, name), 1)
        for name in ("start", "end", "beta1", "beta2"):
            share(f"lora.adalora.{name}", getattr(self, name))
        if not 0 <= self.orthogonality < math.inf:
            raise ConfigError("lora.adalora.orthogonality", self.orthogonality, "a number from 0 up")
        if self.start + self.end >= 1:
            raise ConfigError("lora.adalora.end", self.end, f"below {1 - self.start:g}, what start leaves")


_USUAL_START = {"init": "kaiming", "b_lr_ratio": 1.0}
_FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_fa": ("whose A does not train", {"b_lr_ratio": 1.0}),
    "vera": (
        "whose layers share A and B, without a scaling",
        {**_USUAL_START, "alpha": 16.0, "scaling": "alpha/r", "rank_pattern": {}, "alpha_pattern": {}},
    ),
    "dylora": ("which draws one rank for all layers", {**_USUAL_START, "rank_pattern": {}}),
    "adalora": (
        "which finds the ranks from a start of its own",
        {**_USUAL_START, "scaling": "alpha/r", "rank_pattern": {}, "alpha_pattern": {}},
    ),
    "full": (
        "where everything trains",
        {**_USUAL_START, "targets": [], "modules_to_save": [], "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"},
    ),
}
"""Variant → why it leaves no choice of some keys of `lora`, and the only value of each."""


@dataclass(kw_only=True)
class LoraSpec:
    """Which layers are adapted, and how (Hu et al. 2021, arXiv:2106.09685)."""

    variant: str = "lora"
    """How the update meets the base weight: lora (W + s B A), dora (arXiv:2402.09353), lora_fa (only B trains,
    arXiv:2308.03303), dylora (arXiv:2210.07558), vera (arXiv:2310.11454), adalora (arXiv:2303.10512); full: no adapter,
    every weight of the base model trains."""
    r: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """The update is scaled by alpha/r (or alpha/sqrt(r), see `scaling`)."""
    scaling: str = "alpha/r"
    """alpha/r, or alpha/sqrt(r) as in rsLoRA (arXiv:2312.03732)."""
    init: str = "kaiming"
    """Where A and B start: kaiming, gaussian, orthogonal, pissa (arXiv:2404.02948), olora (arXiv:2406.01775), eva
    (arXiv:2410.07170), which reads some training examples, or loftq (arXiv:2310.08659), of what model.quantization took
    away. Adapters of pissa and olora are saved with rank 2r."""
    b_lr_ratio: float = 1.0
    """Learning rate of B over that of A, above 1 in LoRA+ (arXiv:2402.12354). A keeps train.lr; so do both factors of
    an embedding, where A is looked up and no width of the input enters."""
    dropout: float = 0.0
    """Probability of dropping an input of A in training."""
    targets: list[str] = field(default_factory=lambda: ["default"])
    """Layers to adapt: a group (default, all-linear), a dotted suffix, parts of a fused projection (c_attn:q+v), or
    re:REGEX; []: only the head trains."""
    bias: str = "none"
    """Biases that train: none, all, or lora_only (those of the adapted layers)."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that train whole and are saved, besides the fresh head."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Name, suffix or re:REGEX → a rank of its own."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Name, suffix or re:REGEX → an alpha of its own."""
    projection_seed: int = 0
    """Seed of vera's two random matrices. Adapters with the same one can share them."""
    adalora: AdaLoraSpec = field(default_factory=AdaLoraSpec)
    """How adalora spends its ranks."""
    init_from: str | None = None
    """Run, or adapter folder, whose adapter this one starts from, with the same targets, r, alpha and variant, on the
    same base model. Its head is kept if the labels are the same, and made anew if they are not. None: `init`."""
    init_digest: str | None = None
    """SHA-256 of that adapter, noted when a run begins, so that its configuration says what it started from; given, it
    must be the adapter's."""

    def __post_init__(self) -> None:
        one_of("lora.variant", self.variant, VARIANTS, "variant")
        one_of("lora.scaling", self.scaling, SCALINGS, "scaling")
        one_of("lora.bias", self.bias, BIASES, "bias mode")
        one_of("lora.init", self.init, INITS, "init")
        positive("lora.b_lr_ratio", self.b_lr_ratio)
        share("lora.dropout", self.dropout)
        ranks = {"lora.r": self.r} | {f"lora.rank_pattern.{k}": v for k, v in self.rank_pattern.items()}
        alphas = {"lora.alpha": self.alpha} | {f"lora.alpha_pattern.{k}": v for k, v in self.alpha_pattern.items()}
        # These two are saved with twice the rank.
        most, unless = (2, f" with lora.init={self.init}") if self.init in ("pissa", "olora") else (1, "")
        for key, r in ranks.items():
            if not 1 <= r <= MAX_RANK // most:
                raise ConfigError(key, r, f"a whole number from 1 to {MAX_RANK // most}{unless}")
            if self.init == "orthogonal" and r % 2:
                raise ConfigError(key, r, "an even number with lora.init=orthogonal")
        for key, alpha in alphas.items():
            if not 0 < alpha <= MAX_SCALING / most:
                raise ConfigError(key, alpha, f"a number above 0, at most {MAX_SCALING / most:g}{unless}")
        check_seed("lora.projection_seed", self.projection_seed)
        why, fixed = _FIXED.get(self.variant, ("", {}))
        for name, only in fixed.items():
            if (value := getattr(self, name)) != only:
                raise ConfigError(f"lora.{name}", value, f"{only or 'empty'} with lora.variant={self.variant}, {why}")
        if self.projection_seed and self.variant != "vera":
            raise ConfigError("lora.projection_seed", self.projection_seed, "for lora.variant=vera only")
        if self.adalora != AdaLoraSpec() and self.variant != "adalora":
            raise ConfigError("lora.adalora", "", "for lora.variant=adalora only")
        if self.adalora.target_r > self.r and self.variant == "adalora":
            raise ConfigError("lora.adalora.target_r", self.adalora.target_r, f"at most {self.r}, which is lora.r")
        if self.init_from is not None and self.init != "kaiming":
            raise ConfigError("lora.init", self.init, "kaiming with lora.init_from, which takes its place")
        if self.init_digest is not None and self.init_from is None:
            raise ConfigError("lora.init_digest", self.init_digest, "null without lora.init_from")
