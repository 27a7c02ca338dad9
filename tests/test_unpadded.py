"""Models without padding compute what they compute with it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lora_cli import products
from lora_cli.models import fresh_head
from lora_cli.nn import inject
from lora_cli.reader import random_config
from lora_cli.row_attention import lay
from lora_cli.spec import LoraSpec, ModelSpec
from lora_cli.tasks.sequences import IGNORED, learnt
from lora_cli.unpadded import num_laid, remove_padding, takes_labels
from nn.models import tiny_lm

CONF = Path(__file__).parents[1] / "conf" / "model"
FAMILIES = ("tiny-bert", "tiny-roberta", "tiny-electra", "tiny-distilbert", "tiny-albert", "tiny-modernbert")
LENGTHS = [7, 3, 90, 7, 12, 70, 41]


@pytest.fixture(params=[1, 16], ids=["as many", "filled up"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens are filled up to a multiple of it."""
    number: int = request.param
    monkeypatch.setattr(products, "filled", lambda tokens: -(-tokens // number) * number)
    return number


def build(name: str, **changes: object) -> torch.nn.Module:
    """A model as transformers builds it, with its padding; `changes` are of its config."""
    config, tokenizer = random_config(ModelSpec(**yaml.safe_load((CONF / f"{name}.yaml").read_text())))
    config.pad_token_id = tokenizer.pad_token_id
    for key, value in {"num_labels": 3, **changes}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def batch(lengths: list[int], pad: int, *, types: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """Random tokens, padded on the right."""
    width = max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 90, mask.shape, generator=torch.Generator().manual_seed(seed))
    found = {"input_ids": ids * mask + pad * (1 - mask), "attention_mask": mask}
    return found | ({"token_type_ids": (torch.arange(width) > 4).long() * mask} if types else {})


def logits_and_gradients(model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Gradients of all parameters, of a loss that weighs every logit differently."""
    model.zero_grad()
    logits = model(**inputs).logits
    weights = torch.linspace(1, 2, logits.numel()).view_as(logits)
    (logits * weights).sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def check_equal(model: torch.nn.Module, inputs: dict[str, Tensor]) -> None:
    before, gradients = logits_and_gradients(model, inputs)
    assert remove_padding(model)
    after, same_gradients = logits_and_gradients(model, inputs)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    owners = torch.arange(len(inputs["input_ids"])) % 3
    with torch.no_grad():
        for arguments in (inputs, {**inputs, "owners": owners}):
            torch.testing.assert_close(model(**arguments).logits, before, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(same_gradients, gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_the_padded_batch(name: str) -> None:
    model = build(name)
    types = "token_type_ids" in model.forward.__code__.co_varnames and "roberta" not in name
    check_equal(model, batch(LENGTHS, model.config.pad_token_id, types=types))


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernbert_keeps_its_window_and_either_pooling(pooling: str) -> None:
    model = build("tiny-modernbert", classifier_pooling=pooling, local_attention=16)
    assert max(LENGTHS) > model.model.layers[1].attn.sliding_window
    check_equal(model, batch(LENGTHS, model.config.pad_token_id))


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 80), min_size=1, max_size=9))
def test_any_lengths_in_any_order(lengths: list[int]) -> None:
    padded, unpadded = build("tiny-bert"), build("tiny-bert")
    assert remove_padding(unpadded)
    inputs = batch(lengths, 0)
    wanted = padded(**inputs).logits
    torch.testing.assert_close(unpadded(**inputs).logits, wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(unpadded(**inputs).logits, wanted, rtol=1e-5, atol=1e-6)


def test_a_row_of_infinities_stays_alone() -> None:
    model = build("tiny-bert")
    assert remove_padding(model)
    inputs = batch(LENGTHS, 0)
    with torch.no_grad():
        wanted = model(**inputs).logits
        inputs["input_ids"][1:2, :3] = 95
        model.get_input_embeddings().weight[95] = torch.inf
        found = model(**inputs).logits
    assert found[1].isnan().all()
    others = torch.arange(len(LENGTHS)) != 1
    torch.testing.assert_close(found[others], wanted[others])


def test_rows_of_one_owner_lie_beside_each_other() -> None:
    lengths, owners = torch.tensor([5, 2, 9, 2, 4]), torch.tensor([1, 0, 1, 0, 2])
    rows, order = lay(lengths, lengths.device, owners=owners)
    assert order.tolist() == [1, 3, 0, 2, 4]
    assert rows.starts.tolist() == [4, 0, 9, 2, 18]


def test_what_is_filled_in_lies_at_the_end_of_a_block_and_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "filled", lambda tokens: -(-tokens // 8) * 8)
    lengths = torch.tensor([5, 2, 9, 2, 6])
    rows, order = lay(lengths, lengths.device, [2, 1, 2], fills=True)
    assert order.tolist() == [1, 0, 2, 3, 4]
    assert rows.starts.tolist() == [2, 0, 8, 24, 26]
    assert rows.num_tokens == 32
    assert rows.owners().tolist() == [1] * 2 + [0] * 6 + [2] * 16 + [3] * 2 + [4] * 6
    # What fills up a block is no longer than its rows.
    assert [sorted(x for g in rows.groups if g.block == b for x in g.lengths.tolist()) for b in range(3)] == [
        [1, 2, 5],
        [7, 9],
        [2, 6],
    ]
    assert [group.block for group in rows.groups] == sorted(group.block for group in rows.groups)


def tokens_of_linears(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """How many tokens each linear layer computes."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(
                lambda _, args, out, name=name: found.update({name: args[0].shape[:-1].numel()})
            )
    model(**inputs)
    return found


@pytest.mark.parametrize(
    ("name", "all_of_the_last"),
    [
        ("tiny-bert", ("self.key", "self.value")),
        ("tiny-distilbert", ("k_lin", "v_lin", "out_lin")),
        ("tiny-modernbert", ("Wqkv",)),
    ],
)
def test_only_real_tokens_are_computed_and_of_the_last_layer_what_is_read(
    name: str, all_of_the_last: tuple[str, ...], step: int
) -> None:
    model = build(name)
    assert remove_padding(model)
    last = f".{model.config.num_hidden_layers - 1}."
    # An adapter put in later, around the modules that are hooked, is treated no otherwise.
    inject(model, LoraSpec(r=2, targets=["all-linear"]), groups={}, fresh=fresh_head(model))
    found = {
        place: tokens for place, tokens in tokens_of_linears(model, batch(LENGTHS, 0)).items() if ".layer" in place
    }
    assert len(found) > 4
    num_tokens = -(-sum(LENGTHS) // step) * step
    assert num_laid(model, sum(LENGTHS)) == num_tokens
    for place, tokens in found.items():
        is_narrow = last in place and not any(part in place for part in all_of_the_last)
        assert tokens == (len(LENGTHS) if is_narrow else num_tokens), place


def test_with_dropout_the_loss_is_the_same_on_average() -> None:
    padded, unpadded = (build("tiny-bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2) for _ in range(2))
    assert remove_padding(unpadded)
    inputs = batch([9, 30, 4], 0)
    means = []
    for model in (padded.train(), unpadded.train()):
        torch.manual_seed(3)
        with torch.no_grad():
            means.append(torch.stack([model(**inputs).logits for _ in range(300)]).std(0).mean().item())
    assert means[1] == pytest.approx(means[0], rel=0.1)
    assert means[0] > 0


def test_other_calls_are_computed_as_before() -> None:
    model = build("tiny-bert")
    inputs = batch([5, 9], 0)
    left = {name: value.flip(1) for name, value in inputs.items()}
    calls = [
        lambda: model(inputs["input_ids"], inputs["attention_mask"]),
        lambda: model(input_ids=inputs["input_ids"]),
        lambda: model(**left),
    ]
    before = [call().logits for call in calls]
    assert remove_padding(model)
    model(**inputs)
    for call, wanted in zip(calls, before, strict=True):
        assert torch.equal(call().logits, wanted)


def test_a_family_with_an_attention_of_its_own_is_left_alone() -> None:
    model = build("tiny-deberta")
    assert not remove_padding(model)
    assert not model._forward_pre_hooks


def test_the_config_that_is_saved_knows_nothing_of_it() -> None:
    model = build("tiny-bert")
    assert remove_padding(model)
    assert "unpadded" not in str(model.config.to_dict())


DECODERS = ("gemma", "gpt2", "gpt_neox", "llama", "mixtral", "opt", "phi", "qwen3", "qwen3_moe")
WINDOWED = ("gemma3_text", "mistral", "phi3", "qwen2")
SENTENCES = [7, 3, 20, 11]


def texts(*, prompt: int = 2) -> dict[str, Tensor]:
    """Rows of which all but a prompt is learnt."""
    found = batch(list(SENTENCES), 0)
    ids, mask = found["input_ids"] % 40, found["attention_mask"]
    is_learnt = (torch.arange(ids.shape[1]) >= prompt) & (mask == 1)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(is_learnt, ids, IGNORED)}


@pytest.mark.parametrize(
    ("family", "config"), [*((f, {}) for f in DECODERS), *((f, {"sliding_window": 5}) for f in WINDOWED)]
)
def test_a_decoder_gives_the_logits_of_its_labels(family: str, config: dict[str, int]) -> None:
    model, inputs = tiny_lm(family, use_cache=False, **config), texts()
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    wanted, _ = learnt(model(**plain).logits, inputs)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), model.get_input_embeddings().weight)
    assert not takes_labels(model)
    assert remove_padding(model)
    assert takes_labels(model)
    found, labels = learnt(model(**inputs).logits, inputs)
    assert len(found) == len(labels) == sum(SENTENCES) - 2 * len(SENTENCES)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=5e-6)
    with torch.no_grad():
        for arguments in (inputs, {**inputs, "owners": torch.tensor([1, 0, 1, 0])}):
            # In the order of the labels in any case.
            alone, _ = learnt(model(**arguments).logits, inputs)
            torch.testing.assert_close(alone, wanted, rtol=1e-5, atol=5e-6)
    (same,) = torch.autograd.grad(found.square().sum(), model.get_input_embeddings().weight)
    torch.testing.assert_close(same, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    ("family", "all_of_the_last"),
    [("gpt2", "c_attn"), ("llama", "q_proj k_proj v_proj"), ("gpt_neox", "query_key_value")],
)
def test_a_decoder_computes_past_its_last_attention_what_predicts_a_label(family: str, all_of_the_last: str) -> None:
    model, inputs = tiny_lm(family, use_cache=False), texts()
    assert remove_padding(model)
    last = f".{model.config.num_hidden_layers - 1}."
    inject(model, LoraSpec(r=2, targets=["all-linear"]), groups={}, skip=("lm_head", "embed_out"))
    num_learnt = sum(SENTENCES) - 2 * len(SENTENCES)
    found = {
        place: tokens for place, tokens in tokens_of_linears(model, inputs).items() if "h." in place or "layer" in place
    }
    assert len(found) > 4
    for place, tokens in found.items():
        is_narrow = last in place and not any(part in place for part in all_of_the_last.split())
        assert tokens == (num_learnt if is_narrow else sum(SENTENCES)), place


def test_a_pass_that_breaks_off_in_the_last_layer_leaves_nothing_behind() -> None:
    model, inputs = tiny_lm("llama", use_cache=False), texts()
    assert remove_padding(model)
    wanted = model(**inputs).logits
    handle = model.model.layers[-1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    handle.remove()
    assert torch.equal(model(**inputs).logits, wanted)


def test_a_copy_made_between_steps_computes_as_the_model_does() -> None:
    model, inputs = tiny_lm("llama", use_cache=False), texts()
    assert remove_padding(model)
    wanted = model(**inputs).logits
    twin = copy.deepcopy(model)
    other = {**inputs, "labels": inputs["labels"].index_fill(1, torch.tensor([2, 3]), IGNORED)}
    torch.testing.assert_close(twin(**other).logits, model(**other).logits, rtol=0, atol=0)
    assert torch.equal(model(**inputs).logits, wanted)


def test_a_decoder_without_labels_and_its_generation_are_as_before() -> None:
    model, inputs = tiny_lm("llama"), texts()
    del inputs["labels"]
    left = {name: value.flip(1) for name, value in inputs.items()}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted, answers = model(**inputs).logits, model.generate(**left, **settings)
    assert remove_padding(model)
    assert torch.equal(model(**inputs).logits, wanted)
    assert torch.equal(model.generate(**left, **settings), answers)


@pytest.mark.parametrize("family", ["bloom", "falcon", "gemma2", "gpt_neo", "t5"])
def test_other_families_are_left_alone(family: str) -> None:
    model = tiny_lm(family)
    assert not remove_padding(model)
    assert not model._forward_pre_hooks
