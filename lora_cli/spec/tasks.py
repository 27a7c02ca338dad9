"""What is learnt: the keys of task.*."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from lora_cli.errors import ConfigError
from lora_cli.spec.checks import at_least, one_of, positive, share
from lora_cli.spec.names import CHAT_TEMPLATES, FORMATS, METRICS, SPLITS, TEXT_METRICS

__all__ = [
    "TASK_KINDS",
    "ChatSpec",
    "ClassificationSpec",
    "DataSpec",
    "DecodeSpec",
    "GenerationSpec",
    "LanguageModelingSpec",
    "TaskSpec",
    "TextSpec",
]


@dataclass(kw_only=True)
class DataSpec:
    """Where the rows come from: a hub data set, files of one's own, or a set shipped in the package."""

    hub: str | None = None
    """Hub id of a data set, such as nyu-mll/glue."""
    config: str = "default"
    """Configuration (subset) of the hub data set."""
    revision: str | None = None
    """Commit, tag or branch of the hub data set; None: its main branch."""
    splits: dict[str, str] = field(default_factory=dict)
    """Our split name → the data set's, where they differ."""
    embedded: str | None = None
    """Name of a data set shipped in this package."""
    train: str | None = None
    """Training file (.csv, .tsv, .jsonl, .parquet)."""
    validation: str | None = None
    """Validation file; None: `validation_share` of the training rows."""
    test: str | None = None
    """Test file."""
    validation_share: float = 0.1
    """Share of the training rows held out, stratified by label, when a set has no validation split."""
    train_limit: int | None = None
    """Use this many training rows, drawn by the data seed; None: all."""
    validation_limit: int | None = None
    """Use the first rows of the validation split only; None: all."""
    test_limit: int | None = None
    """Use the first rows of the test split only; None: all."""

    def __post_init__(self) -> None:
        for split in SPLITS:
            limit = getattr(self, f"{split}_limit")
            at_least(f"task.data.{split}_limit", limit, 1, optional=True)
        if not 0 < self.validation_share < 1:
            raise ConfigError("task.data.validation_share", self.validation_share, "a share between 0 and 1")


@dataclass(kw_only=True)
class TaskSpec:
    """What is learnt, whatever its kind."""

    kind: str = "???"
    """How rows become examples and a loss; set by the task's file."""
    name: str = "???"
    """Short name, used in run names."""
    data: DataSpec = field(default_factory=DataSpec)
    """Where the rows come from."""
    split: str = "validation"
    """Split that is scored: after training, and by `lora eval`."""
    extra_splits: list[str] = field(default_factory=list)
    """Further splits scored once, after training."""
    max_length: int = 128
    """Longest input in tokens; longer ones are cut and counted."""
    metrics: list[str] = field(default_factory=list)
    """Metrics to report; the first one chooses the best checkpoint."""

    def __post_init__(self) -> None:
        at_least("task.max_length", self.max_length, 4)
        for split in (self.split, *self.extra_splits):
            # A split names files of a run, and a run's config may come from anybody.
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", split, re.ASCII):
                raise ConfigError("task.split", split, "a plain name, such as validation")


@dataclass(kw_only=True)
class ClassificationSpec(TaskSpec):
    """A text, or several, with one label (or, for regression, one number)."""

    kind: str = "classification"
    text: list[str] = field(default_factory=lambda: ["text"])
    """Columns of the input, or templates such as "{word}: {sentence}"; two are given to the model as a pair."""
    label: str = "label"
    """Column of the answer."""
    labels: list[str] | None = None
    """Label names in the order of their ids; None: those of the training rows, sorted."""
    choices: list[str] = field(default_factory=list)
    """Columns of the candidate answers, of which the label names one by position; empty: no choices."""
    regression: bool = False
    """The label is a number and the model predicts a value."""
    metrics: list[str] = field(default_factory=lambda: ["accuracy"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.text) <= 2:
            raise ConfigError("task.text", self.text, "one column, or two for a pair")
        if not self.metrics:
            raise ConfigError("task.metrics", "[]", f"at least one of {', '.join(METRICS)}")
        for name in self.metrics:
            one_of("task.metrics", name, METRICS, "metric")
            if (name in ("pearson", "spearman")) != self.regression:
                kind = "regression" if self.regression else "classification"
                raise ConfigError("task.metrics", name, f"not a metric of {kind} (task.regression={self.regression})")
        if self.regression and self.labels:
            raise ConfigError("task.labels", self.labels, "a regression task has none (task.regression=true)")
        if self.regression and self.choices:
            raise ConfigError("task.choices", self.choices, "a regression task has none (task.regression=true)")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ConfigError("task.labels", self.labels, "each name once")
        if len(self.choices) == 1:
            raise ConfigError("task.choices", self.choices, "two columns or more, or none")


@dataclass(kw_only=True)
class DecodeSpec:
    """How text is generated."""

    max_new_tokens: int = 64
    """Longest answer in tokens."""
    num_beams: int = 1
    """Beams of the beam search; 1: none."""
    sample: bool = False
    """Draw each token instead of taking the likeliest."""
    temperature: float = 1.0
    """Divides the logits before drawing."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this probability."""
    top_k: int | None = None
    """Draw from so many likeliest tokens; None: all."""
    length_penalty: float = 1.0
    """Power of the length that a beam's log probability is divided by."""
    no_repeat_ngram: int = 0
    """No sequence of so many tokens occurs twice; 0: no limit."""
    repetition_penalty: float = 1.0
    """Divides the odds of tokens that occurred already (arXiv:1909.05858); 1: none."""
    stop: list[str] = field(default_factory=list)
    """Texts at which an answer ends; they are cut off."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            at_least(f"task.decode.{name}", getattr(self, name), 1)
        at_least("task.decode.top_k", self.top_k, 1, optional=True)
        at_least("task.decode.no_repeat_ngram", self.no_repeat_ngram, 0)
        positive("task.decode.temperature", self.temperature)
        positive("task.decode.repetition_penalty", self.repetition_penalty)
        if not math.isfinite(self.length_penalty):
            raise ConfigError("task.decode.length_penalty", self.length_penalty, "a finite number")
        if not 0 < self.top_p <= 1:
            raise ConfigError("task.decode.top_p", self.top_p, "a share above 0, at most 1")
        if not self.sample and (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, None):
            raise ConfigError("task.decode.sample", "false", "true, for temperature, top_p or top_k to mean something")
        if self.sample and self.num_beams > 1:
            raise ConfigError("task.decode.num_beams", self.num_beams, "1 with task.decode.sample=true")
        if "" in self.stop:
            raise ConfigError("task.decode.stop", self.stop, "texts that are not empty")


@dataclass(kw_only=True)
class TextSpec(TaskSpec):
    """Text to be written, whatever its kind."""

    max_length: int = 384
    """Longest prompt in tokens; longer ones are cut and counted."""
    truncate: str = "right"
    """End of the text from which too long a one is cut: right or left."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over all tokens in training."""
    decode: DecodeSpec = field(default_factory=DecodeSpec)
    """How text is generated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("task.truncate", self.truncate, ("right", "left"), "side")
        share("task.label_smoothing", self.label_smoothing)
        for name in self.metrics:
            one_of("task.metrics", name, [*TEXT_METRICS, "perplexity"], "metric of text")
        if not self.metrics:
            raise ConfigError("task.metrics", "[]", "at least one, such as perplexity")


@dataclass(kw_only=True)
class GenerationSpec(TextSpec):
    """A prompt, and the text that should follow."""

    kind: str = "generation"
    format: str = "columns"
    """How a row is read: columns (as they are); or e2e, webnlg or dart, whose data become columns input and target."""
    prompt: str = "{prompt}"
    """Template of the input: {column} stands for a cell; a part in [[ ]] is left out where its cell is empty; {eos} at
    the end is the model's end mark."""
    target: str = "{target}"
    """Template of the answer. A column that holds a list of texts gives one example each."""
    group: str | None = None
    """Column by whose values the metrics are given as well, such as seen and unseen."""
    loss_on: str = "completion"
    """What is learnt: the completion, or all (the prompt too; decoders only)."""
    max_target_length: int = 128
    """Longest answer in tokens, its end mark included; longer ones are cut and counted."""
    metrics: list[str] = field(default_factory=lambda: ["bleu", "rougeL"])

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("task.format", self.format, FORMATS, "format")
        one_of("task.loss_on", self.loss_on, ("completion", "all"), "choice")
        at_least("task.max_target_length", self.max_target_length, 2)
        if "{eos}" in self.prompt.removesuffix("{eos}") or "{eos}" in self.target:
            raise ConfigError("task.prompt", self.prompt, "{eos} at its end only; an answer always gets one")
        for key, template in (("task.prompt", self.prompt.removesuffix("{eos}")), ("task.target", self.target)):
            if not re.search(r"\{[^{}]+\}", template):
                raise ConfigError(key, template, "a template with a {column}")


@dataclass(kw_only=True)
class ChatSpec(TextSpec):
    """Conversations: what the assistant says is learnt."""

    kind: str = "chat"
    messages: str = "messages"
    """Column of the conversation: a list of {role, content}."""
    template: str = "tokenizer"
    """Chat template: the tokenizer's own, chatml or plain."""
    max_length: int = 1024
    """Longest conversation in tokens; longer ones are cut and counted."""
    truncate: str = "left"
    metrics: list[str] = field(default_factory=lambda: ["perplexity"])

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("task.template", self.template, CHAT_TEMPLATES, "chat template")


@dataclass(kw_only=True)
class LanguageModelingSpec(TextSpec):
    """Plain text, learnt whole; long texts become several examples of max_length tokens."""

    kind: str = "language_modeling"
    text: str = "text"
    """Column of the text."""
    metrics: list[str] = field(default_factory=lambda: ["perplexity"])

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.metrics:
            one_of("task.metrics", name, ["perplexity"], "metric of plain text")


TASK_KINDS: dict[str, type] = {
    "classification": ClassificationSpec,
    "generation": GenerationSpec,
    "chat": ChatSpec,
    "language_modeling": LanguageModelingSpec,
}
"""Kind of task → the dataclass that types its YAML files."""
