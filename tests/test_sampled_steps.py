"""What is measured for a plan besides the steps."""

from __future__ import annotations

from dataclasses import dataclass

from lora_cli.sampled_steps import _longest
from lora_cli.spec import ClassificationSpec, LoraSpec, ModelSpec, TrainRun, TrainSpec


@dataclass(frozen=True)
class Text:
    """An example of which only the length is known."""

    num_tokens: int


@dataclass(frozen=True)
class Data:
    examples: list[Text]


@dataclass(frozen=True)
class Known:
    """An experiment of which only these are known."""

    spec: TrainRun
    data: dict[str, Data]


def test_a_scoring_is_foretold_from_the_longest_dozen_batches() -> None:
    spec = TrainRun(
        task=ClassificationSpec(name="x"),
        model=ModelSpec(name="tiny", family="bert"),
        lora=LoraSpec(),
        train=TrainSpec(eval_batch_size=2),
    )
    experiment = Known(spec, {"validation": Data([Text(length) for length in range(1, 41)])})
    found = _longest(experiment, "validation")  # type: ignore[arg-type]
    assert sorted(example.num_tokens for example in found.examples) == list(range(17, 41))
