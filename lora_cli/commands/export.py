"""lora export: a saved adapter as another program wants it, and its passport: what each program makes of it.

For target=onnx the whole model, the adapter merged into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from lora_cli import __version__
from lora_cli.disk import atomic_file, atomic_folder
from lora_cli.errors import ConfigError, ModelError, UserError
from lora_cli.runs.directory import write_json
from lora_cli.runs.registry import find_adapter
from lora_cli.screen import Screen
from lora_cli.spec import DeviceSpec, ExportRun, MergeRun

if TYPE_CHECKING:
    import torch

    from lora_cli.nn.passport import Verdict
    from lora_cli.nn.stored import StoredAdapter
    from lora_cli.saved import Saved

__all__ = ["run"]

_NEXT = {
    "peft": "PeftModel.from_pretrained(base, '{output}')",
    "vllm": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules name={output}",
    "sglang": "python -m sglang.launch_server --model-path {base} --lora-paths name={output}",
    "tgi": "text-generation-launcher --model-id {base} --lora-adapters name={output}",
    "lorax": "lorax-launcher --model-id {base} --adapter-source local --adapter-id {output}",
    "llamacpp": "llama-cli -m MODEL.gguf --lora {output}/adapter.gguf",
    "loralib": "model.load_state_dict(torch.load('{output}/lora.pt', weights_only=True), strict=False)",
}
"""Target → what to do with the folder."""
_CONVERT = "python convert_lora_to_gguf.py {output} --base FOLDER"
"""What to do where llama.cpp itself has to make the file."""
_TOLERANCE = 1e-3
"""Largest difference of logits between onnxruntime and torch, as a share of the largest logit; rounding makes 1e-6."""


def run(spec: ExportRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Write `spec.output` for `spec.target`, with scalings folded in where the target would get them wrong.

    Raises:
        RunError: there is no such run, or it has no adapter.
        AdapterError: the adapter is damaged, or holds what the target has no place for.
        ModelError: target=onnx, and the model cannot be exported or computes something else then.
    """
    output = Path(spec.output)
    if output.exists():
        raise ConfigError("output", spec.output, "exists already; give a new folder")
    if spec.target == "onnx":
        _run_onnx(spec, output)
        return
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
    gguf = _write_gguf(stored, output, spec) if spec.target == "llamacpp" else ""
    if gguf:
        screen.fact("gguf", gguf)
    screen.show(_table(verdicts))
    screen.line(f"({NOTE})")
    rank = max((layer.r for layer in stored.layers.values()), default=0)
    base = stored.config.get("base_model_name_or_path") or "BASE"
    hint = _CONVERT if gguf else _NEXT[spec.target]
    screen.line(f"\n{output}\n{hint.format(output=output, base=base, rank=rank)}")


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


def _write_gguf(stored: StoredAdapter, output: Path, spec: ExportRun) -> str:
    """Write adapter.gguf into the folder, or say why not: llama.cpp's own script makes one of the folder then."""
    from lora_cli.nn.gguf_file import FAMILIES, Heads, gguf_tensors, is_installed, save_gguf
    from lora_cli.reader import load_reader

    if spec.model is None:
        return "no adapter.gguf: a bare adapter does not say how many heads its base has; give model=NAME"
    if not is_installed():
        return "no adapter.gguf: needs a package: pip install 'lora-cli[gguf]'"
    try:
        config = load_reader(spec.model, problem="generation").config
        if config.model_type not in FAMILIES:
            return f"no adapter.gguf: written for {', '.join(FAMILIES)}, not {config.model_type}"
        heads = Heads(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
        tensors = gguf_tensors(stored, config.model_type, heads)
    except UserError as error:
        return f"no adapter.gguf: {error}"
    # `portable` has made rank and alpha one for all.
    alpha = {layer.scaling * layer.r for layer in stored.layers.values()}
    with atomic_file(output / "adapter.gguf") as temporary:
        save_gguf(temporary, tensors, family=config.model_type, alpha=alpha.pop())
    return ""


def _run_onnx(spec: ExportRun, output: Path) -> None:
    """Write the model with the adapter merged in as model.onnx, and what onnxruntime made of real rows."""
    from lora_cli.certificate import decisions, in_words
    from lora_cli.merged import merge_all
    from lora_cli.models import save_config
    from lora_cli.onnx_file import INPUTS, check_packages, save_onnx
    from lora_cli.saved import open_saved
    from lora_cli.tokenizer import save_tokenizer

    check_packages()
    screen, wanted = Screen(), _as_merge(spec)
    saved = open_saved(wanted, keep_padding=True)
    model: Any = saved.model
    if saved.decoder_start is not None:
        family = model.config.model_type
        raise ConfigError("target", "onnx", f"not of encoder-decoders that write ({family}); lora merge takes them")
    screen.fact("run", str(saved.path))
    examples = saved.first_examples(spec.rows, wanted.task.split)
    before = list(decisions(model, saved.task, examples, device=saved.device))
    changes = merge_all(model)
    screen.fact("merged", f"{len(changes)} layers, largest change of a weight {max(changes.values(), default=0.0):.3g}")
    inputs = [name for name in INPUTS if name in saved.tokenizer.model_input_names]
    with atomic_folder(output) as temporary:
        save_onnx(model, temporary / "model.onnx", inputs=inputs)
        found = _onnx_difference(temporary / "model.onnx", saved, examples, before) if examples else {}
        if found:
            screen.fact("onnx", in_words(found))
        save_config(model, temporary)
        save_tokenizer(saved.tokenizer, temporary)
        facts = {"run": str(saved.path), "split": wanted.task.split, "rows": len(examples)}
        certificate = {"fp32": found} if found else {}
        write_json(temporary / "certificate.json", {**facts, "inputs": inputs, "dtypes": certificate})
    screen.line(f"{output}\nonnxruntime.InferenceSession('{output}/model.onnx'): {', '.join(inputs)} → logits")


def _as_merge(spec: ExportRun) -> MergeRun:
    """What lora merge would be told; on the CPU in fp32, as onnxruntime computes here."""
    if spec.task is None or spec.model is None:
        key = "task" if spec.task is None else "model"
        raise ConfigError(
            key, "", f"target=onnx needs the whole model, and a bare adapter does not say; give {key}=NAME"
        )
    return MergeRun(
        run=spec.run,
        output=spec.output,
        task=spec.task,
        model=spec.model,
        device=DeviceSpec(name="cpu", precision="fp32"),
        force_base=spec.force_base,
    )


def _onnx_difference(
    file: Path, saved: Saved, examples: Sequence[Any], before: Sequence[torch.Tensor]
) -> dict[str, float]:
    """How far what onnxruntime computes from the file is from the adapted model.

    Raises:
        ModelError: further than rounding explains: the exporter has taken something for fixed that is not.
    """
    from lora_cli.certificate import decisions, difference
    from lora_cli.onnx_file import OnnxModel

    found = difference(before, list(decisions(OnnxModel(file), saved.task, examples, device=saved.device)))
    scale = max(float(logits.abs().max()) for logits in before)
    # Not >: a NaN is larger than nothing.
    if not found["largest_difference"] <= _TOLERANCE * scale:
        raise ModelError(
            f"target=onnx: logits differ by {found['largest_difference']:.1e} from torch's; nothing written"
        )
    return found


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
