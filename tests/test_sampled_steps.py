"""What is measured for a plan besides the steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_cli.sampled_steps import _score_longest
from lora_cli.spec import ClassificationSpec, LoraSpec, ModelSpec, TrainRun, TrainSpec


@dataclass(frozen=True)
class Text:
    """An example of which only the length is known."""

    num_tokens: int


@dataclass(frozen=True)
class Data:
    examples: list[Text]


@dataclass(frozen=True)
class Scoring:
    """An experiment that notes what it is to score."""

    spec: TrainRun
    data: dict[str, Data]
    scored: list[int] = field(default_factory=list)

    def score(self, split: str, *, answers: bool) -> None:
        assert not answers
        self.scored.extend(example.num_tokens for example in self.data[split].examples)


def test_the_longest_dozen_batches_are_scored_for_the_peak() -> None:
    spec = TrainRun(
        task=ClassificationSpec(name="x"),
        model=ModelSpec(name="tiny", family="bert"),
        lora=LoraSpec(),
        train=TrainSpec(eval_batch_size=2),
    )
    experiment = Scoring(spec, {"validation": Data([Text(length) for length in range(1, 41)])})
    _score_longest(experiment, "validation")  # type: ignore[arg-type]
    assert sorted(experiment.scored) == list(range(17, 41))
