"""What a training will take, by arithmetic: parameters, memory by part, operations. No weights are needed.

The model is laid out on the meta device, the adapter put in, and one forward pass traced without data: what autograd
would keep for the backward pass is counted tensor by tensor.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_cli.checkpointing import forgo_cache, layers_of
from lora_cli.engine.batches import BatchPlan
from lora_cli.engine.evaluate import Example
from lora_cli.engine.memory import FP32, footprint
from lora_cli.engine.train import total_steps
from lora_cli.families import layer_groups
from lora_cli.late_logits import can_wait, tokens_at_once
from lora_cli.models import fresh_head, output_embedding
from lora_cli.nn import inject
from lora_cli.reader import ModelReader, class_for
from lora_cli.spec import TrainRun
from lora_cli.tokenizer import explained, quiet
from lora_cli.traced import traced

__all__ = ["Forecast", "Load", "forecast", "largest_batch", "lay_out", "load_of", "num_scorings", "worst_batch"]

_BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8.0}
"""Kind of quantisation → bits that are kept of a weight, blocks' sizes included."""
_LOGIT_COPIES = 3
"""The logits, their log-softmax and its gradient are there at once."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the data ask of a training."""

    rows: int
    """Of its largest batch."""
    length: int
    """Tokens that each row of it takes: the longest one's, or their mean where no padding is computed."""
    targets: int
    """Positions of that batch for which there are logits."""
    tokens: int
    """That all steps compute, padding included where there is any."""
    steps: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one training will take, with AdamW; memory in bytes."""

    frozen: int
    """Parameters that do not train."""
    adapter: int
    """Parameters of the adapter."""
    whole: int
    """Parameters of modules that train whole: a fresh head, or with lora=full everything."""
    weights: int
    gradients: int
    optimizer: int
    copies: int
    """Trained tensors of the best scoring, and those on their way to a checkpoint."""
    activations: int
    """Kept for the backward pass, at the largest batch; fused attention."""
    logits: int
    operations: float
    """Multiplications and additions of all steps."""

    @property
    def fixed(self) -> int:
        """What is there whatever the batch."""
        return self.weights + self.gradients + self.optimizer + self.copies

    @property
    def by_batch(self) -> int:
        """What grows with the batch."""
        return self.activations + self.logits


def load_of(spec: TrainRun, examples: Sequence[Example], *, is_packed: bool) -> Load:
    """What `examples` ask of a training as `spec` has it."""
    lengths = [example.num_tokens for example in examples]
    plan = _plan(spec, lengths)
    steps = total_steps(spec.train, len(lengths))
    worst = worst_batch(spec, examples, is_packed=is_packed, steps=steps)
    found = [examples[number] for number in worst]
    tokens = _cost([each.num_tokens for each in found], is_packed)
    length = math.ceil(tokens / len(found))
    return Load(
        rows=len(found),
        length=length,
        targets=sum(getattr(each, "num_targets", 1) for each in found) if is_packed else len(found) * length,
        tokens=_tokens(plan, steps, is_packed),
        steps=steps,
    )


def worst_batch(spec: TrainRun, examples: Sequence[Example], *, is_packed: bool, steps: int) -> list[int]:
    """Numbers of the examples of the largest batch of the first `steps`, all epochs taken to be like the first."""
    plan = _plan(spec, [example.num_tokens for example in examples])
    windows = (window for _, window in plan.steps(0, min(steps, plan.steps_per_epoch)))
    batches = (batch for window in windows for batch in window)
    return max(batches, key=lambda batch: _cost([plan.lengths[n] for n in batch], is_packed))


def largest_batch(spec: TrainRun, examples: Sequence[Example], *, is_packed: bool, steps: int) -> int:
    """Tokens of that batch."""
    worst = worst_batch(spec, examples, is_packed=is_packed, steps=steps)
    return _cost([examples[n].num_tokens for n in worst], is_packed)


def num_scorings(spec: TrainRun, examples: int, steps: int) -> int:
    """How often the validation split is scored while `steps` are taken."""
    every = spec.train.eval_every or _plan(spec, [0] * examples).steps_per_epoch
    return math.ceil(steps / every)


def forecast(spec: TrainRun, layout: Any, load: Load, *, half: bool) -> Forecast:
    """What the training `spec` takes with such a `load`; `layout` is from `lay_out`, and stays as it is. With `half`
    the base and what is computed have 16 bits.

    Raises:
        UserError: adapter and model do not fit together, or the model does not run without weights.
    """
    model = copy.deepcopy(layout)
    skip = output_embedding(model)
    writes = model.get_output_embeddings() is not None
    # Other starts need the weights, and take as much.
    lora = dataclasses.replace(spec.lora, init="kaiming") if spec.lora.init != "kaiming" else spec.lora
    fresh = () if writes else fresh_head(model)
    groups = layer_groups(model.config.model_type, spec.model.targets)
    injection = inject(model, lora, groups=groups, fresh=fresh, skip=skip, seed=0)
    size = footprint(model.to("meta"))
    again = layers_of(model, model.config.model_type, key="train.checkpointing") if spec.train.checkpointing else []
    activations, operations = traced(model.train(), load.rows, load.length, again=again)
    vocabulary = 0
    if writes:
        vocabulary = model.get_output_embeddings().weight.shape[0]
        operations += 2 * load.targets * model.get_output_embeddings().weight.numel()
    passes = 3 if spec.lora.variant == "full" else 2
    trained = size.trainable_parameters
    return Forecast(
        frozen=size.total_parameters - trained,
        adapter=injection.num_adapter,
        whole=trained - injection.num_adapter,
        weights=_weights(model, spec, skip=(*fresh, *skip), half=half),
        gradients=size.gradient_bytes,
        optimizer=size.optimizer_bytes,
        copies=FP32 * trained * (2 if spec.train.restore_best else 1),
        activations=activations // 2 if half else activations,
        logits=_LOGIT_COPIES * FP32 * _at_once(spec, model, load, vocabulary) * vocabulary,
        operations=(passes + spec.train.checkpointing) * operations / (load.rows * load.length) * load.tokens,
    )


def _plan(spec: TrainRun, lengths: Sequence[int]) -> BatchPlan:
    train = spec.train
    return BatchPlan(lengths, train.rows, train.accumulation, train.length_window, spec.seed_for("data"))


def _tokens(plan: BatchPlan, steps: int, is_packed: bool) -> int:
    """Tokens that the first `steps` compute; epochs beyond the first are taken to be like it."""
    epochs, rest = divmod(steps, plan.steps_per_epoch)

    def of(stop: int) -> int:
        batches = (batch for _, window in plan.steps(0, stop) for batch in window)
        return sum(_cost([plan.lengths[number] for number in batch], is_packed) for batch in batches)

    return (epochs * of(plan.steps_per_epoch) if epochs else 0) + of(rest)


def _cost(lengths: Sequence[int], is_packed: bool) -> int:
    """Tokens that a batch computes."""
    return sum(lengths) if is_packed else max(lengths) * len(lengths)


def lay_out(reader: ModelReader, head: Mapping[str, Any]) -> Any:
    """The model without weights, with the head that the task wants.

    Raises:
        ModelError: it cannot be made of this config.
    """
    config = copy.deepcopy(reader.config)
    if head["problem"] != "generation":
        config.num_labels = head["num_outputs"]
    auto_class = class_for(config, head["problem"], reader.base_name)
    with quiet(), explained(Path(reader.base_name), "config"), torch.device("meta"):
        # Eager attention looks at no value of the mask, which has none here.
        model = auto_class.from_config(
            config, dtype=torch.float32, trust_remote_code=False, attn_implementation="eager"
        )
    forgo_cache(model)
    model.config.pad_token_id = None
    return model


def _at_once(spec: TrainRun, model: Any, load: Load, vocabulary: int) -> int:
    """Positions of the largest batch whose logits exist at the same time."""
    # Where weights are split over processes, logits are made at once.
    if spec.train.logits_chunk == "off" or spec.device.shard or not vocabulary or not can_wait(model):
        return load.targets
    return min(load.targets, tokens_at_once(spec.train.logits_chunk, vocabulary))


def _weights(model: nn.Module, spec: TrainRun, *, skip: Sequence[str], half: bool) -> int:
    """Bytes of all weights and buffers, as they will be kept."""
    kind = spec.model.quantization
    quantized = set() if kind == "none" else {id(each) for each in _matrices(model, skip)}
    total = 0.0
    for each in (*model.parameters(), *model.buffers()):
        # What trains is kept in 32 bits, whatever is computed in.
        is_wide = each.requires_grad or not (half and each.is_floating_point())
        bits = 8 * each.element_size() if is_wide else 16
        total += each.numel() * (_BITS[kind] if id(each) in quantized else bits) / 8
    return round(total)


def _matrices(model: nn.Module, skip: Sequence[str]) -> list[nn.Parameter]:
    """Frozen weights of linear layers."""
    outside = tuple(f"{name}." for name in skip)
    return [
        parameter
        for name, module in model.named_modules()
        if "Linear" in type(module).__name__ or "Conv1D" in type(module).__name__
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 2 and not parameter.requires_grad and not f"{name}.".startswith(outside)
    ]
