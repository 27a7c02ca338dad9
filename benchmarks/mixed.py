"""Batches whose rows have adapters of their own: python mixed.py NOTES KIND RUN FOLDER NUMBER.

RUN is a training of ours; "make" writes NUMBER adapters like its own to FOLDER, every other kind is a side that answers
the run's validation rows, 32 at a time, with the adapters there. Only the model is timed: rows are padded before.
"ours" is two sides, the bank and the base alone in the same code, which take turns batch by batch: in processes of
their own, minutes apart, they would differ by more than what is to be seen.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lora_cli.runs.directory import write_json
from peer_run import Run, base_model, examples, tokenizer_of

BATCH, PASSES = 32, 5
Rows = dict[str, Tensor]
Answer = Callable[[Rows, list[str]], Tensor]


@dataclass(frozen=True)
class Work:
    """What all sides are given."""

    run: Run
    folder: Path
    names: list[str]

    def batches(self) -> Iterator[tuple[Rows, list[str]]]:
        """Padded rows and the adapter of each."""
        tokenizer, draw = tokenizer_of(self.run), random.Random(0)
        rows = examples(self.run, tokenizer, "validation")
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            chosen = [{key: x for key, x in row.items() if key != "labels"} for row in rows[start : start + BATCH]]
            # Each adapter as often as any other.
            names = [self.names[place % len(self.names)] for place in range(start, start + BATCH)]
            draw.shuffle(names)
            yield dict(tokenizer.pad(chosen, return_tensors="pt")), names


def make(work: Work) -> None:
    """Adapters like the run's, each moved its own way."""
    from safetensors.torch import load_file, save_file

    for seed, name in enumerate(work.names):
        shutil.copytree(work.run.path / "adapter", work.folder / name)
        file, draw = work.folder / name / "adapter_model.safetensors", torch.Generator().manual_seed(seed)
        moved = {key: x + 0.02 * torch.randn(x.shape, generator=draw) for key, x in load_file(file).items()}
        save_file(moved, file, metadata={"format": "pt"})


def _base(work: Work) -> Any:
    from lora_cli.models import load_base
    from lora_cli.prepacked import prepack
    from lora_cli.spec import DeviceSpec
    from lora_cli.unpadded import remove_padding

    labels = work.run.facts["labels"]
    base = load_base(work.run.model, num_outputs=len(labels), labels=labels, problem="classification", seed=0)
    assert remove_padding(base.model)
    prepack(base.model.requires_grad_(False), limit_mib=DeviceSpec().prepack_mib, skip=base.fresh)
    return base


def base(work: Work) -> Answer:
    """The base without an adapter, without padding: the bound."""
    model = _base(work).model
    return lambda rows, names: model(**rows).logits


def ours(work: Work) -> Answer:
    """The bank."""
    from lora_cli.nn import Bank

    found = _base(work)
    bank = Bank(found.model, fresh=found.fresh, fingerprint=found.fingerprint)
    for name in work.names:
        bank.add(name, work.folder / name)

    def answer(rows: Rows, names: list[str]) -> Tensor:
        with bank.rows(names):
            return bank.model(**rows).logits

    return answer


def _peft(work: Work) -> Any:
    from peft import PeftModel

    first, *others = work.names
    model = PeftModel.from_pretrained(base_model(work.run), str(work.folder / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(work.folder / name), adapter_name=name)
    return model.eval()


def peft_mixed(work: Work) -> Answer:
    """PEFT's mixed batch."""
    model = _peft(work)
    return lambda rows, names: model(**rows, adapter_names=names).logits


def peft_groups(work: Work) -> Answer:
    """PEFT, the rows of one adapter after those of another, each group cut to its longest row."""
    model = _peft(work)

    def answer(rows: Rows, names: list[str]) -> Tensor:
        found = [torch.empty(0)] * len(names)
        for name in dict.fromkeys(names):
            places = [place for place, own in enumerate(names) if own == name]
            width = int(rows["attention_mask"][places].sum(1).max())
            model.set_adapter(name)
            logits = model(**{key: x[places, :width] for key, x in rows.items()}).logits
            for place, each in zip(places, logits, strict=True):
                found[place] = each
        return torch.stack(found)

    return answer


def measure(sides: dict[str, Answer], batches: list[tuple[Rows, list[str]]]) -> dict[str, dict[str, float]]:
    """Of each side the pace of the middle one of some passes, and the mean of the first logit, the same for all but the
    base.
    """
    with torch.inference_mode():
        firsts = {
            name: torch.cat([answer(rows, names)[:, 0] for rows, names in batches]) for name, answer in sides.items()
        }
        times: dict[str, list[float]] = {name: [0.0] * PASSES for name in sides}
        for number in range(PASSES):
            for rows, names in batches:
                for name, answer in sides.items():
                    started = time.perf_counter()
                    answer(rows, names)
                    times[name][number] += time.perf_counter() - started
    return {
        name: {"eval_rows_per_s": len(first) / median(times[name]), "score": float(first.mean())}
        for name, first in firsts.items()
    }


SIDES = {
    "ours": {"ours": ours, "base": base},
    "peft-mixed": {"peft-mixed": peft_mixed},
    "peft-groups": {"peft-groups": peft_groups},
}
"""Kind → what takes turns in one process."""


def main() -> None:
    """Be what the words name."""
    notes, kind, run, folder, number = sys.argv[1:]
    work = Work(Run.read(Path(run)), Path(folder), [f"adapter-{place}" for place in range(int(number))])
    if kind == "make":
        return make(work)
    sides = {name: side(work) for name, side in SIDES[kind].items()}
    write_json(Path(notes), measure(sides, list(work.batches())))
    return None


if __name__ == "__main__":
    main()
