"""Trainings on one base: each is the run that it would be alone, whether they take turns or share each batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_cli import together
from lora_cli.commands import train
from lora_cli.engine import mixed_step
from lora_cli.experiment import Experiment
from lora_cli.models import load_base
from lora_cli.spec import (
    ClassificationSpec,
    DataSpec,
    GenerationSpec,
    LoraSpec,
    ModelSpec,
    TrackerSpec,
    TrainDeviceSpec,
    TrainRun,
    TrainSpec,
)
from lora_cli.together import Part, common, train_together, why_alone

_SHARED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {**_SHARED, "intermediate_size": 64}
DECODER = {"n_embd": 32, "n_layer": 2, "n_head": 2}
OPT = {**_SHARED, "ffn_dim": 64, "word_embed_proj_dim": 32}
INTENTS = ClassificationSpec(
    name="support_intents", data=DataSpec(embedded="support_intents", train_limit=20, validation_limit=8)
)
# Larger steps make more of fp32's rounding than the millionth that losses are held to.
SHORT = TrainSpec(batch_size=4, accumulation=2, epochs=2, log_every=1, lr=5e-3)


def spec(family: str = "bert", sizes: dict[str, int] = SIZES, **changes: object) -> TrainRun:
    """A short training with every dropout on."""
    model = ModelSpec(name="tiny", family=family, random=sizes, dropout=0.2)
    lora = LoraSpec(r=2, dropout=0.2)
    device = TrainDeviceSpec(name="cpu", threads=1)
    return replace(TrainRun(task=INTENTS, model=model, lora=lora, train=SHORT, device=device), **changes)


def several(of: TrainRun) -> list[TrainRun]:
    """Trainings that differ in all that may differ on one base."""
    return [
        of,
        replace(of, lora=LoraSpec(r=4, alpha=2, dropout=0.1), train=replace(SHORT, lr=3e-3, data_seed=0)),
        replace(of, lora=LoraSpec(r=3, scaling="alpha/sqrt(r)"), train=replace(SHORT, epochs=1, dropout_seed=7)),
    ]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_together(specs: Sequence[TrainRun], *, mixed: bool, at_once: int = 8) -> dict[int, str | None]:
    """The ends of these trainings, in folders together/0 and so on."""
    ends: dict[int, str | None] = {}
    parts = [Part(number, each, Path(f"together/{number}"), ()) for number, each in enumerate(specs)]
    train_together(parts, at_once=at_once, mixed=mixed, tell=ends.__setitem__)
    return ends


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters each mixed batch had."""
    found: list[int] = []
    original = mixed_step.gradients
    monkeypatch.setattr(
        mixed_step, "gradients", lambda bank, wanted: found.append(len(wanted)) or original(bank, wanted)
    )
    return found


def test_in_turns_each_training_is_the_run_it_would_be_alone_to_the_last_bit(sizes: list[int]) -> None:
    dora = replace(spec(), lora=LoraSpec(variant="dora", r=2, dropout=0.2))
    adalora = replace(
        spec(), lora=LoraSpec(variant="adalora", r=9, dropout=0.2), train=replace(SHORT, epochs=6, restore_best=False)
    )
    specs = [*several(spec()), dora, adalora, replace(spec(), train=replace(SHORT, epochs=6, patience=1, lr=0.5))]
    assert run_together(specs, mixed=False) == dict.fromkeys(range(6))
    assert sizes == []
    for number, each in enumerate(specs):
        train.run(each, directory=Path(f"alone/{number}"))
        assert metrics(Path(f"together/{number}")) == metrics(Path(f"alone/{number}"))
        assert adapter(Path(f"together/{number}")) == adapter(Path(f"alone/{number}"))
    stopped = json.loads(Path("together/5/run.json").read_text())
    assert stopped["steps"] < json.loads(Path("together/4/run.json").read_text())["steps"], "patience is each one's own"
    assert stopped["fused"] == 6


@pytest.mark.parametrize(
    ("family", "shape"), [("bert", SIZES), ("roberta", SIZES), ("gpt2", DECODER), ("opt", OPT), ("llama", SIZES)]
)
def test_mixed_in_one_batch_losses_are_those_alone_with_every_dropout_on(
    family: str, shape: dict[str, int], sizes: list[int]
) -> None:
    of = spec(family, shape)
    if family in ("gpt2", "opt", "llama"):
        Path("talk.jsonl").write_text(
            "".join(json.dumps({"a": "word " * (n % 5 + 1), "b": "answer " * (n % 3 + 1)}) + "\n" for n in range(20))
        )
        data = DataSpec(train="talk.jsonl", validation="talk.jsonl")
        of = replace(
            of,
            task=GenerationSpec(name="talk", data=data, prompt="{a}", target="{b}", metrics=["perplexity"]),
        )
    dora = [replace(of, lora=LoraSpec(variant="dora", r=2, dropout=0.2))] if family in ("bert", "llama") else []
    specs = [*several(of), *dora]
    assert run_together(specs, mixed=True) == dict.fromkeys(range(len(specs)))
    assert max(sizes) == len(specs)
    for number, each in enumerate(specs):
        train.run(each, directory=Path(f"alone/{number}"))
        found, wanted = metrics(Path(f"together/{number}")), metrics(Path(f"alone/{number}"))
        assert len(found) == len(wanted)
        for here, there in zip(found, wanted, strict=True):
            assert here.keys() == there.keys()
            losses = [key for key in here if key.endswith("loss")]
            assert [here[key] for key in losses] == pytest.approx([there[key] for key in losses], abs=1e-6)


def test_where_logits_of_all_would_be_too_many_they_take_turns(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("talk.jsonl").write_text("".join(json.dumps({"a": "word", "b": "answer " * 3}) + "\n" for _ in range(20)))
    data = DataSpec(train="talk.jsonl", validation="talk.jsonl")
    task = GenerationSpec(name="talk", data=data, prompt="{a}", target="{b}", metrics=["perplexity"])
    specs = several(spec("gpt2", DECODER, task=task))[:2]
    monkeypatch.setattr("lora_cli.late_logits._WHOLE", 1)
    assert run_together(specs, mixed=True) == dict.fromkeys(range(2))
    assert sizes == []


def test_mixed_layers_that_are_computed_again_draw_what_they_drew() -> None:
    specs = several(spec(train=replace(SHORT, epochs=1)))[:2]
    assert run_together(specs, mixed=True) == dict.fromkeys(range(2))
    for number, each in enumerate(specs):
        specs[number] = replace(each, train=replace(each.train, checkpointing=True))
    Path("together").rename("kept")
    assert run_together(specs, mixed=True) == dict.fromkeys(range(2))
    for number in range(2):
        assert metrics(Path(f"together/{number}")) == metrics(Path(f"kept/{number}"))
        assert adapter(Path(f"together/{number}")) == adapter(Path(f"kept/{number}"))


def test_heads_and_rows_are_drawn_by_each_training_s_own_seed() -> None:
    base = load_base(spec().model, num_outputs=2, labels=None, problem="classification", seed=0)
    base.model.base_model.save_pretrained("checkpoint")
    base.tokenizer.save_pretrained("checkpoint")
    model = ModelSpec(name="tiny", path="checkpoint")
    specs = [replace(spec(model=model), seed=seed) for seed in (1, 2)]
    assert common(specs[0]) == common(specs[1])
    assert run_together(specs, mixed=True) == {0: None, 1: None}
    for number, each in enumerate(specs):
        train.run(each, directory=Path(f"alone/{number}"))
        assert metrics(Path(f"together/{number}"))[0] == pytest.approx(metrics(Path(f"alone/{number}"))[0], abs=1e-6)
    assert metrics(Path("alone/0"))[0] != pytest.approx(metrics(Path("alone/1"))[0], abs=1e-3)


@pytest.mark.parametrize("mixed", [False, True])
def test_one_that_fails_leaves_the_others_as_they_are_and_another_takes_its_place(
    mixed: bool, sizes: list[int]
) -> None:
    bad = replace(spec(), train=replace(SHORT, lr=1e30, max_grad_norm=None))
    unfit = replace(spec(), lora=LoraSpec(targets=["nothing"]))
    ends = run_together([spec(), bad, unfit, several(spec())[1]], mixed=mixed, at_once=2)
    assert (ends[0], ends[3]) == (None, None)
    assert "no step was taken with it" in str(ends[1])
    assert "lora.targets" in str(ends[2])
    assert Path("together/1/output.txt").read_text().splitlines()[-1] == f"lora train: {ends[1]}"
    assert not sizes or max(sizes) == 2
    train.run(spec(), directory=Path("alone"))
    assert metrics(Path("alone"))[-1] == pytest.approx(metrics(Path("together/0"))[-1], abs=1e-6)


def test_the_base_is_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[torch.nn.Module] = []
    original = Experiment.beside.__func__

    def beside(cls: type[Experiment], *args: object, **settings: object) -> Experiment:
        experiment = original(cls, *args, **settings)
        models.append(experiment.base.model)
        return experiment

    monkeypatch.setattr(Experiment, "beside", classmethod(beside))
    run_together(several(spec()), mixed=True)
    assert len(models) == 3
    first, *others = ({p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in models)
    assert all(first == other for other in others)
    own = [{p.data_ptr() for p in model.parameters() if p.requires_grad} for model in models]
    assert len(set.union(*own)) == sum(map(len, own))


def test_a_training_that_was_begun_goes_on_from_its_checkpoint() -> None:
    specs = [
        replace(each, resume="auto", train=replace(each.train, epochs=3, save_every=1)) for each in several(spec())
    ]
    calls: list[int] = []
    original = mixed_step.gradients

    def gradients(bank: object, wanted: dict[str, object]) -> object:
        calls.append(len(wanted))
        if len(calls) == 6:
            raise RuntimeError
        return original(bank, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed_step, "gradients", gradients)
        ends = run_together(specs, mixed=True)
    assert list(ends.values()) == ["RuntimeError: "] * 3
    assert run_together(specs, mixed=True) == dict.fromkeys(range(3))
    for number, each in enumerate(specs):
        assert "resumes" in Path(f"together/{number}/output.txt").read_text()
        train.run(replace(each, resume="never"), directory=Path(f"alone/{number}"))
        found, wanted = metrics(Path(f"together/{number}")), metrics(Path(f"alone/{number}"))
        assert [row.get("train/loss") for row in found] == pytest.approx([row.get("train/loss") for row in wanted])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lora": LoraSpec(variant="full", targets=[])}, "lora.variant=full"),
        ({"lora": LoraSpec(variant="dylora", r=4)}, "lora.variant=dylora"),
        ({"lora": LoraSpec(init="eva")}, "lora.init=eva"),
        ({"train": TrainSpec(cache="memory")}, "train.cache=memory"),
        ({"tracker": TrackerSpec(name="wandb")}, "tracker=wandb"),
        ({"tracker": TrackerSpec(name="tensorboard")}, None),
        ({}, None),
    ],
)
def test_what_needs_a_process_of_its_own_is_named(changes: dict[str, object], why: str | None) -> None:
    assert why_alone(spec(**changes)) == why


def test_only_what_shares_base_task_and_shape_of_batch_is_put_together() -> None:
    assert len({common(each) for each in several(spec())}) == 1
    others = [
        spec("roberta"),
        spec(task=replace(INTENTS, max_length=64)),
        spec(train=replace(SHORT, batch_size=8)),
        spec(train=replace(SHORT, checkpointing=True)),
        spec(device=TrainDeviceSpec(name="cpu", threads=2)),
        spec(seed=1),
    ]
    assert len({common(each) for each in [spec(), *others]}) == 7, "weights that are drawn have the seed's"


def test_a_process_of_several_says_what_ended_it(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(together, "leave", sys.exit)
    part = Part(0, spec(model=ModelSpec(name="tiny", path="nowhere")), Path("x"), ())
    with pytest.raises(SystemExit, match="1"):
        together.work([part], 1, None, None)
    assert capsys.readouterr().err.startswith("lora train: ")
