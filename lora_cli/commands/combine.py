"""lora combine: saved adapters added, subtracted, scaled or interpolated into a new one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from lora_cli.errors import ConfigError
from lora_cli.runs.registry import find_adapter
from lora_cli.screen import Screen
from lora_cli.spec import CombineRun

__all__ = ["run"]


def run(spec: CombineRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Write the weighted sum of `spec.adapters` to `spec.output`.

    Raises:
        RunError: a run is not there, or has no adapter.
        AdapterError: the adapters are damaged, do not go together, or are no sums of updates.
    """
    output = Path(spec.output)
    if output.exists():
        raise ConfigError("output", spec.output, "exists already; give a new folder")
    from lora_cli.nn.combine import combine
    from lora_cli.nn.spectrum import spectra
    from lora_cli.nn.stored import read_stored, save_stored

    screen = Screen()
    folders = [find_adapter(name) for name in spec.adapters]
    weights = spec.weights or [1.0] * len(folders)
    adapters = [read_stored(folder) for folder in folders]
    result = combine(adapters, weights, method=spec.method, rank=spec.rank, head=spec.head, force_base=spec.force_base)
    for weight, folder in zip(weights, folders, strict=True):
        screen.fact(f"{weight:+g}", str(folder))
    found = spectra(result)
    if found:
        ranks = sorted({spectrum.r for spectrum in found})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        norm = fmean(spectrum.norm for spectrum in found)
        screen.fact("result", f"{len(found)} layers, rank {rank}, norm {norm:.3g} on average")
    if found and spec.rank is not None:
        exact = spectra(combine(adapters, weights, head=spec.head, force_base=spec.force_base))
        kept = min(spectrum.energy[min(spec.rank, spectrum.r) - 1] for spectrum in exact)
        screen.fact("kept", f"{kept:.4g} of the squared norm of the exact sum, in the layer that loses most")
    document = {
        "adapters": [str(folder) for folder in folders],
        "weights": list(weights),
        **{key: getattr(spec, key) for key in ("method", "rank", "head")},
    }
    save_stored(result, output, {"combined.json": document})
    screen.line(str(output))
