"""Texts with one label, or one number, each. Knows rows, tokens, logits and losses; not the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from lora_cli.errors import ConfigError, DataError
from lora_cli.spec import ClassificationSpec
from lora_cli.tasks.encoding import Encoded, Example, Reader, columns_of, encode_rows, padded, text_cells
from lora_cli.tasks.labels import label_cells, label_ids, label_names, label_numbers
from lora_cli.tasks.rows import Rows
from lora_cli.tasks.scoring import Scorer

if TYPE_CHECKING:
    import torch

__all__ = ["Classification", "Head"]


class Head(TypedDict):
    """The arguments of `models.load_base` that follow from a task. `labels` name the outputs, if these are labels."""

    num_outputs: int
    labels: tuple[str, ...] | None
    problem: str


class Classification:
    """Single texts, pairs, or a text with candidate answers, to a label or (regression) a number.

    `labels` are the names in the order of their ids: the argument's (those of a run), else the spec's, else the
    candidate columns', else unknown until `fit_labels`; a regression task has none.
    """

    def __init__(self, spec: ClassificationSpec, *, labels: Sequence[str] | None = None) -> None:
        self.spec = spec
        self.label, self.regression = spec.label, spec.regression
        self.labels: tuple[str, ...] | None = None
        self._pad_token_id = 0
        known = labels or spec.labels or spec.choices
        if known and not spec.regression:
            self._set_labels(tuple(known))

    @property
    def num_outputs(self) -> int:
        """Logits per sequence: the number of labels; 1 for regression, and for a candidate answer."""
        if self.spec.regression or self.spec.choices:
            return 1
        assert self.labels is not None, "labels are unknown before fit_labels"
        return len(self.labels)

    @property
    def head(self) -> Head:
        """What a base model needs to know to bring the right head."""
        labels = self.labels if self.num_outputs > 1 else None
        problem = "regression" if self.spec.regression else "classification"
        return {"num_outputs": self.num_outputs, "labels": labels, "problem": problem}

    @property
    def primary_metric(self) -> str:
        """The metric that chooses the best checkpoint."""
        return self.spec.metrics[0]

    generates = False
    """Whether scoring needs generated text: never."""

    def describe(self) -> str:
        """What goes in and what comes out, for people."""
        return f"{' + '.join(self.spec.text)} → {', '.join(self.labels) if self.labels else 'a number'}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of text that a row must have."""
        return tuple(column for entry in [*self.spec.text, *self.spec.choices] for column in columns_of(entry))

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Columns by which a row is a repeat of another: those of text."""
        return self.columns

    def fit_labels(self, rows: Rows) -> None:
        """Take the labels from the training rows, unless they are known; check that there is something to learn.

        Raises:
            DataError: a label cannot be used (see `label_cells`), or all rows have the same one.
        """
        if self.spec.regression:
            return
        cells = label_cells(rows, self.spec.label)
        if self.labels is None:
            self._set_labels(label_names(cells, rows.source))
        if len(set(cells)) < 2:
            raise DataError(
                rows.source, f"all {len(rows)} training rows have the label '{cells[0]}'; wanted two or more"
            )

    def check(self, rows: Rows) -> None:
        """Refuse rows that `encode` would refuse, before there is a tokenizer.

        Raises:
            DataError: a column is missing, or a cell cannot be used; names the row.
        """
        text_cells(rows, [*self.spec.text, *self.spec.choices])
        self._label_values(rows)

    def encode(self, rows: Rows, reader: Reader) -> Encoded:
        """Examples with labels. The tokenizer's pad id is remembered for `collate`.

        Raises:
            DataError: as `check`.
        """
        return self._encoded(rows, reader.tokenizer, self._label_values(rows))

    def encode_texts(self, rows: Rows, reader: Reader) -> Encoded:
        """Examples without labels, for prediction."""
        return self._encoded(rows, reader.tokenizer, [None] * len(rows))

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """One batch, padded on the right to its longest sequence.

        Shapes: input_ids, attention_mask and, if the tokenizer gives them, token_type_ids (N, longest), N being the
        number of examples (times that of candidates); labels (examples,), int64 or float32, unless there are none.
        """
        import torch

        ids = [sequence for example in examples for sequence in example.input_ids]
        ones = [[1] * len(sequence) for sequence in ids]
        batch = {"input_ids": padded(ids, self._pad_token_id), "attention_mask": padded(ones, 0)}
        types = [sequence for example in examples for sequence in example.token_type_ids or ()]
        if types:
            batch["token_type_ids"] = padded(types, 0)
        labels = [example.label for example in examples if example.label is not None]
        if labels:
            batch["labels"] = torch.tensor(labels, dtype=torch.float32 if self.spec.regression else torch.int64)
        return batch

    def num_targets(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Labels in a batch, by which its summed loss is to be divided."""
        return batch["labels"].numel()

    def loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum over the batch, in float32, of the cross-entropy, or for regression of the squared error."""
        import torch.nn.functional as F  # noqa: N812

        scores, labels = self._scores(logits), batch["labels"]
        if self.spec.regression:
            return F.mse_loss(scores, labels, reduction="sum")
        return F.cross_entropy(scores, labels, reduction="sum")

    def decisions(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32 logits of what is decided, a row each: (rows, labels), or (rows, 1) for regression."""
        scores = self._scores(logits)
        return scores.unsqueeze(-1) if self.spec.regression else scores

    def scorer(self) -> Scorer:
        """A fresh, empty one."""
        return Scorer(self.spec.metrics, self.labels, decide=self._decide, loss=self.loss)

    def decode(self, logits: torch.Tensor) -> list[dict[str, Any]]:
        """One dict a row: {"label": name, "probabilities": {name: p}}, or {"value": x} for regression."""
        if self.labels is None:
            return [{"value": value} for value in self._scores(logits).tolist()]
        rows = self._scores(logits).softmax(-1)
        return [
            {"label": self.labels[best], "probabilities": dict(zip(self.labels, row, strict=True))}
            for best, row in zip(rows.argmax(-1).tolist(), rows.tolist(), strict=True)
        ]

    def _label_values(self, rows: Rows) -> Sequence[int | float]:
        if self.spec.regression:
            return label_numbers(rows, self.spec.label)
        assert self.labels is not None, "labels are unknown before fit_labels"
        return label_ids(label_cells(rows, self.spec.label), self.labels, rows)

    def _encoded(self, rows: Rows, tokenizer: Any, labels: Sequence[int | float | None]) -> Encoded:
        self._pad_token_id = tokenizer.pad_token_id
        spec = self.spec
        return encode_rows(
            rows, tokenizer, text=spec.text, choices=spec.choices, max_length=spec.max_length, labels=labels
        )

    def _decide(self, logits: torch.Tensor) -> tuple[list[float], list[float] | None]:
        """(predicted ids, their probabilities), or (predicted values, None)."""
        scores = self._scores(logits)
        if self.spec.regression:
            return scores.tolist(), None
        probabilities, ids = scores.softmax(-1).max(-1)
        return ids.tolist(), probabilities.tolist()

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 logits as (rows, labels), or (rows,) for regression."""
        if self.spec.regression:
            return logits.float().squeeze(-1)
        return logits.float().reshape(-1, len(self.labels or ()))

    def _set_labels(self, labels: tuple[str, ...]) -> None:
        if self.spec.choices and len(labels) != len(self.spec.choices):
            raise ConfigError("task.labels", list(labels), f"one name for each of task.choices={self.spec.choices}")
        if "f1" in self.spec.metrics and len(labels) > 2:
            raise ConfigError("task.metrics", "f1", f"only with two labels; these are {len(labels)}: use macro_f1")
        self.labels = labels
