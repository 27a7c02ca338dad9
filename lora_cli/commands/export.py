"""lora export: a saved adapter as another program wants it, and its passport: what each program makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lora_cli import __version__
from lora_cli.disk import atomic_folder
from lora_cli.errors import ConfigError
from lora_cli.runs.directory import write_json
from lora_cli.runs.registry import find_adapter
from lora_cli.screen import Screen
from lora_cli.spec import ExportRun

if TYPE_CHECKING:
    from lora_cli.nn.passport import Verdict
    from lora_cli.nn.stored import StoredAdapter

__all__ = ["run"]

_NEXT = {
    "peft": "PeftModel.from_pretrained(base, '{output}')",
    "vllm": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules name={output}",
    "sglang": "python -m sglang.launch_server --model-path {base} --lora-paths name={output}",
    "tgi": "text-generation-launcher --model-id {base} --lora-adapters name={output}",
    "lorax": "lorax-launcher --model-id {base} --adapter-source local --adapter-id {output}",
    "llamacpp": "no .gguf is written; llama.cpp makes it: python convert_lora_to_gguf.py {output} --base FOLDER",
    "loralib": "model.load_state_dict(torch.load('{output}/lora.pt', weights_only=True), strict=False)",
}
"""Target → what to do with the folder."""


def run(spec: ExportRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Write `spec.output` for `spec.target`, with scalings folded in where the target would get them wrong.

    Raises:
        RunError: there is no such run, or it has no adapter.
        AdapterError: the adapter is damaged, or holds what the target has no place for.
    """
    output = Path(spec.output)
    if output.exists():
        raise ConfigError("output", spec.output, "exists already; give a new folder")
    from lora_cli.nn.exports import check_target, portable
    from lora_cli.nn.passport import NOTE, passport, traits
    from lora_cli.nn.stored import read_stored

    screen, folder = Screen(), find_adapter(spec.run)
    stored = read_stored(folder, r=spec.lora.r)
    check_target(stored, spec.target)
    screen.fact("adapter", f"{folder}: {', '.join(traits(stored).values()) or 'one rank, one scaling, linear layers'}")
    changes: list[str] = []
    if spec.target not in ("peft", "loralib"):
        stored, changes = portable(stored)
    for change in changes:
        screen.fact("changed", change)
    verdicts = passport(stored)
    if spec.target == "loralib":
        verdicts = _only_loralib(verdicts)
    _write(stored, output, spec.target, changes, verdicts)
    screen.show(_table(verdicts))
    screen.line(f"({NOTE})")
    rank = max((layer.r for layer in stored.layers.values()), default=0)
    base = stored.config.get("base_model_name_or_path") or "BASE"
    screen.line(f"\n{output}\n{_NEXT[spec.target].format(output=output, base=base, rank=rank)}")


def _write(
    stored: StoredAdapter, output: Path, target: str, changes: Sequence[str], verdicts: Mapping[str, Verdict]
) -> None:
    from lora_cli.nn.exports import loralib_state
    from lora_cli.nn.passport import NOTE, traits
    from lora_cli.nn.stored import save_stored

    document = {
        "made_by": f"lora-cli {__version__}",
        "target": target,
        "source": NOTE,
        "adapter": traits(stored),
        "changes": list(changes),
        "engines": {name: {"verdict": each.verdict, "why": list(each.why)} for name, each in verdicts.items()},
    }
    if target != "loralib":
        save_stored(stored, output, {"passport.json": document})
        return
    import torch

    state, arguments = loralib_state(stored)
    with atomic_folder(output) as temporary:
        torch.save(state, temporary / "lora.pt")
        write_json(temporary / "layers.json", arguments)
        write_json(temporary / "passport.json", document)


def _only_loralib(verdicts: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """What programs make of loralib's own file."""
    from lora_cli.nn.passport import LOADS, REFUSED, Verdict

    own = Verdict(LOADS, ("into layers made as layers.json says, with strict=False",))
    foreign = Verdict(REFUSED, ("loralib's names in a pickle; export for this program instead",))
    return {name: own if name == "loralib" else foreign for name in verdicts}


def _table(verdicts: Mapping[str, Verdict]) -> Table:
    """The passport, at most 100 columns wide."""
    from lora_cli.nn.passport import LOADS, REFUSED

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading, width in (("program", 9), ("verdict", 13), ("why", 74)):
        table.add_column(heading, max_width=width)
    colours = {LOADS: "green", REFUSED: "red"}
    for name, each in verdicts.items():
        verdict = f"[{colours.get(each.verdict, 'yellow')}]{each.verdict}[/]"
        table.add_row(name, verdict, escape("; ".join(each.why)))
    return table
