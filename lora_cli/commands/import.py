"""lora import: an adapter of PEFT, loralib or torchtune taken over into PEFT's files, with a report of every tensor."""  # noqa: N999

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.disk import shown
from lora_cli.errors import AdapterError, ConfigError
from lora_cli.screen import Screen
from lora_cli.spec import ImportRun, ModelSpec

if TYPE_CHECKING:
    import torch

    from lora_cli.nn.imports import Mapped

__all__ = ["run"]

_CONFIG, _WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_HEADS = ("classifier", "score")
_MAX_LINES = 12
"""Tensors named on the terminal; all are in import.json."""


def run(spec: ImportRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Write `spec.source` as an adapter folder to `spec.output`, and import.json: where each tensor came from.

    With a model the result is checked against its config, name by name and shape by shape; no weights are needed.

    Raises:
        ConfigError: a key that this format needs is missing.
        AdapterError: the file is damaged or hostile, or a tensor's place is not known.
        ModelError: the model's config is not here.
    """
    output = Path(spec.output)
    if output.exists():
        raise ConfigError("output", spec.output, "exists already; give a new folder")
    from lora_cli.nn.imports import format_of
    from lora_cli.nn.stored import save_stored

    screen = Screen()
    folder, file = _files(Path(spec.source))
    tensors = _tensors(file)
    library = format_of(list(tensors)) if spec.format == "auto" else spec.format
    base_name, model = None, None
    if spec.model is not None:
        base_name, model = _skeleton(spec.model, spec.task_type or "", tensors)
    mapped = _mapped(spec, library, tensors, folder, model)
    if model is not None:
        if library != "peft":
            named = {"base_model_name_or_path": base_name, "task_type": spec.task_type}
            mapped = replace(mapped, stored=replace(mapped.stored, config={**mapped.stored.config, **named}))
        _check(mapped, model)
    checked = "" if model is None else "; every name and shape fits the model's config"
    screen.fact("source", f"{file}: {len(tensors)} tensors, in the format of {library}{checked}")
    tensors_json = [{"source": source, "name": name, "shape": list(shape)} for source, name, shape in mapped.report]
    document = {"source": str(file), "format": library, "alpha": spec.alpha, "tensors": tensors_json}
    save_stored(mapped.stored, output, {"import.json": document})
    for line in _lines(mapped, output):
        screen.line(line)


def _lines(mapped: Mapped, output: Path) -> list[str]:
    """Where the first tensors came from, and where the rest is listed."""
    lines = [f"{source} → {name} {list(shape)}" for source, name, shape in mapped.report[:_MAX_LINES]]
    if len(mapped.report) > _MAX_LINES:
        lines.append(f"and {len(mapped.report) - _MAX_LINES} more, listed in {output / 'import.json'}")
    return [*lines, str(output)]


def _files(source: Path) -> tuple[Path, Path]:
    """The folder and the weights file meant by `source`."""
    if not source.is_dir():
        if not source.exists():
            raise ConfigError("source", str(source), "no such file or folder")
        return source.parent, source
    file = next((source / name for name in _WEIGHTS if (source / name).exists()), None)
    if file is None:
        raise AdapterError(f"{shown(source)}: none of {', '.join(_WEIGHTS)} is here; name the file itself")
    return source, file


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from lora_cli.nn.pickles import read_pickle
    from lora_cli.nn.untrusted import read_header, read_tensor

    if file.suffix == ".safetensors":
        return {name: read_tensor(file, entry) for name, entry in read_header(file).items()}
    return read_pickle(file)


def _mapped(
    spec: ImportRun, library: str, tensors: Mapping[str, torch.Tensor], folder: Path, model: torch.nn.Module | None
) -> Mapped:
    from lora_cli.nn import imports
    from lora_cli.nn.stored import assemble
    from lora_cli.nn.untrusted import read_json

    if library == "peft":
        if spec.alpha is not None:
            raise ConfigError("alpha", spec.alpha, f"is in PEFT's {_CONFIG} already; leave it out")
        stored = assemble(read_json(folder / _CONFIG), tensors, shown(folder))
        return imports.Mapped(stored, tuple((name, name, tuple(tensor.shape)) for name, tensor in tensors.items()))
    if model is None:
        raise ConfigError("model", "", f"needs a value: a file of {library} does not say what its layers are")
    if spec.alpha is None:
        raise ConfigError("alpha", "", f"needs a value: a file of {library} does not hold it")
    if library == "torchtune":
        return imports.from_torchtune(tensors, model, alpha=spec.alpha)
    more: dict[str, Any] = {"enable_lora": spec.enable_lora, "modules_to_save": spec.modules_to_save}
    return imports.from_loralib(tensors, model, alpha=spec.alpha, **more)


def _skeleton(spec: ModelSpec, task_type: str, tensors: Mapping[str, torch.Tensor]) -> tuple[str, torch.nn.Module]:
    """The model's own name, and the model without numbers: names and shapes, from its config."""
    import torch

    from lora_cli.reader import class_for, load_config, random_config
    from lora_cli.sources import find_source
    from lora_cli.tokenizer import quiet

    source = find_source(spec, weights=False)
    with quiet(), torch.device("meta"):
        config: Any = random_config(spec)[0] if source.folder is None else load_config(source.folder, spec)
        heads = [
            t for name, t in tensors.items() if name.endswith(tuple(f"{h}.weight" for h in _HEADS)) and t.ndim == 2
        ]
        if heads:
            config.num_labels = len(heads[0])
        problem = "classification" if task_type == "SEQ_CLS" else "generation"
        model: torch.nn.Module = class_for(config, problem, source.text).from_config(config)
    return source.base_name, model


def _check(mapped: Mapped, model: torch.nn.Module) -> None:
    """Load it into `model`, which has no numbers: every name and shape has to fit."""
    import tempfile

    from lora_cli.nn import load_adapter
    from lora_cli.nn.stored import save_stored

    with tempfile.TemporaryDirectory() as temporary:
        save_stored(mapped.stored, Path(temporary) / "adapter")
        load_adapter(model, Path(temporary) / "adapter", fresh=(), fingerprint=None)
