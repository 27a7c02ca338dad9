"""A row of a mixed batch is computed as with its adapter alone, and gradients reach each adapter as if alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_cli.errors import AdapterError, ConfigError, UnknownName
from lora_cli.nn import fingerprint, inject, load_adapter, mixing, quantize, save_adapter
from lora_cli.nn.bank import Bank
from lora_cli.spec import LoraSpec
from lora_cli.unpadded import remove_padding

from .adapters import adapted_lm
from .models import FRESH, QUERY_VALUE, tiny, tiny_lm, trained

ROWS = ["a", None, "dora", "bias", "vera", "adalora", "a"]
LENGTHS = torch.tensor([6, 4, 5, 1, 2, 6, 3])
SPECS: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "alpha": 4.0},
    "b": {"r": 3, "alpha": 9.0, "scaling": "alpha/sqrt(r)", "targets": ["all-linear"]},
    "dora": {"r": 4, "alpha": 1.0, "variant": "dora"},
    "bias": {"r": 1, "alpha": 2.0, "bias": "all"},
    "vera": {"r": 8, "alpha": 16.0, "variant": "vera"},
    "adalora": {"r": 8, "alpha": 5.0, "variant": "adalora"},
    "pissa": {"r": 2, "alpha": 4.0, "init": "pissa"},
}
"""Adapters of different rank, scale, variant and targets."""
LM_TARGETS = {"gpt2": ["attn.c_attn:q+v", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"], "t5": ["q", "v", "wo"]}


def texts(vocabulary: int = 40, *, left: bool = False) -> dict[str, Tensor]:
    """Rows of LENGTHS tokens, padded."""
    mask = torch.arange(6) < LENGTHS[:, None]
    mask = mask.flip(1) if left else mask
    ids = torch.randint(3, vocabulary, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def filled(
    model: nn.Module, names: list[str], targets: list[str], **settings: Any
) -> tuple[Bank, dict[Any, nn.Module]]:
    """A bank of these adapters, moved off their start, and the model of each alone; None: the base."""
    bank = Bank(model, **settings)
    alone: dict[Any, nn.Module] = {None: model}
    for seed, name in enumerate(names):
        spec = LoraSpec(**{"targets": targets} | SPECS[name])
        alone[name] = trained(bank.add_new(name, spec, groups={}, seed=seed).model, seed + 1)
    return bank, alone


def encoder(family: str, *, packed: bool) -> tuple[Bank, dict[Any, nn.Module]]:
    model = tiny(family)
    if packed:
        assert remove_padding(model)
    return filled(model, [*SPECS], QUERY_VALUE[family], fresh=FRESH[family])


def rows_of(outputs: dict[Any, Tensor], names: list[str | None]) -> Tensor:
    return torch.stack([outputs[name][row] for row, name in enumerate(names)])


@torch.no_grad()
def check_mixed(
    bank: Bank, alone: Mapping[Any, Callable[..., Any]], names: list[str | None], inputs: dict[str, Tensor]
) -> None:
    wanted = {name: alone[name](**inputs).logits for name in {None, *names}}
    with bank.rows(names):
        found = bank.model(**inputs).logits
    torch.testing.assert_close(found, rows_of(wanted, names), rtol=1e-5, atol=1e-5)
    is_base = torch.tensor([name is None for name in names])
    assert torch.equal(found[is_base], wanted[None][is_base])
    assert torch.equal(bank.model(**inputs).logits, wanted[None])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert"])
def test_a_row_of_an_encoder_is_computed_as_with_its_adapter_alone(family: str, packed: bool) -> None:
    bank, alone = encoder(family, packed=packed)
    with torch.no_grad():
        outputs = [model(**texts()).logits for model in alone.values()]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(outputs) for b in outputs[:i]), "they differ"
    check_mixed(bank, alone, ROWS, texts())
    check_mixed(bank, alone, ["b", "pissa"] * 3 + [None], texts())
    check_mixed(bank, alone, ["dora"] * 7, texts())


@pytest.fixture(scope="module", params=[False, True], ids=["padded", "packed"])
def bert(request: pytest.FixtureRequest) -> tuple[Bank, dict[Any, nn.Module]]:
    return encoder("bert", packed=request.param)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_rows_may_have_any_adapters(bert: tuple[Bank, dict[Any, nn.Module]], data: st.DataObject) -> None:
    bank, alone = bert
    names = data.draw(st.lists(st.sampled_from([None, *SPECS]), min_size=7, max_size=7))
    chosen = data.draw(st.integers(1, 7))
    inputs = {name: value[:chosen] for name, value in texts().items()}
    check_mixed(bank, alone, names[:chosen], inputs)


@pytest.mark.parametrize("limit", [0, 10**12], ids=["each", "together"])
def test_updates_may_be_computed_together_or_one_by_one(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "_TOGETHER", limit)
    bank, alone = encoder("bert", packed=True)
    names = ["a", "b", None, "pissa", "adalora", "b", "a"]
    check_mixed(bank, alone, names, texts())
    for name in ("a", "b"):
        trained(alone[name], seed=9)
    check_mixed(bank, alone, names, texts())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_row_of_a_decoder_is_computed_as_with_its_adapter_alone(family: str, packed: bool) -> None:
    model, inputs = tiny_lm(family, use_cache=False), texts()
    if packed:
        assert remove_padding(model)
        # As many tokens are learnt as there are rows, but not one of each.
        inputs["labels"] = torch.where((inputs["input_ids"] % 3 == 0) & (inputs["attention_mask"] == 1), 1, -100)
    bank, alone = filled(model, ["a", "pissa"], LM_TARGETS[family])
    member = trained(bank.add_new("head", _head(family), groups={}).model, 5)
    names = ["a", None, "pissa", "head", "a", "head", "pissa"]
    alone["head"] = member
    if not packed:
        return check_mixed(bank, alone, names, inputs)
    owner = (inputs["labels"][:, 1:] >= 0).nonzero()[:, 0].tolist()
    assert len(owner) == len(names)
    assert owner != [*range(len(names))]
    with torch.no_grad():
        wanted = {name: alone[name](**inputs).logits for name in alone}
        with bank.rows(names):
            found = bank.model(**inputs).logits
    torch.testing.assert_close(found, rows_of(wanted, [names[row] for row in owner]), rtol=1e-5, atol=1e-5)
    return None


def _head(family: str) -> LoraSpec:
    """Something of its own past the tokens that are learnt: the last norm."""
    return LoraSpec(
        r=2, alpha=2.0, targets=LM_TARGETS[family][-1:], modules_to_save=["ln_f" if family == "gpt2" else "norm"]
    )


@pytest.mark.parametrize("decode", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_generated_texts_are_those_of_each_adapter_alone(family: str, decode: dict[str, int]) -> None:
    bank, alone = filled(
        tiny_lm(family), ["a", "dora", "pissa"], LM_TARGETS[family] if family != "gpt2" else ["c_attn"]
    )
    names = ["a", None, "dora", "pissa", "a", "dora", None]
    inputs = texts(left=family != "t5")

    def write(model: Any) -> Tensor:
        same = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found: Tensor = model.generate(**inputs, **same, **decode)
        return found.unflatten(0, (len(names), -1))

    wanted = {name: write(model) for name, model in alone.items()}
    assert len({tuple(answer.flatten().tolist()) for answer in wanted.values()}) == len(alone)
    with bank.rows(names):
        found = write(bank.model)
    assert torch.equal(found, rows_of(wanted, names))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradients_of_a_step_are_those_of_each_adapter_alone(packed: bool) -> None:
    bank, alone = encoder("bert", packed=packed)
    names, inputs = ["a", "b", "dora", "bias", "vera", "adalora", "pissa"], texts()
    for model in alone.values():
        model.double()
    weights = torch.linspace(-1, 1, 3, dtype=torch.float64)
    with bank.rows(names):
        (bank.model(**inputs).logits * weights).sum().backward()
    for row, name in enumerate(names):
        parameters = {key: p for key, p in alone[name].named_parameters() if p.requires_grad}
        found = {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}
        alone[name].zero_grad()
        (alone[name](**inputs).logits[row] * weights).sum().backward()
        assert found.keys() == parameters.keys()
        for key, p in parameters.items():
            # The query of a row of one token has no gradient, up to rounding.
            torch.testing.assert_close(found[key], p.grad, rtol=1e-6, atol=1e-12)
    assert all(p.grad is None for p in bank.model.parameters())


def test_each_adapter_drops_by_its_own_share() -> None:
    model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    bank = Bank(model, fresh=FRESH["bert"])
    specs = {name: LoraSpec(r=2, alpha=4.0, targets=["value"], dropout=p) for name, p in (("none", 0.0), ("half", 0.5))}
    for name, spec in specs.items():
        trained(bank.add_new(name, spec, groups={}).model)
    model.train()
    with torch.no_grad(), bank.rows(["none", "half"] * 3 + [None]):
        first, second = (model(**texts()).logits for _ in range(2))
    assert [bool((a == b).all()) for a, b in zip(first, second, strict=True)] == [True, False] * 3 + [True]
    model.eval()
    with torch.no_grad(), bank.rows(["none", "half"] * 3 + [None]):
        assert torch.equal(model(**texts()).logits, model(**texts()).logits)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Train an adapter in a model of its own and save it: save("bert", "name", num_labels=2, r=4)."""

    def saved(family: str, name: str, *, num_labels: int = 3, **spec: Any) -> Path:
        model = tiny(family, num_labels=num_labels)
        base = fingerprint(model, fresh=FRESH[family])
        settings = LoraSpec(**{"r": 2, "alpha": 4.0, "targets": QUERY_VALUE[family]} | spec)
        injection = inject(model, settings, groups={}, fresh=FRESH[family])
        trained(model, seed=len(name))
        facts = {"base_name": family, "revision": None, "task_type": "SEQ_CLS", "fingerprint": base, "extra": {}}
        save_adapter(model, injection, tmp_path / name, **facts)
        return tmp_path / name

    return saved


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_folders_are_served_with_label_sets_of_their_own(family: str, save: Callable[..., Path]) -> None:
    labels = {"two": 2, "three": 3, "five": 5}
    folders = {name: save(family, name, num_labels=number) for name, number in labels.items()}
    model = tiny(family)
    bank = Bank(model, fresh=FRESH[family], fingerprint=fingerprint(model, fresh=FRESH[family]))
    wanted = {}
    for name, folder in folders.items():
        bank.add(name, folder)
        own = tiny(family, num_labels=labels[name])
        load_adapter(own, folder, fresh=FRESH[family], fingerprint=None)
        wanted[name] = own(**texts()).logits
    names = ["two", "five", "three", "two", None, "five", "three"]
    wanted[None], labels[None] = model(**texts()).logits, 3
    with bank.rows(names):
        found = model(**texts()).logits
    assert found.shape == (7, 5)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row, : labels[name]], wanted[name][row], rtol=1e-5, atol=1e-5)
        assert (found[row, labels[name] :] == -torch.inf).all()
    with bank.rows(["two"] * 7):
        assert model(**texts()).logits.shape == (7, 2)


def test_another_base_and_a_damaged_adapter_are_refused_and_leave_the_bank_as_it_was(save: Callable[..., Path]) -> None:
    folder, model = save("bert", "one"), tiny("bert")
    bank = Bank(model, fresh=FRESH["bert"], fingerprint="another")
    with pytest.raises(AdapterError, match="another base model"):
        bank.add("one", folder)
    bank.add("one", folder, force_base=True)
    with pytest.raises(AdapterError, match="called one already"):
        bank.add("one", folder, force_base=True)
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(AdapterError, match="safetensors"):
        bank.add("two", folder, force_base=True)
    assert bank.names == ("one",)


def test_the_base_is_left_as_it_was_and_names_come_and_go(save: Callable[..., Path]) -> None:
    model = tiny("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bank, alone = filled(model, ["a", "bias"], QUERY_VALUE["bert"], fresh=FRESH["bert"])
    own = sum(p.nbytes for p in alone["a"].parameters() if p.requires_grad)
    assert bank.names == ("a", "bias")
    assert bank.bytes["a"] == own
    bank.add("file", save("bert", "file"))
    bank.remove("a")
    assert bank.names == tuple(bank.bytes) == ("bias", "file")
    with pytest.raises(UnknownName, match="There are: bias, file"), bank.rows(["a"]):
        pass
    with bank.rows(["bias", "file"] * 3 + [None]):
        model(**texts())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@torch.no_grad()
def test_a_bank_beside_another_has_its_adapters_and_a_batch_of_its_own(packed: bool, save: Callable[..., Path]) -> None:
    bank, alone = encoder("bert", packed=packed)
    beside = bank.beside()
    shared = zip(bank.model.parameters(), beside.model.parameters(), strict=True)
    assert all(a is b for a, b in shared), "no weight is there twice"
    ours, theirs = ["a", "b", "dora", None, "b", "a", None], ["dora", "a", "a", "a", None, "b", "b"]
    wanted = {name: alone[name](**texts()).logits for name in alone}
    with bank.rows(ours), beside.rows(theirs):
        for _ in range(2):
            found = bank.model(**texts()).logits, beside.model(**texts()).logits
    for logits, names in zip(found, (ours, theirs), strict=True):
        torch.testing.assert_close(logits, rows_of(wanted, names), rtol=1e-5, atol=1e-5)
    with beside.rows(theirs):
        bank.add("late", save("bert", "late"))
        bank.remove("pissa")
        beside.model(**texts())
    assert beside.names == bank.names
    check_mixed(
        beside, {**alone, "late": bank_alone(bank, "late"), None: beside.model}, ["late", "a"] * 3 + [None], texts()
    )


@torch.no_grad()
def test_a_bank_beside_another_knows_who_went_and_came_again() -> None:
    bank, _ = encoder("bert", packed=True)
    beside, names = bank.beside(), ["a"] * len(LENGTHS)
    with beside.rows(names):
        before = beside.model(**texts()).logits
    bank.remove("a")
    again = trained(bank.add_new("a", LoraSpec(r=2, targets=QUERY_VALUE["bert"]), groups={}, seed=9).model, 9)
    with beside.rows(names):
        found = beside.model(**texts()).logits
    assert not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(found, again(**texts()).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_of_one_token_each_have_their_own_heads() -> None:
    bank, alone = encoder("bert", packed=True)
    ids = torch.randint(3, 40, (len(ROWS), 1), generator=torch.Generator().manual_seed(2))
    check_mixed(bank, alone, ROWS, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def bank_alone(bank: Bank, name: str) -> Callable[..., Any]:
    """What a model with this adapter alone computes."""

    def compute(**inputs: Tensor) -> Any:
        with bank.rows([name] * len(LENGTHS)):
            return bank.model(**inputs)

    return compute


def test_a_batch_of_other_rows_is_refused() -> None:
    bank, _ = filled(tiny("bert"), ["a", "b"], ["query"], fresh=FRESH["bert"])
    for names in (["a", "b"], ["a", "b"] * 7, [None] * 3):
        with pytest.raises(AdapterError, match=f"a batch of 7 rows, and adapters for {len(names)}"), bank.rows(names):
            bank.model(**texts())
    with pytest.raises(AdapterError, match="of no rows"), bank.rows([]):
        pass
    with pytest.raises(AdapterError, match="in this bank already"), bank.rows(["a"]), bank.rows(["b"]):
        pass
    with pytest.raises(AdapterError, match="in this bank;"), bank.rows(["a"]):
        bank.add_new("c", LoraSpec(targets=["query"]), groups={})


def test_what_rows_share_is_of_one_adapter_or_refused() -> None:
    """DeBERTa's keys of distances are the same for all rows of a batch."""
    model = tiny("deberta-v2")
    bank, alone = filled(model, ["a", "b"], ["pos_key_proj"], fresh=FRESH["deberta-v2"])
    check_mixed(bank, alone, ["a"] * 7, texts())
    with (
        pytest.raises(AdapterError, match=r"pos_key_proj: its input .* one adapter here"),
        bank.rows(["a", "b"] * 3 + ["a"]),
    ):
        model(**texts())


def test_a_layer_that_is_never_called_is_refused() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    bank = Bank(attention)
    bank.add_new("a", LoraSpec(r=2, targets=["out_proj"]), groups={})
    x = torch.ones(2, 3, 8)
    with pytest.raises(AdapterError, match="out_proj: the model reads its weight"), bank.rows(["a", None]):
        attention(x, x, x)


def test_what_cannot_be_in_a_bank_is_refused_by_name(save: Callable[..., Path]) -> None:
    model = tiny("bert")
    bank = Bank(model, fresh=FRESH["bert"])
    for variant in ("dylora", "full"):
        settings = {"targets": [] if variant == "full" else ["query"], "variant": variant}
        with pytest.raises(ConfigError, match=rf"lora.variant={variant}: trains in a model of its own"):
            bank.add_new("x", LoraSpec(**settings), groups={})
    with pytest.raises(AdapterError, match="trained whole"):
        bank.add("x", save("bert", "x", variant="full", targets=[]))
    inject(model, LoraSpec(targets=["query"]), groups={}, fresh=FRESH["bert"])
    with pytest.raises(AdapterError, match="adapted already"):
        Bank(model)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_quantised_base_is_shared_too(storage: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny("bert", hidden_size=64, intermediate_size=64)
    quantize(model, storage, skip=FRESH["bert"], device=torch.device("cpu"))
    bank, alone = filled(model, ["a", "dora"], ["query", "output.dense"], fresh=FRESH["bert"])
    check_mixed(bank, alone, ["a", None, "dora", "a", "dora", "a", None], texts())


def test_embeddings_convolutions_and_new_tokens_are_served() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.scan, self.out = nn.Embedding(9, 6), nn.Conv1d(6, 4, 3, padding=1), nn.Linear(4, 9)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.out(self.scan(self.table(ids).transpose(1, 2)).transpose(1, 2))
            return y

    bank, alone = Bank(Reader()), {}
    specs = {"table": {"targets": ["table"]}, "scan": {"targets": ["scan"]}, "rows": {"targets": ["out"]}}
    for name, targets in specs.items():
        rows = [1, 7] if name == "rows" else []
        alone[name] = trained(bank.add_new(name, LoraSpec(r=2, **targets), groups={}, new_rows=rows).model)
    ids, names = torch.arange(4 * 5).view(4, 5) % 9, ["table", "scan", None, "rows"]
    wanted = {name: model(ids) for name, model in alone.items()} | {None: bank.model(ids)}
    with bank.rows(names):
        torch.testing.assert_close(bank.model(ids), rows_of(wanted, names))
    assert all((wanted[name] - wanted[None])[row].abs().max() > 0.01 for row, name in enumerate(names) if name)


def test_peft_computes_the_same_mixed_batch(tmp_path: Path) -> None:
    from peft import PeftModel

    names = ["a", "__base__", "b", "a", "b", "__base__", "b"]
    for seed, (name, spec) in enumerate(
        {"a": {"r": 2}, "b": {"r": 4, "alpha": 9.0, "scaling": "alpha/sqrt(r)"}}.items()
    ):
        adapted_lm(tmp_path / name, seed=seed, **spec)
    peer = PeftModel.from_pretrained(tiny_lm("llama"), str(tmp_path / "a"), adapter_name="a").eval()
    peer.load_adapter(str(tmp_path / "b"), adapter_name="b")
    bank = Bank(tiny_lm("llama"))
    for name in ("a", "b"):
        bank.add(name, tmp_path / name)
    with torch.no_grad(), bank.rows([None if name == "__base__" else name for name in names]):
        found = bank.model(**texts()).logits
        wanted = peer(**texts(), adapter_names=names).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_example_of_the_page_runs(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "film": 2, "parcel": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", model_input_names=names)
    for part in (tiny("roberta"), tokenizer):
        part.save_pretrained(tmp_path / "base-model")
    (tmp_path / "adapters").mkdir()
    for name, num_labels in (("tickets", 4), ("reviews", 2)):
        save("roberta", name, num_labels=num_labels).rename(tmp_path / "adapters" / name)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["logits"].isfinite().sum(1).tolist() == [4, 2, 3]
