"""Published settings and what they reached: the keys of recipe.*."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field

from lora_cli.errors import ConfigError
from lora_cli.spec.checks import at_least, one_of, positive

__all__ = ["ExpectSpec", "RecipeSpec"]


@dataclass(kw_only=True)
class ExpectSpec:
    """A published figure that a recipe is held to."""

    metric: str = "???"
    """The metric, by our name for it."""
    split: str = "validation"
    """The split that it was scored on."""
    value: float = 0.0
    """The figure as it is printed: shares such as accuracy in percent."""
    spread: float | None = None
    """What is printed behind its ±; None: nothing."""
    seeds: int | None = None
    """Trainings that it sums up; None: it is not said."""
    over: str = "median"
    """How several trainings are summed up: median or mean."""
    protocol: str | None = None
    """What of each training is taken, in words; None: it is not said."""
    source: str = "???"
    """Where it is printed."""
    differs: str | None = None
    """What was measured otherwise there, so that ours cannot be held to it; None: nothing."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ConfigError("recipe.expect.value", self.value, "a finite number")
        if self.spread is not None and not 0 <= self.spread < math.inf:
            raise ConfigError("recipe.expect.spread", self.spread, "0 or more, or null")
        if self.seeds is not None:
            at_least("recipe.expect.seeds", self.seeds, 1)
        one_of("recipe.expect.over", self.over, ("median", "mean"), "way to sum up")


@dataclass(kw_only=True)
class RecipeSpec:
    """What a publication says of a training whose settings are repeated here."""

    name: str = "???"
    """Name of the recipe."""
    source: str = "???"
    """Where its settings are from."""
    base: str = "???"
    """The model that was trained, by our name for it."""
    epochs: float = typing.cast("float", "???")
    """Passes over the training rows."""
    batch_per_device: int = typing.cast("int", "???")
    """Examples per device and forward pass."""
    devices: int = 1
    """Devices, times their forward passes per step."""
    rows: dict[str, int] = field(default_factory=dict)
    """Split → rows that it had."""
    starts_from: str | None = None
    """Task whose adapter it started from (lora.init_from); None: from none."""
    expect: list[ExpectSpec] = field(default_factory=list)
    """The figures that it reached; []: none is published."""

    def __post_init__(self) -> None:
        positive("recipe.epochs", self.epochs)
        for name in ("batch_per_device", "devices"):
            at_least(f"recipe.{name}", getattr(self, name), 1)
        for split, rows in self.rows.items():
            at_least(f"recipe.rows.{split}", rows, 1)

    @property
    def global_batch(self) -> int:
        """Examples per optimizer step."""
        return self.batch_per_device * self.devices
