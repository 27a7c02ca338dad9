"""Base models: a checkpoint with a head for the task, ready to be adapted.

Knows transformers and ModelSpec; nothing of adapters, data or training.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.activations import join_operations
from lora_cli.checkpointing import forgo_cache
from lora_cli.dropout import quicken
from lora_cli.errors import ConfigError, ModelError, printable
from lora_cli.families import HEAD_DROPOUT, layer_groups
from lora_cli.lean_imports import lean, valueless_on_meta
from lora_cli.reader import class_for, decoder_start, load_config, random_config, task_type
from lora_cli.sources import check_checkpoint, find_source
from lora_cli.spec import ModelSpec
from lora_cli.tokenizer import add_tokens, explained, load_tokenizer, quiet
from lora_cli.unpadded import first_position

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lora_cli.nn import QuantizedSize

__all__ = ["BaseModel", "drawn_anew", "fresh_head", "load_base", "output_embedding", "save_config"]


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model with a head for the task, in eval mode, and what an adapter must know of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: str
    """transformers' model_type."""
    groups: Mapping[str, Sequence[str]]
    """Names that lora.targets may use for several layers → dotted suffixes, or re:REGEX."""
    fresh: tuple[str, ...]
    """Outermost modules that the checkpoint lacks: they have to be trained whole, and saved."""
    drawn: tuple[str, ...]
    """Parameters of these modules that the checkpoint lacks, which start as the seed has it."""
    skip: tuple[str, ...]
    """Output embedding: not a target of all-linear."""
    max_length: int
    """Tokens that the positions suffice for."""
    task_type: str
    """What PEFT calls it: SEQ_CLS, CAUSAL_LM or SEQ_2_SEQ_LM."""
    decoder_start: int | None
    """The token that a written answer of an encoder-decoder starts from; None for any other."""
    source: str
    """Where it came from, for people."""
    base_name: str
    """What the adapter names as its base: a hub id where there is one."""
    revision: str | None
    """Commit of the hub model, as far as it is known."""
    fingerprint: str
    """Of its weights, as they were before tokens were added and layers quantised."""
    quantized: QuantizedSize | None
    """What quantising its layers saved; None: they are as they were loaded."""
    new_rows: tuple[int, ...]
    """Numbers of the added tokens, whose rows have to be trained and saved."""


def load_base(
    spec: ModelSpec,
    *,
    num_outputs: int,
    labels: Sequence[str] | None,
    problem: str,
    seed: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    keep_original: bool = False,
) -> BaseModel:
    """The model of `spec` with a head of `num_outputs` for "classification" or "regression", or, for "generation", as
    it is: a decoder or an encoder-decoder that writes.

    What the checkpoint lacks is drawn as transformers draws it, but from a generator seeded by
    (`seed`, parameter name): the same head whatever else was loaded or drawn before. So are the rows of
    `spec.add_tokens`, for which embeddings grow if they are too small. The global generators are left as
    they were, and nothing is printed. `dtype` None: fp32. `device` is where layers are quantised, and stay; the rest of
    the model is on the CPU, and with `keep_original`, until an adapter is injected, what they were.

    Raises:
        ModelError: the checkpoint is missing, damaged, not trusted, or not made for this.
        UnknownName: model.family or a key of model.random is none.
        ConfigError: the tokenizer knows one of the tokens to be added; the layers cannot be quantised as asked.
    """
    import torch

    from lora_cli.nn import fingerprint, quantized_size

    head = _head_settings(num_outputs, labels, problem)
    source = find_source(spec)
    if source.folder is not None:
        check_checkpoint(source.folder, spec)
    with quiet(), torch.random.fork_rng(devices=[]):
        if source.folder is None:
            model, tokenizer, fresh = _build_random(spec, problem, head, dtype or torch.float32)
            _draw(model, [name for name, _ in model.named_parameters()], seed)
        else:
            tokenizer = load_tokenizer(source.folder, trust_remote_code=spec.trust_remote_code)
            model, fresh = _load_checkpoint(source.folder, spec, problem, head, dtype or torch.float32)
            _draw(model, fresh, seed)
    _check_vocabulary(model, tokenizer, source.folder or f"model.random of {spec.name}")
    writes = problem == "generation"
    fresh_modules = () if writes else (_outermost(model, fresh) or fresh_head(model))
    digest = fingerprint(model, fresh=fresh_modules)
    new_rows = _add_tokens(model, tokenizer, spec.add_tokens, seed)
    skip = output_embedding(model)
    if spec.quantization != "none":
        where = device or torch.device("cpu")
        _quantize(model, spec.quantization, [*fresh_modules, *skip], where, keep_original=keep_original)
    # Decoders find the last token of a text, which their head reads, by what the config calls padding.
    model.config.pad_token_id = tokenizer.pad_token_id
    forgo_cache(model)
    quicken(model)
    join_operations(model)
    max_length = _num_positions(model, tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_length)
    return BaseModel(
        model=model.eval(),
        tokenizer=tokenizer,
        family=model.config.model_type,
        groups=layer_groups(model.config.model_type, spec.targets),
        fresh=fresh_modules,
        drawn=() if writes else tuple(fresh),
        skip=skip,
        max_length=max_length,
        task_type=task_type(model.config, problem),
        decoder_start=decoder_start(model.config, model.generation_config.to_dict()) if writes else None,
        source=source.text,
        base_name=source.base_name,
        revision=source.revision,
        fingerprint=digest,
        quantized=quantized_size(model),
        new_rows=new_rows,
    )


def drawn_anew(base: BaseModel, seed: int) -> dict[str, torch.Tensor]:
    """What the new modules of `base` would start from if it were loaded with this seed, by parameter."""
    import torch

    parameters = {name: base.model.get_parameter(name) for name in base.drawn}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with quiet(), torch.random.fork_rng(devices=[]):
        _draw(base.model, base.drawn, seed)
    drawn = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data.copy_(before[name])
    return drawn


def save_config(model: PreTrainedModel, folder: Path) -> None:
    """Write the config that, beside all of the model's weights in fp32, makes `folder` a checkpoint of its own."""
    config = copy.deepcopy(model.config)
    config.dtype = "float32"
    config.save_pretrained(str(folder))


def _head_settings(num_outputs: int, labels: Sequence[str] | None, problem: str) -> dict[str, Any]:
    if problem == "generation":
        return {}
    problem_type = "regression" if problem == "regression" else "single_label_classification"
    settings: dict[str, Any] = {"num_labels": num_outputs, "problem_type": problem_type}
    if labels is not None:
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {label: position for position, label in enumerate(labels)}
    return settings


def _load_checkpoint(
    folder: Path, spec: ModelSpec, problem: str, head: Mapping[str, Any], dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """The model in `folder`, and the names of the parameters that the checkpoint lacks."""
    config = load_config(folder, spec)
    auto_class = class_for(config, problem, folder)
    _configure(config, head, spec)
    load = partial(
        auto_class.from_pretrained,
        str(folder),
        config=config,
        dtype=dtype,
        use_safetensors=True,
        # Other shapes are refused below, where they can be named; transformers only logs them.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=spec.trust_remote_code,
    )
    with explained(folder, "weights"), valueless_on_meta():
        # Code of the checkpoint's own may do anything while it is imported.
        model, info = load() if spec.trust_remote_code else lean(load)
    _check_loaded(folder, model, info, problem)
    # Loaded tensors lie in the mapped file: at odd addresses, where other kernels round differently, and
    # at the mercy of whoever writes to that file.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, sorted(info["missing_keys"])


def _build_random(
    spec: ModelSpec, problem: str, head: Mapping[str, Any], dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A model of random weights with a tokenizer of its own, and the names of its head's parameters."""
    config, tokenizer = random_config(spec)
    with explained(Path("model.random"), "model"):
        _configure(config, head, spec)
        auto_class = class_for(config, problem, f"model.random of {spec.name}")
        model = lean(partial(auto_class.from_config, config, dtype=dtype, trust_remote_code=False))
    inside = f"{model.base_model_prefix}."
    return model, tokenizer, [name for name, _ in model.named_parameters() if not name.startswith(inside)]


def _configure(config: PretrainedConfig, head: Mapping[str, Any], spec: ModelSpec) -> None:
    for key, value in head.items():
        setattr(config, key, value)
    for key, value in config.to_dict().items() if spec.dropout is not None else ():
        is_probability = isinstance(value, int | float) and not isinstance(value, bool)
        if is_probability and ("dropout" in key or "pdrop" in key):
            setattr(config, key, spec.dropout)
    if spec.head_dropout is not None:
        if not head or config.model_type not in HEAD_DROPOUT:
            lacks = f"null: {config.model_type} {'has no such dropout' if head else 'writes, and has no classifier'}"
            raise ConfigError("model.head_dropout", spec.head_dropout, lacks)
        setattr(config, HEAD_DROPOUT[config.model_type], spec.head_dropout)


def _draw(model: PreTrainedModel, names: Iterable[str], seed: int) -> None:
    """Initialise the named parameters as the model itself would, each from a generator of its own."""
    import torch

    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for name in names:
        parameter = model.get_parameter(name)
        parameter._is_hf_initialized = False
        for path in _ancestors(name):
            # A parent may draw for its children: ModernBERT's classifier is its model's to draw.
            model.get_submodule(path)._is_hf_initialized = False
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        model.initialize_weights()
        parameter._is_hf_initialized = True


def _ancestors(name: str) -> list[str]:
    """Modules that hold a parameter, outermost first: "a.b.weight" → "", "a", "a.b"."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _outermost(model: PreTrainedModel, fresh: Iterable[str]) -> tuple[str, ...]:
    """The largest modules all of whose parameters are `fresh`."""
    fresh = set(fresh)
    known = {path for name, _ in model.named_parameters() if name not in fresh for path in _ancestors(name)}
    modules = {next((path for path in _ancestors(name) if path not in known), name) for name in fresh}
    return tuple(sorted(modules))


def fresh_head(model: PreTrainedModel) -> tuple[str, ...]:
    """What stands outside the base model proper: the head of a checkpoint that brings one goes on training."""
    modules = model.named_children()
    return tuple(name for name, module in modules if module is not model.base_model and list(module.parameters()))


def output_embedding(model: PreTrainedModel) -> tuple[str, ...]:
    """Name of the layer that makes logits of words, if there is one: no target of all-linear."""
    output = model.get_output_embeddings()
    return tuple(name for name, module in model.named_modules() if module is output)


def _num_positions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the position table suffices for."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            return int(module.num_embeddings) - first_position(module)
    return int(getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length)


def _check_loaded(folder: Path, model: PreTrainedModel, info: Mapping[str, Any], problem: str) -> None:
    for name, found, wanted in sorted(info["mismatched_keys"]):
        shapes = f"{name} has shape {list(found)} there, {list(wanted)} here"
        hint = "" if name.startswith(f"{model.base_model_prefix}.") else "; it was saved with a head for another task"
        raise ModelError(f"{printable(folder)}: {shapes}{hint}")
    # Only a head may be new, and the pooler, which checkpoints of masked language models lack.
    inside, pooler = f"{model.base_model_prefix}.", f"{model.base_model_prefix}.pooler."
    lost = sorted(
        name
        for name in info["missing_keys"]
        if problem == "generation" or (name.startswith(inside) and not name.startswith(pooler))
    )
    if lost:
        raise ModelError(f"{printable(folder)}: its weights lack {printable(lost[0])} and {len(lost) - 1} more")


def _add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], seed: int
) -> tuple[int, ...]:
    """The numbers of new tokens, each with a drawn row in the embedding and the output layer, which grow if need be."""
    import torch

    from lora_cli.nn import draw_rows

    if not tokens:
        return ()
    num_known = max(tokenizer.get_vocab().values()) + 1
    numbers = add_tokens(tokenizer, tokens)
    # Many checkpoints have more rows than tokens, for round sizes.
    if max(numbers) >= model.get_input_embeddings().weight.shape[0]:
        with quiet(), torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(max(numbers) + 1, mean_resizing=False)
    draw_rows(model, numbers, num_known=num_known, seed=seed)
    return tuple(numbers)


def _quantize(
    model: PreTrainedModel, kind: str, skip: Sequence[str], device: torch.device, *, keep_original: bool
) -> None:
    from lora_cli.nn import quantize

    if device.type == "mps":
        raise ConfigError("model.quantization", kind, "not on device.name=mps")
    quantize(model, kind, skip=skip, device=device, keep_original=keep_original)


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: object) -> None:
    rows = model.get_input_embeddings().num_embeddings
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        numbers = f"token {printable(token, 40)} has number {largest}, the model has embeddings for {rows}"
        raise ModelError(f"{printable(where)}: the tokenizer does not fit the model: {numbers}")
