"""Ours beside PEFT + transformers' Trainer on the same work: metrics, speed, memory.

Each side is a process of its own, in turns, on the same rows with the same settings: the peer takes them from the
run folder that `lora train` has just written. README.md says what is equal and what is not.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.engine.batches import BatchPlan
from lora_cli.runs.directory import RunDirectory, read_json, read_saved_config, write_json
from lora_cli.spec import ClassificationSpec, DataSpec, LoraSpec, ModelSpec, TrainSpec

if TYPE_CHECKING:
    import peft

GLUE = ("sst2", "cola", "mrpc", "rte", "stsb", "qnli")
PACKAGES = ("lora-cli", "torch", "transformers", "peft", "accelerate")
PEER_FILE = "peer.json"
HEADER = (
    *("task", "seed", "rows", "metric", "ours", "peer", "diff", "ours rows/s", "peer rows/s", "ratio"),
    *("ours wall s", "peer wall s", "ours MiB", "peer MiB"),
)


@dataclass(frozen=True)
class Side:
    """What one process reached and what it cost; wall time and memory are taken from outside, alike for both."""

    metrics: Mapping[str, float | None]
    """Of the validation split, after training."""
    train_rows_per_s: float
    """Over the training steps alone: no start, no scoring, no saving."""
    wall_s: float
    peak_rss_mib: float


@dataclass(frozen=True)
class Comparison:
    """Ours and the peer on one task with one seed. `metric` is the task's first."""

    task: str
    seed: int
    rows: int
    metric: str
    ours: Side
    peer: Side


def main(argv: Sequence[str] | None = None) -> int:
    """Compare as the words say, print a table, write everything to --out."""
    args = _parser().parse_args(argv)
    if args.peer:
        write_json(args.peer / PEER_FILE, train_peer(args.peer))
        return 0
    comparisons: list[Comparison] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
        for seed in args.seeds:
            for task in args.tasks:
                comparisons.append(compare(args, task, seed, Path(scratch)))
                print(f"{task}, seed {seed}: done", file=sys.stderr)
                # After each, so that what has been measured outlives an interruption.
                write_json(args.out, _document(args, comparisons))
    print(table(comparisons))
    print(args.out)
    return 0


def compare(args: argparse.Namespace, task: str, seed: int, scratch: Path) -> Comparison:
    """One task with one seed: ours, then the peer with what ours says it did."""
    run = scratch / f"{task}-{seed}"
    words = [f"task={task}", f"seed={seed}", *_overrides(args), f"hydra.run.dir={run}"]
    ours_cost = _measure(["-m", "lora_cli", "train", *words], scratch, args.threads)
    peer_cost = _measure([str(Path(__file__).resolve()), "--peer", str(run)], scratch, args.threads)
    facts, theirs = RunDirectory(run).facts(), read_json(run / PEER_FILE)
    metrics = facts["metrics"]["validation"]
    return Comparison(
        task=task,
        seed=seed,
        rows=facts["data"]["train"]["rows"],
        metric=next(iter(metrics)),
        ours=Side(metrics, facts["cost"]["rows_per_s"], *ours_cost),
        peer=Side(theirs["metrics"], theirs["train_rows_per_s"], *peer_cost),
    )


def table(comparisons: Iterable[Comparison]) -> str:
    """One aligned line for each comparison, below a line of names."""
    lines = [HEADER, *map(_cells, comparisons)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def train_peer(run: Path) -> dict[str, Any]:
    """Train PEFT's LoRA with the Trainer as the run at `run` was trained: its metrics and its pace.

    Rows, settings and metrics are ours; model, inputs, labels and batches are made as users of PEFT make them.
    All that is written stays inside `run`.
    """
    import transformers

    config, facts = read_saved_config(run), RunDirectory(run).facts()
    task = ClassificationSpec(**{**config["task"], "data": DataSpec(**config["task"]["data"])})
    train = TrainSpec(**config["train"])
    transformers.set_seed(config["seed"])
    model, tokenizer = _peer_model(ModelSpec(**config["model"]), LoraSpec(**config["lora"]), facts)
    data = _peer_data(task, tokenizer, facts)
    stopwatch = _stopwatch()
    trainer = _trainer_class(train, len(data["train"]), facts["data_seed"])(
        model=model,
        args=_peer_arguments(train, task.metrics[0], config["seed"], run / "trainer"),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda scored: _peer_metrics(task, scored.predictions, scored.label_ids),
        callbacks=[stopwatch],
    )
    trainer.train()
    model.save_pretrained(str(run / "peer_adapter"))
    scored = trainer.evaluate()
    return {
        "metrics": {name: scored[f"eval_{name}"] for name in [*task.metrics, "loss"]},
        "train_rows_per_s": len(data["train"]) * train.epochs / stopwatch.train_s,
    }


def _peer_model(spec: ModelSpec, lora: LoraSpec, facts: Mapping[str, Any]) -> tuple[peft.PeftModel, Any]:
    """PEFT's model on the base that ours used, and its tokenizer."""
    import peft
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lora_cli.sources import find_source

    folder = str(find_source(spec).folder)
    head = {"num_labels": len(facts["labels"])} if facts["labels"] else {"num_labels": 1, "problem_type": "regression"}
    safe = {"local_files_only": True, "trust_remote_code": False}
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    dropout = {} if spec.dropout is None else dict.fromkeys(names, spec.dropout)
    base = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, **head, **dropout, **safe)
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type] # a float serves as well
        lora_dropout=lora.dropout,
        target_modules=["query", "value"],
    )
    model = peft.get_peft_model(base, config)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == facts["parameters"]["trainable"], "the peer does not train what ours did"
    _start_as_ours(model, spec, lora, facts)
    return model, AutoTokenizer.from_pretrained(folder, **safe)


def _start_as_ours(model: peft.PeftModel, spec: ModelSpec, lora: LoraSpec, facts: Mapping[str, Any]) -> None:
    """Give the peer the A and the head that ours began with: a difference at the end is then not one of the start."""
    from lora_cli.models import load_base
    from lora_cli.nn import adapted_layers, inject

    labels, seed = facts["labels"], facts["init_seed"]
    problem = "classification" if labels else "regression"
    ours = load_base(spec, num_outputs=len(labels or [0]), labels=labels, problem=problem, seed=seed)
    inject(ours.model, lora, groups=ours.groups, fresh=ours.fresh, skip=ours.skip, seed=seed)
    for name, layer in adapted_layers(ours.model).items():
        theirs = model.get_submodule(f"base_model.model.{name}").lora_A["default"]  # type: ignore[index]
        theirs.weight.data.copy_(layer.A.data)  # type: ignore[union-attr]
    for name in ours.fresh:
        target = model.get_submodule(f"base_model.model.{name}").modules_to_save["default"]  # type: ignore[index]
        target.load_state_dict(ours.model.get_submodule(name).state_dict())  # type: ignore[union-attr]


def _trainer_class(train: TrainSpec, num_rows: int, seed: int) -> Any:
    """The Trainer; for a plain random order (train.length_window=1) one that draws the batches that ours drew."""
    from torch.utils.data import Sampler
    from transformers import Trainer

    if train.length_window > 1:
        return Trainer
    plan = BatchPlan([1] * num_rows, train.batch_size, 1, 1, seed)

    class Order(Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return num_rows

        def __iter__(self) -> Iterator[int]:
            return (number for batch in plan.batches(self.epoch) for number in batch)

    class InOurOrder(Trainer):  # type: ignore[misc, unused-ignore]
        def _get_train_sampler(self, *_: Any) -> Order:
            return Order()

    return InOurOrder


def _peer_data(task: ClassificationSpec, tokenizer: Any, facts: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows that ours had, as the Trainer wants them."""
    from lora_cli.tasks import load_splits

    seed, splits = facts["data_seed"], ["train", "validation"]
    data = {}
    for split, rows in load_splits(task.data, splits, label=task.label, regression=task.regression, seed=seed).items():
        assert rows.fingerprint == facts["data"][split]["fingerprint"], f"the peer has other {split} rows than ours"
        texts = [[row[column] for row in rows] for column in task.text]
        encoded = tokenizer(*texts, truncation=True, max_length=task.max_length)
        answers = [row[task.label] for row in rows]
        labels = [facts["labels"].index(answer) if isinstance(answer, str) else answer for answer in answers]
        columns = {**encoded, "labels": labels}
        data[split] = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return data


def _peer_arguments(train: TrainSpec, metric: str, seed: int, folder: Path) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.eval_batch_size,
        learning_rate=train.lr,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup,  # a share, below 1
        weight_decay=train.weight_decay,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        adam_epsilon=train.eps,
        max_grad_norm=train.max_grad_norm,
        seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=train.keep,
        load_best_model_at_end=train.restore_best,
        metric_for_best_model=metric,
        greater_is_better=True,
        logging_steps=train.log_every,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )


def _peer_metrics(task: ClassificationSpec, logits: Any, labels: Any) -> dict[str, float]:
    from lora_cli.tasks.metrics import score

    predictions = logits.squeeze(-1) if task.regression else logits.argmax(-1)
    values = {name: score(name, predictions=predictions, references=labels)[0] for name in task.metrics}
    # The Trainer compares metrics, and NaN is its only number that is better than none.
    return {name: float("nan") if value is None else value for name, value in values.items()}


def _stopwatch() -> Any:
    """A callback whose `train_s` is the time in epochs; the Trainer scores and saves between them."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        train_s = 0.0

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self._started = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.train_s += time.perf_counter() - self._started

    return Stopwatch()


def _overrides(args: argparse.Namespace) -> list[str]:
    return [
        *("model=minilm", "lora.r=8", "lora.alpha=16", "device=cpu", "device.precision=fp32"),
        f"lora.dropout={args.dropout}",
        *(["model.dropout=0"] if args.dropout == 0 else []),
        f"train.epochs={args.epochs}",
        f"train.lr={args.lr}",
        f"train.batch_size={args.batch}",
        f"train.length_window={args.length_window}",
        f"task.data.train_limit={args.rows}",
        *args.set,
    ]


def _measure(words: Sequence[str], scratch: Path, threads: int) -> tuple[float, float]:
    """Run Python with `words` in `scratch`: (wall time in s, peak resident set in MiB).

    Raises:
        SystemExit: it failed; carries the end of what it said.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if root := os.environ.get("LORA_HUB_ROOT"):
        environment["LORA_HUB_ROOT"] = str(Path(root).resolve())
    log, started = scratch / "log.txt", time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=scratch,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        # wait4 tells the memory of this child alone; getrusage would give the largest of all so far.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - started
    if process.returncode:
        end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"{end}\nexit code {process.returncode}: python {' '.join(words)}")
    return wall_s, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20


def _cells(comparison: Comparison) -> tuple[str, ...]:
    ours, peer = comparison.ours, comparison.peer
    value, other = ours.metrics[comparison.metric], peer.metrics[comparison.metric]
    return (
        *(comparison.task, str(comparison.seed), str(comparison.rows), comparison.metric),
        *("undefined" if score is None else f"{score:.4f}" for score in (value, other)),
        "" if value is None or other is None else f"{value - other:+.4f}",
        *(f"{side.train_rows_per_s:.1f}" for side in (ours, peer)),
        f"{ours.train_rows_per_s / peer.train_rows_per_s:.2f}",
        *(f"{side.wall_s:.1f}" for side in (ours, peer)),
        *(f"{side.peak_rss_mib:.0f}" for side in (ours, peer)),
    )


def _document(args: argparse.Namespace, comparisons: Iterable[Comparison]) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "peer")},
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train LoRA on MiniLM with lora train and with PEFT + Trainer, in turns, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=[*GLUE, "support_intents"],
        default=list(GLUE),
        help="GLUE, or the set shipped here",
    )
    parser.add_argument("--rows", type=int, default=6000, help="training rows at most")
    parser.add_argument("--epochs", type=int, default=1, help="passes over them")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one comparison for each")
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument(
        "--length-window", type=int, default=TrainSpec().length_window, help="ours: train.length_window; 1: as the peer"
    )
    parser.add_argument("--dropout", type=float, default=0.1, help="of the adapter; 0: none in the base model either")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more keys of lora train, for both")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of torch, for both")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"), help="results")
    parser.add_argument("--peer", type=Path, metavar="RUN", help="only train the peer as the run folder RUN says")
    return parser


if __name__ == "__main__":
    sys.exit(main())
