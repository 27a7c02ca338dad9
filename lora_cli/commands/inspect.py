"""lora inspect: the spectrum of every update of a saved adapter, from its factors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from lora_cli.disk import write_atomic
from lora_cli.errors import AdapterError, printable
from lora_cli.runs.directory import write_json
from lora_cli.runs.registry import find_adapter
from lora_cli.screen import Screen
from lora_cli.spec import InspectRun

if TYPE_CHECKING:
    from lora_cli.nn.spectrum import Spectrum
    from lora_cli.nn.stored import StoredAdapter

__all__ = ["run"]

_MAX_ROWS = 40
"""Layers in the table; all are in the JSON file."""
_NAME_WIDTH = 44
_DORA = (
    "DoRA: what is shown is s·B·A, the change of direction before each row gets its learnt length; the base's own "
    "row lengths, and so the change of length, are not in an adapter"
)


def run(spec: InspectRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Show how much of its rank each update uses, and the ranks that would keep `spec.energy` of it.

    Raises:
        RunError: there is no such run, or it has no adapter.
        AdapterError: the adapter is damaged, or has no update of low rank.
    """
    from lora_cli.nn.spectrum import spectra, suggested_ranks
    from lora_cli.nn.stored import read_stored

    screen, folder = Screen(), find_adapter(spec.run)
    stored = read_stored(folder)
    found = spectra(stored)
    if not found:
        raise AdapterError(f"{folder}: no layer is adapted, there is no update to look at")
    suggested = suggested_ranks(found, spec.energy)
    screen.fact("adapter", str(folder))
    if stored.magnitudes:
        screen.fact("note", _DORA)
    screen.show(_table(found, spec.energy))
    for line in _suggestion(found, suggested, spec.energy):
        screen.line(line)
    if spec.output is not None:
        write_json(Path(spec.output), _document(stored, found, suggested, spec.energy))
        screen.line(f"all values: {spec.output}")
    if spec.plot is not None:
        write_atomic(Path(spec.plot), _plot(found, spec.energy))
        screen.line(f"plot: {spec.plot}")


def _table(found: Sequence[Spectrum], energy: float) -> Table:
    """A line for each update, largest norm first; at most 100 columns wide."""
    from lora_cli.nn.stored import short_name

    names = [spectrum.layer for spectrum in found]
    ranks = [2**power for power in range(4) if 2**power < max(spectrum.r for spectrum in found)]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("layer", no_wrap=True, max_width=_NAME_WIDTH)
    for heading in ("rank", "norm", "eff. rank", *(f"at {rank}" for rank in ranks), f"for {energy:.3g}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for spectrum in found[:_MAX_ROWS]:
        name = spectrum.name.removeprefix(spectrum.layer)
        shown = printable(short_name(spectrum.layer, names) + name, 1000)
        cells = [str(spectrum.r), f"{spectrum.norm:.3g}", f"{spectrum.effective_rank:.2f}"]
        cells += [_share(spectrum, rank) for rank in ranks]
        shortened = shown if len(shown) <= _NAME_WIDTH else f"…{shown[1 - _NAME_WIDTH :]}"
        table.add_row(escape(shortened), *cells, str(spectrum.rank_at(energy)))
    return table


def _share(spectrum: Spectrum, rank: int) -> str:
    return f"{spectrum.energy[rank - 1]:.3f}" if rank <= spectrum.r else ""


def _suggestion(found: Sequence[Spectrum], suggested: Mapping[str, int], energy: float) -> list[str]:
    """What was said, in words, and as words of a command line."""
    lines = [f"and {len(found) - _MAX_ROWS} more layers"] if len(found) > _MAX_ROWS else []
    lines.append("eff. rank: exp of the entropy of the singular values; at k: share of the squared norm kept")
    usual = mode(suggested.values())
    others = {name: rank for name, rank in suggested.items() if rank != usual}
    pattern = ", ".join(f"{name}: {rank}" for name, rank in others.items())
    command = f"lora.r={usual}" + (f" 'lora.rank_pattern={{{pattern}}}'" if others else "")
    if len(command) > 900:
        command = f"lora.r={usual} and {len(others)} layers of another rank, which output=FILE.json lists"
    return [*lines, f"to keep {energy:.3g} of every update: {command}"]


def _document(
    stored: StoredAdapter, found: Sequence[Spectrum], suggested: Mapping[str, int], energy: float
) -> dict[str, Any]:
    layers = [
        {
            "layer": spectrum.layer,
            "part": spectrum.part or None,
            "rank": spectrum.r,
            "norm": spectrum.norm,
            "effective_rank": spectrum.effective_rank,
            "singular_values": list(spectrum.values),
            "energy": list(spectrum.energy),
            "rank_at_energy": spectrum.rank_at(energy),
        }
        for spectrum in found
    ]
    lengths = {
        name: {"mean": float(m.float().mean()), "smallest": float(m.min()), "largest": float(m.max())}
        for name, m in stored.magnitudes.items()
    }
    return {
        "energy": energy,
        "effective_rank": "exp of the entropy of the singular values' shares of their sum (Roy and Vetterli 2007)",
        "layers": layers,
        "magnitudes": lengths,
        "rank_pattern": dict(suggested),
    }


def _plot(found: Sequence[Spectrum], energy: float) -> str:
    """A thick line for each kind of layer, by the last word of its name, and a thin one for each layer."""
    from lora_cli.chart import line_chart

    kinds: dict[str, list[Sequence[float]]] = {}
    for spectrum in sorted(found, key=lambda spectrum: spectrum.name):
        name = spectrum.name if ":" in spectrum.name else spectrum.layer
        words = [word for word in name.split(".") if not re.fullmatch(r"\d+", word)]
        kinds.setdefault(".".join(words[-2:]), []).append(spectrum.energy)
    title = f"Energy that each rank keeps, {len(found)} updates"
    return line_chart(title, kinds, x_label="rank", y_label="share of the squared norm", level=energy)
