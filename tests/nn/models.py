"""Tiny random models of the families that the tests adapt, and the way tests move parameters off their start."""

from __future__ import annotations

import torch
from torch import nn

FAMILIES = ("bert", "roberta", "distilbert", "albert", "deberta-v2")
_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_CONFIGS: dict[str, dict[str, object]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "albert": _BERT | {"embedding_size": 12},
    "deberta": _BERT | {"pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": _BERT | {"pos_att_type": ["c2p", "p2c"], "relative_attention": True},
}
FRESH = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "albert": ("classifier",),
    "deberta": ("pooler.dense", "classifier"),
    "deberta-v2": ("pooler.dense", "classifier"),
}
QUERY_VALUE = {
    "bert": ["query", "value"],
    "roberta": ["attention.self.query", "attention.self.value"],
    "distilbert": ["q_lin", "v_lin"],
    "albert": ["attention.query", "attention.value"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
}


def tiny(family: str, **settings: object) -> nn.Module:
    """A classifier of three classes; the same weights at each call."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    shared = {"vocab_size": 40, "max_position_embeddings": 24, "num_labels": 3, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **(shared | _CONFIGS[family] | settings))
    torch.manual_seed(7)
    model: nn.Module = AutoModelForSequenceClassification.from_config(config).eval()
    return model


def logits(model: nn.Module) -> torch.Tensor:
    """Output for one fixed batch of two rows, the second padded."""
    ids = torch.tensor([[2, 5, 9, 11, 30, 3], [2, 8, 7, 3, 0, 0]])
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, attention_mask=(ids > 0).long()).logits
    return result


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """`model` with every trainable parameter moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model
