"""llama.cpp's file of an adapter holds its updates, by the names and in the order of rows of the base's own tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from lora_cli.errors import AdapterError
from lora_cli.nn.gguf_file import Heads, gguf_tensors, save_gguf
from lora_cli.nn.stored import Factors, StoredAdapter

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
HEADS = Heads(layers=2, query=4, key=2)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40, "head_dim": 8}
R, SCALING = 8, 2.0


def adapter_of(family: str) -> StoredAdapter:
    """Random factors for every linear layer of a tiny model."""
    config = AutoConfig.for_model(family, **SIZES, num_attention_heads=HEADS.query, num_key_value_heads=HEADS.key)
    linear = {
        name: module.weight.shape
        for name, module in AutoModelForCausalLM.from_config(config).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    layers = {name: Factors(torch.randn(R, i), torch.randn(o, R), SCALING) for name, (o, i) in linear.items()}
    return StoredAdapter({}, layers)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_updates_read_back_are_those_of_the_adapter(family: str, tmp_path: Path) -> None:
    stored = adapter_of(family)
    save_gguf(tmp_path / "a.gguf", gguf_tensors(stored, family, HEADS), family=family, alpha=SCALING * R)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    said = {key: reader.fields[key].contents() for key in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert said == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 16.0}
    tensors = {each.name: torch.from_numpy(each.data.copy()) for each in reader.tensors}
    assert len(tensors) == 2 * len(stored.layers) == 28
    # transformers' own way from llama.cpp's weights to its own.
    processor = LlamaTensorProcessor(config={"num_attention_heads": HEADS.query, "num_key_value_heads": HEADS.key})
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, layer in stored.layers.items():
        theirs = f"blk.{name.split('.')[2]}.{names[name.rpartition('.')[2]]}.weight"
        A, B = tensors[f"{theirs}.lora_a"], tensors[f"{theirs}.lora_b"]
        update = (said["adapter.lora.alpha"] / B.shape[1] * B @ A).numpy()
        if family in ("llama", "mistral"):
            update = processor.process(update, theirs).weights
        torch.testing.assert_close(torch.as_tensor(update), layer.scaling * layer.B @ layer.A)


def test_a_layer_without_a_name_there_is_refused() -> None:
    layers = {"model.layers.0.self_attn.other": Factors(torch.randn(R, 4), torch.randn(4, R), 1.0)}
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.other: llama\.cpp has no name"):
        gguf_tensors(StoredAdapter({}, layers), "llama", HEADS)
