"""An adapter's files as numbers, without its base model: read, rewritten, saved. Knows PEFT's names, no module.

What stands beside the factors (magnitudes, biases, modules trained whole, rows of new tokens) is carried along as it
is. Dimensions in names: I in, O out, R rank.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from lora_cli import __version__
from lora_cli.errors import AdapterError, printable
from lora_cli.nn.adapter import CONFIG_FILE, FACTS_FILE, WEIGHTS_FILE, read_adapter, write_files
from lora_cli.nn.inject import check_truncation
from lora_cli.nn.peft_config import NO_TARGETS, PeftConfig, parse_config
from lora_cli.nn.peft_tensors import PREFIX
from lora_cli.nn.targets import FULL, LayerPlan
from lora_cli.nn.untrusted import read_json, read_tensor, where
from lora_cli.nn.variants import SCALINGS, VARIANTS
from lora_cli.spec import LoraSpec

__all__ = [
    "Factors",
    "StoredAdapter",
    "assemble",
    "read_stored",
    "save_stored",
    "short_name",
    "targets_of",
]

_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_MAGNITUDE = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_BASE_COPY = re.compile(r".+\.base_layer\.weight|.+\.original_module\..+")
"""Base weights that PEFT writes beside an adapter, and that nothing reads."""
_PATTERNS = ("alpha_pattern", "rank_pattern", "use_rslora")
_KEPT = (
    *("base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode", "lora_alpha"),
    *("lora_dropout", "modules_to_save", "peft_type", "r", "revision", "target_modules", "task_type", "use_dora"),
    *("trainable_token_indices", *_PATTERNS),
)
"""Settings that an adapter is written with again; no other one changes what is supported here."""


@dataclass(frozen=True)
class Factors:
    """One layer's update s·B·A.

    Shapes: linear and embedding A (r, in), B (out, r); convolution A (r, in, *kernel), B (out, r/groups, 1, ...).
    """

    A: Tensor
    """As it stands in the file."""
    B: Tensor
    """As it stands in the file."""
    scaling: float
    """s."""
    is_embedding: bool = False
    """Whether the file names it as an embedding's."""

    @property
    def r(self) -> int:
        """Rank."""
        return self.A.shape[0]

    @property
    def is_convolution(self) -> bool:
        """Whether its base is a convolution."""
        return self.A.ndim > 2

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for any other layer."""
        return self.r // self.B.shape[1]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and s·B (out, r) in fp64; a kernel's positions count as inputs."""
        A_RI, B_OR = self.A.double().flatten(1), self.B.double().flatten(1)
        if self.groups > 1:
            B_OR = torch.block_diag(*B_OR.chunk(self.groups))  # type: ignore[no-untyped-call]
        return A_RI, self.scaling * B_OR

    def delta(self) -> Tensor:
        """s·B·A (out, in) in fp64."""
        A_RI, B_OR = self.matrices()
        return B_OR @ A_RI

    def scaled(self, weight: float) -> Factors:
        """`weight` times this update; the same tensors for 1."""
        return self if weight == 1 else replace(self, B=(weight * self.B.double()).float())


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter's files hold."""

    config: Mapping[str, Any]
    """adapter_config.json, as far as it is known here."""
    layers: Mapping[str, Factors]
    """Module name → its update, sorted by name."""
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    """Module name → DoRA's row lengths (out,)."""
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """Name in the file → every other tensor: biases, modules trained whole, rows of new tokens."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """lora.json; empty if it was not made here."""
    parts: Mapping[str, LayerPlan] = field(default_factory=dict)
    """Layer → the parts of a fused projection that its factors are made of."""
    source: str = "adapter"
    """Where it came from, for messages."""

    def with_layers(self, layers: Mapping[str, Factors]) -> StoredAdapter:
        """The same with other updates, its config telling their ranks and scalings; parts are no longer known."""
        ranks = {name: layer.r for name, layer in layers.items()}
        alphas = {name: _plain(layer.scaling * layer.r) for name, layer in layers.items()}
        config = {key: value for key, value in self.config.items() if key not in _PATTERNS}
        if layers:
            config |= {"r": mode(ranks.values()), "lora_alpha": mode(alphas.values())}
        patterns = {"alpha_pattern": _pattern(alphas), "rank_pattern": _pattern(ranks)}
        config |= {key: pattern for key, pattern in patterns.items() if pattern}
        facts = {key: value for key, value in self.facts.items() if key not in ("parts", "variant")}
        return replace(self, config=config, layers=dict(sorted(layers.items())), facts=facts, parts={})


def read_stored(folder: Path, *, r: int | None = None) -> StoredAdapter:
    """All of an adapter folder, checked: names, shapes, ranks as the config says, every number finite.

    With `r`, what a DyLoRA adapter is at that rank: an ordinary adapter.

    Raises:
        AdapterError: it is damaged, not LoRA or DoRA, or holds a whole model.
        ConfigError: it has no such rank inside.
    """
    file = read_adapter(folder)
    if file.config.spec.variant == FULL:
        raise AdapterError(f"{where(folder)}: a model that was trained whole has no update of low rank")
    if file.config.spec.variant == "adalora":
        raise AdapterError(
            f"{where(folder)}: AdaLoRA has values between A and B, which only PEFT's own format can hold"
        )
    if VARIANTS[file.config.spec.variant].is_shared:
        raise AdapterError(f"{where(folder)}: VeRA's layers share one A and B, which only PEFT's own format can hold")
    tensors = {
        key: read_tensor(file.weights, entry) for key, entry in file.tensors.items() if not _BASE_COPY.fullmatch(key)
    }
    facts = read_json(folder / FACTS_FILE) if os.path.lexists(folder / FACTS_FILE) else {}
    stored = assemble(read_json(folder / CONFIG_FILE), tensors, where(folder), file.config)
    for name, plan in file.parts.items():
        if name not in stored.layers or stored.layers[name].r != len(plan.parts) * plan.r:
            raise AdapterError(f"{where(folder / FACTS_FILE)}: parts of {printable(name, 60)} do not fit its factors")
    stored = replace(stored, facts=facts, parts=file.parts)
    return stored if r is None else _truncated(stored, file.config.spec, r)


def _truncated(stored: StoredAdapter, spec: LoraSpec, r: int) -> StoredAdapter:
    check_truncation(spec, r)
    rule = SCALINGS[spec.scaling]
    layers = {
        name: replace(layer, A=layer.A[:r], B=layer.B[:, :r], scaling=layer.scaling * rule(1, r) / rule(1, layer.r))
        for name, layer in stored.layers.items()
    }
    return stored.with_layers(layers)


def assemble(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str, parsed: PeftConfig | None = None
) -> StoredAdapter:
    """The adapter that an adapter_config.json and tensors by PEFT's names make.

    Raises:
        AdapterError: the config is not supported, or a tensor is missing, too many, misshapen or not finite.
    """
    parsed = parsed or parse_config(config, source)
    factors: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    embeddings = set()
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{source}: {printable(key, 90)} holds NaN or infinity")
        if _BASE_COPY.fullmatch(key):
            continue
        if match := _FACTOR.fullmatch(key):
            name, is_embedding, factor = match.groups()
            own = factors.setdefault(name, {})
            if factor in own:
                raise AdapterError(f"{source}: {printable(name, 90)} has two factors {factor}")
            own[factor] = tensor
            embeddings |= {name} if is_embedding else set()
        elif match := _MAGNITUDE.fullmatch(key):
            magnitudes[match[1]] = tensor
        elif re.search(r"\.(lora|vera)_", key):
            raise AdapterError(f"{source}: {printable(key, 90)} is no tensor of LoRA or DoRA")
        else:
            others[key] = tensor
    layers = {name: _factors(name, own, name in embeddings, parsed, source) for name, own in sorted(factors.items())}
    _check_magnitudes(layers, magnitudes, parsed, source)
    kept = {key: config[key] for key in _KEPT if config.get(key) is not None}
    return StoredAdapter({"bias": "none", "inference_mode": True} | kept, layers, magnitudes, others, source=source)


def save_stored(stored: StoredAdapter, folder: Path, documents: Mapping[str, object] | None = None) -> None:
    """Write the folder that PEFT and `read_adapter` read, and `documents` (file name → JSON) beside it, whole or not.

    Factors keep their dtype.
    """
    tensors = {}
    for name, layer in stored.layers.items():
        infix, end = ("lora_embedding_", "") if layer.is_embedding else ("lora_", ".weight")
        tensors[f"{PREFIX}{name}.{infix}A{end}"] = layer.A
        tensors[f"{PREFIX}{name}.{infix}B{end}"] = layer.B
    tensors |= {f"{PREFIX}{name}.lora_magnitude_vector": tensor for name, tensor in stored.magnitudes.items()}
    tensors |= stored.others
    facts = {"made_by": f"lora-cli {__version__}"}
    files: dict[str, object] = {CONFIG_FILE: dict(sorted(stored.config.items())), **(documents or {})}
    if stored.facts:
        files[FACTS_FILE] = {**stored.facts, **facts}
    # Copies: safetensors refuses tensors that share memory.
    copies = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    write_files(folder, files, WEIGHTS_FILE, copies)


def targets_of(adapters: Sequence[StoredAdapter]) -> list[str] | str:
    """target_modules that match exactly the layers of these adapters together."""
    lists = [adapter.config.get("target_modules") for adapter in adapters]
    names = {name for adapter in adapters for name in adapter.layers}
    are_plain = all(isinstance(entries, list) for entries in lists)
    if not names:
        return NO_TARGETS
    # Entries of several adapters match together what each matches alone, unless one leaves layers out by name.
    if are_plain and not any(adapter.config.get("exclude_modules") for adapter in adapters):
        return sorted({entry for entries in lists if entries for entry in entries})
    return sorted(names)


def short_name(name: str, names: Iterable[str]) -> str:
    """`name` without the dotted beginning that all `names` share."""
    columns = zip(*(other.split(".")[:-1] for other in names), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda words: len(set(words)) == 1, columns))
    return ".".join(name.split(".")[shared:])


def _factors(name: str, own: Mapping[str, Tensor], is_embedding: bool, parsed: PeftConfig, source: str) -> Factors:
    where_it_is = f"{source}: {printable(name, 90)}"
    if own.keys() != {"A", "B"}:
        raise AdapterError(f"{where_it_is} has a factor {', '.join(own)} only; A and B are needed")
    A, B, spec = own["A"], own["B"], parsed.spec
    r = spec.rank_pattern.get(_matching(name, spec.rank_pattern), spec.r)
    alpha = spec.alpha_pattern.get(_matching(name, spec.alpha_pattern), spec.alpha)
    is_pointwise = B.ndim == A.ndim >= 2 and all(size == 1 for size in B.shape[2:])
    if not is_pointwise or A.shape[0] != r or B.shape[1] == 0 or r % B.shape[1] or (A.ndim == 2 and B.shape[1] != r):
        raise AdapterError(f"{where_it_is}: A {list(A.shape)} and B {list(B.shape)} are no factors of rank {r}")
    if B.shape[0] % (r // B.shape[1]) or 0 in A.shape or 0 in B.shape:
        raise AdapterError(f"{where_it_is}: A {list(A.shape)} and B {list(B.shape)} do not fit together")
    return Factors(A, B, SCALINGS[spec.scaling](alpha, r), is_embedding)


def _check_magnitudes(
    layers: Mapping[str, Factors], magnitudes: Mapping[str, Tensor], parsed: PeftConfig, source: str
) -> None:
    wanted = set(layers) if parsed.spec.variant == "dora" else set()
    if wanted != magnitudes.keys():
        name = printable(sorted(wanted ^ magnitudes.keys())[0], 90)
        raise AdapterError(f"{source}: {name}: use_dora in {CONFIG_FILE} and the magnitudes do not agree")
    for name, tensor in magnitudes.items():
        if tensor.numel() != layers[name].B.shape[0]:
            raise AdapterError(f"{source}: {printable(name, 90)}: {tensor.numel()} magnitudes do not fit its B")


def _matching(name: str, entries: Iterable[str]) -> str:
    """The first entry that is the name or a dotted end of it, as PEFT chooses."""
    return next((entry for entry in entries if f".{name}".endswith(f".{entry}")), "")


def _pattern(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every name with its value, unless all are the same. Longest first: PEFT takes the first that ends a name."""
    if len(set(values.values())) <= 1:
        return {}
    return {name: values[name] for name in sorted(values, key=lambda name: (-len(name), name))}


def _plain(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha
