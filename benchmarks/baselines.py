"""What an adapted model has to beat: the base model as it is, and the first sentences of a text.

    python benchmarks/baselines.py untrained task=e2e model=gpt2 task.split=test
    python benchmarks/baselines.py lead3 task=samsum task.split=test

`untrained` takes the words of `lora train` and scores the split with an adapter that changes nothing yet. `lead3`
answers each prompt with the first three lines of its data (of a dialogue: its first three turns) and needs no model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lora_cli.config import Job, launch
from lora_cli.errors import LoraError
from lora_cli.spec import GenerationSpec, TrainRun
from lora_cli.tasks import build_task, load_rows
from lora_cli.tasks.text import text_score

Scores = dict[str, float | None]


def untrained(spec: TrainRun) -> Scores:
    """Every metric of task.split, by the base model with a fresh adapter in it."""
    from lora_cli.experiment import Experiment

    task = build_task(spec.task)
    split = spec.task.split
    rows = load_rows(task, ["train", split], seed=spec.seed_for("data"))
    task.fit_labels(rows["train"])
    experiment = Experiment.build(spec, task, rows)
    done = experiment.score(split, progress=lambda done, total: print(f"{done}/{total}", file=sys.stderr))
    for row in done.predictions[:3]:
        print(json.dumps(row, ensure_ascii=False), file=sys.stderr)
    return done.result()


def lead3(spec: TrainRun) -> Scores:
    """The task's metrics of answers that are the first three lines of the prompt's first column."""
    task = spec.task
    assert isinstance(task, GenerationSpec), "lead3 is for texts that have a reference"
    built = build_task(task)
    column, target = built.columns[0], task.target.strip(" {}")
    rows = load_rows(built, [task.split], seed=0)[task.split]
    answers = [" ".join(row[column].splitlines()[:3]) for row in rows]
    references = [[row[target]] for row in rows]
    found = {name: text_score(name, predictions=answers, references=references)[0] for name in task.metrics}
    return found | {"rows": len(rows)}


def main() -> int:
    """Print the scores as JSON."""
    kinds = {"untrained": untrained, "lead3": lead3}
    kind, *words = sys.argv[1:] or [""]
    if kind not in kinds:
        print(__doc__, file=sys.stderr)
        return 2

    def score(job: Job) -> float | None:
        print(json.dumps(kinds[kind](job.spec()), indent=2))
        return None

    try:
        launch("train", words, score)
    except LoraError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
