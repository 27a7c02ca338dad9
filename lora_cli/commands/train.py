"""lora train: rows and a base model in, a run folder with an adapter out.

torch and transformers are imported where the data is known to be good: what a person mistyped is told at once.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli import __version__
from lora_cli.config import to_plain
from lora_cli.runs.directory import RunDirectory, atomic_folder, signature, write_atomic
from lora_cli.runs.registry import run_of
from lora_cli.runs.report import model_card
from lora_cli.screen import Screen, count
from lora_cli.spec import TrainRun
from lora_cli.tasks import Classification, Encoded, Rows, build_task, load_splits, overlap
from lora_cli.trackers import open_tracker

if TYPE_CHECKING:
    from lora_cli.engine.checkpoint import Checkpoint, Progress
    from lora_cli.engine.device import Device
    from lora_cli.engine.train import Outcome
    from lora_cli.models import BaseModel
    from lora_cli.nn import Injection

__all__ = ["run"]

_VERSIONS = ("torch", "transformers", "datasets", "hydra-core", "safetensors")


def run(spec: TrainRun, *, directory: Path | None = None, overrides: Sequence[str] = ()) -> float | None:
    """Train, score and save as `spec` says; returns the primary metric of the scored split.

    The run folder is `directory`, or a new one under runs/.

    Raises:
        UserError: something given does not fit.
        TrainingFailure: the training cannot go on; its checkpoints stay.
    """
    started, screen, config = time.perf_counter(), Screen(), to_plain(spec)
    kept = run_of(config, directory) if spec.resume == "auto" else None
    if kept is not None and kept.facts()["status"] == "finished":
        screen.line(f"{kept.path} is finished already")
        return _report(screen, kept, kept.facts()["metrics"], spec.task.split)
    task = build_task(spec.task)
    rows = _load_rows(spec, task, screen)

    from lora_cli.engine.device import open_device
    from lora_cli.engine.evaluate import rehearse
    from lora_cli.models import load_base

    device = open_device(spec.device)
    base = load_base(
        spec.model,
        num_outputs=task.num_outputs,
        labels=task.labels,
        problem="regression" if task.spec.regression else "classification",
        seed=_seed(spec, "init"),
        dtype=device.dtype,
    )
    base.model.to(device.device)
    data = {split: task.encode(found, base.tokenizer) for split, found in rows.items()}
    injection, fingerprint = _adapt(spec, task, base, data["train"], device)
    identity = {
        "configuration": signature(config),
        "data": rows["train"].fingerprint + rows["validation"].fingerprint,
        "base model": fingerprint,
    }
    _show_header(screen, spec, task, base, data, injection, device)
    rehearse(base.model, task, data["validation"].examples, device=device, batch_size=spec.train.eval_batch_size)

    folder = kept or RunDirectory.create(config, directory=directory, overrides=overrides)
    folder.update(**_facts(spec, task, base, rows, data, injection, fingerprint, device))
    outcome = _train(spec, task, base, data, injection, device, folder, identity, screen)
    _save_adapter(spec, task, base, data["train"], injection, fingerprint, device, folder)
    metrics = _score(spec, task, base, data, device, folder)
    folder.update(metrics=metrics, steps=outcome.progress.step, best_step=outcome.progress.best_step)
    write_atomic(folder.adapter / "README.md", model_card(config, folder.facts(), overrides))
    folder.finish(cost=_cost(outcome.progress, started, device))
    return _report(screen, folder, metrics, spec.task.split)


def _load_rows(spec: TrainRun, task: Classification, screen: Screen) -> dict[str, Rows]:
    needed = list(dict.fromkeys(["train", "validation", spec.task.split, *spec.task.extra_splits]))
    rows = load_splits(
        spec.task.data, needed, label=task.spec.label, regression=task.spec.regression, seed=_seed(spec, "data")
    )
    task.fit_labels(rows["train"])
    columns = [*task.spec.text, *task.spec.choices]
    for split in needed[1:]:
        if shared := overlap(rows["train"], rows[split], columns):
            screen.warning(f"{shared} of {len(rows[split])} {split} rows stand in train as well")
    return rows


def _adapt(
    spec: TrainRun, task: Classification, base: BaseModel, train: Encoded, device: Device
) -> tuple[Injection, str]:
    """Inject the adapter; check that it changes nothing yet."""
    from lora_cli.engine.selfcheck import check_same_logits
    from lora_cli.nn import fingerprint, inject

    before = _logits(task, base, train, device)
    digest = fingerprint(base.model, fresh=base.fresh)
    injection = inject(
        base.model, spec.lora, groups=base.groups, fresh=base.fresh, skip=base.skip, seed=_seed(spec, "init")
    )
    # DoRA divides by a norm and multiplies it back, which is the identity only up to rounding.
    tolerance = 0.0 if spec.lora.variant == "lora" and device.precision == "fp32" else 2e-2
    check_same_logits(
        "a fresh adapter must not change the base model",
        before,
        _logits(task, base, train, device),
        tolerance=tolerance,
    )
    return injection, digest


def _train(
    spec: TrainRun,
    task: Classification,
    base: BaseModel,
    data: Mapping[str, Encoded],
    injection: Injection,
    device: Device,
    folder: RunDirectory,
    identity: Mapping[str, str],
    screen: Screen,
) -> Outcome:
    from lora_cli.engine import checkpoint, evaluate, train
    from lora_cli.nn import load_trainable_state, parameter_groups, trainable_state

    resume = checkpoint.load_newest(folder.checkpoints, identity=identity)
    folder.cut_metrics(resume.progress.step if resume else 0)
    if resume is not None:
        load_trainable_state(base.model, resume.trained)
        screen.fact("resume", f"{folder.path} from step {resume.progress.step}")
    train_spec = spec.train
    metric = train_spec.metric or task.primary_metric
    recording = _Recording(folder, screen, spec, identity)
    try:
        outcome = train.train(
            base.model,
            task,
            data["train"].examples,
            train_spec,
            groups=parameter_groups(
                base.model,
                injection,
                lr=train_spec.lr,
                head_lr=train_spec.head_lr or train_spec.lr,
                weight_decay=train_spec.weight_decay,
            ),
            trained=lambda: trainable_state(base.model),
            score=lambda: evaluate.evaluate(
                base.model,
                task,
                data["validation"].examples,
                device=device,
                batch_size=train_spec.eval_batch_size,
            ).result(),
            objective=train.Objective(metric, metric != "loss"),
            device=device,
            recorder=recording,
            data_seed=_seed(spec, "data"),
            dropout_seed=_seed(spec, "dropout"),
            resume=resume,
        )
    except BaseException as error:
        folder.update(status="failed", error=f"{type(error).__name__}: {error}")
        folder.log(f"stopped: {type(error).__name__}: {error}")
        raise
    finally:
        recording.close()
    if train_spec.restore_best and outcome.best is not None:
        load_trainable_state(base.model, outcome.best)
    return outcome


class _Recording:
    """The loop's side effects: metrics to run folder and tracker, progress to the screen, checkpoints to disk."""

    def __init__(self, folder: RunDirectory, screen: Screen, spec: TrainRun, identity: Mapping[str, str]) -> None:
        self._folder, self._screen, self._spec, self._identity = folder, screen, spec, identity
        self._tracker = open_tracker(spec.tracker, folder.path, to_plain(spec))
        self._train_s_before: float | None = None

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        self._folder.append_metrics({"step": step, **values})
        self._tracker.log(step, {name: value for name, value in values.items() if value is not None})

    def scored(self, step: int, metrics: Mapping[str, float | None], *, best: bool) -> None:
        self._screen.scored(step, metrics, best=best)
        self._folder.log(f"step {step}: {dict(metrics)}")

    def progress(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        pace = progress.train_s / progress.step
        self._screen.step(
            progress.step,
            total,
            loss,
            lr,
            progress.rows / progress.train_s,
            progress.tokens / progress.train_s,
            pace * (total - progress.step),
        )

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        from lora_cli.engine import checkpoint as checkpoints

        keep = self._spec.train.keep
        checkpoints.save(self._folder.checkpoints, checkpoint, identity=self._identity, keep=keep, whole=atomic_folder)

    def close(self) -> None:
        self._screen.close()
        self._tracker.close()


def _save_adapter(
    spec: TrainRun,
    task: Classification,
    base: BaseModel,
    train: Encoded,
    injection: Injection,
    fingerprint: str,
    device: Device,
    folder: RunDirectory,
) -> None:
    """Save adapter and tokenizer, load the adapter back from disk, and check that nothing was lost on the way."""
    from lora_cli.engine.selfcheck import check_same_logits
    from lora_cli.nn import load_adapter, remove, save_adapter
    from lora_cli.tokenizer import save_tokenizer

    save_adapter(
        base.model,
        injection,
        folder.adapter,
        base_name=base.base_name,
        revision=base.revision,
        task_type="SEQ_CLS",
        fingerprint=fingerprint,
        extra={"task": spec.task.name, "labels": list(task.labels) if task.labels else None},
    )
    with atomic_folder(folder.tokenizer) as temporary:
        save_tokenizer(base.tokenizer, temporary)
    expected = _logits(task, base, train, device)
    remove(base.model)
    load_adapter(base.model, folder.adapter, fresh=base.fresh, fingerprint=fingerprint)
    base.model.to(device.device)
    found = _logits(task, base, train, device)
    check_same_logits("the saved adapter must compute what the trained one does", expected, found, tolerance=0.0)


def _score(
    spec: TrainRun,
    task: Classification,
    base: BaseModel,
    data: Mapping[str, Encoded],
    device: Device,
    folder: RunDirectory,
) -> dict[str, dict[str, float | None]]:
    """Score every split asked for with the saved adapter, and keep its predictions."""
    from lora_cli.engine.evaluate import evaluate

    metrics = {}
    for split in dict.fromkeys([spec.task.split, *spec.task.extra_splits]):
        examples, batch_size = data[split].examples, spec.train.eval_batch_size
        scorer = evaluate(base.model, task, examples, device=device, batch_size=batch_size)
        metrics[split] = scorer.result()
        folder.write_predictions(split, scorer.predictions)
    return metrics


def _logits(task: Classification, base: BaseModel, data: Encoded, device: Device) -> Any:
    """Logits of a few examples, without dropout."""
    from lora_cli.engine.evaluate import predict

    return next(predict(base.model, task, data.examples[:8], device=device, batch_size=8))[1]


def _facts(
    spec: TrainRun,
    task: Classification,
    base: BaseModel,
    rows: Mapping[str, Rows],
    data: Mapping[str, Encoded],
    injection: Injection,
    fingerprint: str,
    device: Device,
) -> dict[str, Any]:
    """What run.json says of a run besides its metrics."""
    return {
        "status": "running",
        "labels": list(task.labels) if task.labels else None,
        "base": {
            "name": base.base_name,
            "revision": base.revision,
            "family": base.family,
            "source": base.source,
            "fingerprint": fingerprint,
        },
        "data": {
            split: {
                "rows": len(found),
                "fingerprint": found.fingerprint,
                "truncated": data[split].num_truncated,
                "empty": data[split].num_empty,
            }
            for split, found in rows.items()
        },
        "targets": [
            {"pattern": row.pattern, "layers": len(row.modules), "parameters": row.num_parameters}
            for row in injection.rows
        ],
        "trained_whole": list(injection.trained_whole),
        "parameters": {
            "trainable": injection.num_trainable,
            "adapter": injection.num_adapter,
            "total": injection.num_total,
        },
        "eval_batch_size": spec.train.eval_batch_size,
        "init_seed": _seed(spec, "init"),
        "data_seed": _seed(spec, "data"),
        "device": str(device),
        "versions": {"lora": __version__, "python": platform.python_version()} | {n: version(n) for n in _VERSIONS},
    }


def _cost(progress: Progress, started: float, device: Device) -> dict[str, float]:
    return {
        "rows_per_s": progress.rows / max(progress.train_s, 1e-9),
        "tokens_per_s": progress.tokens / max(progress.train_s, 1e-9),
        "train_s": progress.train_s,
        "wall_s": time.perf_counter() - started,
        "peak_memory_mib": device.peak_memory_mib(),
    }


def _show_header(
    screen: Screen,
    spec: TrainRun,
    task: Classification,
    base: BaseModel,
    data: Mapping[str, Encoded],
    injection: Injection,
    device: Device,
) -> None:
    """What was understood, before anything is trained."""
    answers = ", ".join(task.labels) if task.labels else "a number"
    screen.fact("task", f"{spec.task.name}: {' + '.join(task.spec.text)} → {answers}")
    for split, encoded in data.items():
        tokens = encoded.num_tokens / len(encoded.examples)
        cut = f", {encoded.num_truncated:,} cut at {spec.task.max_length}" if encoded.num_truncated else ""
        empty = f", {encoded.num_empty:,} empty" if encoded.num_empty else ""
        screen.fact(split, f"{len(encoded.examples):,} rows, {tokens:.1f} tokens on average{cut}{empty}")
    screen.fact("model", f"{base.base_name} ({base.family}, {base.source})")
    share = injection.num_trainable / injection.num_total
    memory = sum(p.numel() * p.element_size() for p in base.model.parameters()) / 2**20
    screen.fact(
        "trains",
        f"{count(injection.num_trainable)} of {count(injection.num_total)} parameters ({share:.2%}); "
        f"weights {memory:,.0f} MiB",
    )
    screen.fact("device", f"{device} ({device.reason})")
    table = [
        (row.pattern, len(row.modules), "/".join(map(str, sorted(set(row.ranks)))), row.num_parameters)
        for row in injection.rows
    ]
    for name in injection.trained_whole:
        size = sum(parameter.numel() for parameter in base.model.get_submodule(name).parameters())
        table.append((f"{name} (whole)", 1, "", size))
    screen.targets(table)


def _report(
    screen: Screen, folder: RunDirectory, metrics: Mapping[str, Mapping[str, float | None]], split: str
) -> float | None:
    """The last lines: results, where they are, what to type next."""
    screen.results(metrics)
    screen.line(f'{folder.path}      lora eval run=latest      lora infer run=latest text="…"')
    return next(iter(metrics[split].values()), None)


def _seed(spec: TrainRun, kind: str) -> int:
    own = getattr(spec.train, f"{kind}_seed")
    return spec.seed if own is None else int(own)
