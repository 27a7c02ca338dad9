"""What is known of a base model without its weights: tokenizer, config, and what follows from these.

Knows transformers and ModelSpec; nothing of rows or adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.errors import ModelError, UnknownName, printable
from lora_cli.families import FAMILIES
from lora_cli.lean_imports import from_transformers, lean
from lora_cli.sources import check_checkpoint, find_source, read_json
from lora_cli.spec import ModelSpec
from lora_cli.tokenizer import add_tokens, build_tiny_tokenizer, explained, load_tokenizer, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "ModelReader",
    "class_for",
    "decoder_start",
    "load_config",
    "load_reader",
    "random_config",
    "task_type",
]

_COUNT_FROM_PAD = ("camembert", "roberta", "xlm-roberta")
"""Families whose positions are counted from behind the pad token's number."""


@dataclass(frozen=True, kw_only=True)
class ModelReader:
    """What encoding rows takes to know of a model: all but its weights."""

    tokenizer: PreTrainedTokenizerBase
    decoder_start: int | None
    """As in `BaseModel`."""
    config: PretrainedConfig
    family: str
    """transformers' model_type."""
    source: str
    """Where it came from, for people."""
    base_name: str
    """Its hub id, where there is one."""


def load_reader(spec: ModelSpec, *, problem: str) -> ModelReader:
    """Tokenizer and config of the model that `load_base` would load; its weights need not even be there.

    Raises:
        ModelError, UnknownName: as `load_base`, as far as it can be told without weights.
    """
    source = find_source(spec, weights=False)
    with quiet():
        if source.folder is None:
            config, tokenizer = random_config(spec)
            generation: Mapping[str, Any] = {}
        else:
            check_checkpoint(source.folder, spec, weights=False)
            config = load_config(source.folder, spec)
            tokenizer = load_tokenizer(source.folder, trust_remote_code=spec.trust_remote_code)
            file = source.folder / "generation_config.json"
            generation = read_json(file) if file.is_file() else {}
        class_for(config, problem, source.folder or f"model.random of {spec.name}")
    add_tokens(tokenizer, spec.add_tokens)
    tokenizer.model_max_length = min(tokenizer.model_max_length, _positions_of(config, tokenizer))
    return ModelReader(
        tokenizer=tokenizer,
        decoder_start=decoder_start(config, generation) if problem == "generation" else None,
        config=config,
        family=config.model_type,
        source=source.text,
        base_name=source.base_name,
    )


def load_config(folder: Path, spec: ModelSpec) -> PretrainedConfig:
    """The config in a checkpoint's folder."""
    load = partial(
        from_transformers("AutoConfig").from_pretrained, local_files_only=True, trust_remote_code=spec.trust_remote_code
    )
    with explained(folder, "config"):
        return lean(lambda: load(str(folder)))


def random_config(spec: ModelSpec) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The config that model.random describes, with the tiny tokenizer that fits it.

    Raises:
        UnknownName: model.family or a key of model.random is none.
    """
    assert spec.family is not None, "ModelSpec asks for a family where there is `random`"
    if spec.family not in FAMILIES:
        raise UnknownName("model.family", spec.family, FAMILIES, "family with random weights")
    settings = dict(spec.random or {})
    AutoConfig = from_transformers("AutoConfig")
    known = lean(lambda: AutoConfig.for_model(spec.family)).to_dict()
    allowed = [*known, *FAMILIES[spec.family].undeclared]
    for key in settings:
        if key not in allowed:
            raise UnknownName("model.random", key, allowed, f"setting of {spec.family}")
    tokenizer = build_tiny_tokenizer(token_types=settings.get("type_vocab_size", known.get("type_vocab_size", 0)) > 1)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    ids |= {f"{role}_token_id": tokenizer.cls_token_id for role in ("cls", "bos")}
    ids |= {f"{role}_token_id": tokenizer.sep_token_id for role in ("sep", "eos")}
    with explained(Path("model.random"), "model"):
        config = AutoConfig.for_model(spec.family, **({key: ids[key] for key in ids if key in known} | settings))
    return config, tokenizer


def task_type(config: PretrainedConfig, problem: str) -> str:
    """What PEFT calls a task on this architecture."""
    if problem != "generation":
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"


def class_for(config: PretrainedConfig, problem: str, where: object) -> Any:
    """transformers' Auto class for the task.

    Raises:
        ModelError: it has no class for this architecture, or the architecture is not made for it.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    name, table = {
        "SEQ_CLS": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
        "CAUSAL_LM": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
        "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    }[task_type(config, problem)]
    family = FAMILIES.get(config.model_type)
    # transformers would give an encoder a causal mask, and a head that was never trained for it.
    reads_only = problem == "generation" and family is not None and family.kind == "encoder"
    if reads_only or (config.model_type not in getattr(modeling_auto, table) and not hasattr(config, "auto_map")):
        found = ", ".join(config.architectures or ["a model"])
        why = "it is an encoder, which reads but does not write" if reads_only else f"{name} has no class for it"
        raise ModelError(
            f"{printable(where)}: holds {printable(found, 60)} ({config.model_type}), not made for this task: {why}"
        )
    return getattr(transformers, name)


def decoder_start(config: PretrainedConfig, generation: Mapping[str, Any]) -> int | None:
    """The token that an encoder-decoder's answer starts from; `generation` are a checkpoint's settings for generating.

    Raises:
        ModelError: neither names one.
    """
    if not config.is_encoder_decoder:
        return None
    for start in (getattr(config, "decoder_start_token_id", None), generation.get("decoder_start_token_id")):
        if start is not None:
            return int(start)
    raise ModelError("the model's config lacks decoder_start_token_id, the token that an answer starts from")


def _positions_of(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the position table will suffice for."""
    most = int(getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length)
    return most - (config.pad_token_id + 1 if config.model_type in _COUNT_FROM_PAD else 0)
