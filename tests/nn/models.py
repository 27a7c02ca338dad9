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
    "modernbert": _BERT | {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
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


_LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_LLAMA |= {"intermediate_size": 24, "max_position_embeddings": 24}
_NEOX = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 2}
_FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": False}
_BART = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 2), ("ffn_dim", 24))}
_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 24}
_EXPERTS = _LLAMA | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
# The fast implementation knows no fp64.
_EXPERTS |= {"experts_implementation": "eager"}
LM_CONFIGS: dict[str, dict[str, object]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24},
    "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"ffn_dim": 24, "max_position_embeddings": 24},
    "gpt_neox": _NEOX | {"max_position_embeddings": 24},
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    | {"max_position_embeddings": 24},
    "bloom": _BLOOM,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 4},
    "gemma": _LLAMA | {"head_dim": 4},
    "gemma2": _LLAMA | {"head_dim": 4},
    "gemma3_text": _LLAMA | {"head_dim": 4},
    "phi": _NEOX | {"max_position_embeddings": 24},
    "phi3": _LLAMA,
    "falcon": _FALCON | {"multi_query": False},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS | {"moe_intermediate_size": 8},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},
    "bart": {"d_model": 16} | _BART,
}
"""Decoders and encoder-decoders: what makes them tiny."""


def tiny_lm(family: str, **settings: object) -> nn.Module:
    """A language model or encoder-decoder; the same weights at each call, large enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    shared = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(family, **(shared | LM_CONFIGS[family] | settings))
    torch.manual_seed(7)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: nn.Module = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model


def lm_logits(model: nn.Module) -> torch.Tensor:
    """Output for one fixed batch of two rows of equal length."""
    ids = torch.tensor([[2, 5, 9, 11, 30, 3], [2, 8, 7, 3, 17, 38]])
    batch = {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if _is_encoder_decoder(model) else {"input_ids": ids}
    with torch.no_grad():
        result: torch.Tensor = model(**batch).logits
    return result


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(model.config.is_encoder_decoder)
