"""What a training is about to do, as a person sees it before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_cli.screen import Screen, count
from lora_cli.spec import RecipeSpec, TrainRun
from lora_cli.tasks import Encoded, EncodedTexts

if TYPE_CHECKING:
    from lora_cli.experiment import Experiment

__all__ = ["show"]


def show(screen: Screen, experiment: Experiment) -> None:
    """What was understood, before anything is trained."""
    task, base, injection = experiment.task, experiment.base, experiment.injection
    if experiment.spec.recipe:
        _show_recipe(screen, experiment.spec, experiment.spec.recipe)
    screen.fact("task", f"{task.spec.name}: {task.describe()}")
    for split, encoded in experiment.data.items():
        screen.fact(split, _data_line(encoded, task.spec.max_length))
    screen.fact("model", f"{base.base_name} ({base.family}, from {base.source})")
    if base.quantized:
        screen.fact("quantised", base.quantized.describe())
    if experiment.start:
        screen.fact("starts from", _start_line(experiment))
    screen.fact("device", f"{experiment.device} ({experiment.device.reason})")
    if experiment.cache:
        kept = f"the input of layer {experiment.cache.first} (counted from 0) of each text, at most"
        screen.fact("cache", f"{kept} {experiment.spec.train.cache_gib:g} GiB ({experiment.spec.train.cache})")
    table = [
        (_layers(row.pattern, row.modules), len(row.modules), _ranks(row.ranks), row.num_parameters)
        for row in injection.rows
    ]
    for name in injection.trained_whole:
        size = sum(parameter.numel() for parameter in base.model.get_submodule(name).parameters())
        table.append((f"{name} (whole)", 1, "", size))
    screen.targets(table)
    if injection.left_out:
        screen.fact("left out", f"{', '.join(injection.left_out)} (not layers that can be adapted)")
    share = injection.num_trainable / injection.num_total
    memory = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    memory += base.quantized.bytes if base.quantized else 0
    trainable, total = count(injection.num_trainable), count(injection.num_total)
    screen.fact(
        "in all", f"{trainable} of {total} parameters train ({share:.2%}); weights take {memory / 2**20:,.0f} MiB"
    )


def _data_line(encoded: Encoded, max_length: int) -> str:
    tokens = encoded.num_tokens / len(encoded.examples)
    line = f"{len(encoded.examples):,} rows of {tokens:.1f} tokens on average"
    if isinstance(encoded, EncodedTexts) and encoded.queries:
        line += f", {len(encoded.queries):,} distinct prompts"
    line += f", {encoded.num_truncated:,} cut at {max_length}" if encoded.num_truncated else ""
    if isinstance(encoded, EncodedTexts) and encoded.num_cut_targets:
        line += f", {encoded.num_cut_targets:,} answers cut"
    return line + (f", {encoded.num_empty:,} with an empty text" if encoded.num_empty else "")


def _show_recipe(screen: Screen, spec: TrainRun, recipe: RecipeSpec) -> None:
    """Whose settings these are, and what of them is not kept that no figure of the run would tell."""
    screen.fact("recipe", f"{recipe.name}: {recipe.source}")
    if spec.rows_per_step != recipe.global_batch:
        published = f"{recipe.global_batch} ({recipe.batch_per_device} × {recipe.devices})"
        times = f"{spec.rows_per_step / recipe.global_batch:.3g} times the recipe's {published}"
        screen.warning(f"{spec.rows_per_step} rows a step, {times}: train.batch_size, train.accumulation")
    if recipe.starts_from and spec.lora.init_from is None:
        screen.warning(f"the recipe starts from the adapter of {recipe.starts_from}: lora.init_from=RUN")


def _start_line(experiment: Experiment) -> str:
    """Which adapter it is that the training goes on from, and whether its head is kept."""
    assert experiment.start is not None
    lora, known = experiment.spec.lora, experiment.start.file.extra
    line = f"{lora.init_from} ({known.get('task')}, SHA-256 {(lora.init_digest or '')[:12]})"
    if not experiment.base.fresh:
        return line
    return f"{line}, its head too" if experiment.start.keeps_head else f"{line}; the head is new, for other labels"


def _layers(pattern: str, modules: Sequence[str]) -> str:
    """An entry of lora.targets, with the names it stands for."""
    names = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    return pattern if names == [pattern] else f"{pattern}: {', '.join(names)}"


def _ranks(ranks: Sequence[int]) -> str:
    return "/".join(map(str, sorted(set(ranks))))
