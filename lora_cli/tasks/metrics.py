"""The metrics: numbers from predictions and references. Knows scipy and evaluate; nothing of tasks.

Nothing is downloaded: evaluate's own metrics are scripts on the hub, so ours are written here, once, and can be had
with evaluate's interface. Those of classes need numpy alone: scikit-learn, whose numbers they are to the last digit,
takes longer to import than a small split to score.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["METRICS", "Undefined", "confusion_matrix", "load_metric", "score"]

Array = NDArray[Any]


class Undefined(ValueError):  # noqa: N818 - a state of the data, not a fault
    """A metric has no value for these predictions; the text says why."""


def _accuracy(references: Array, predictions: Array) -> float:
    return float(np.mean(references == predictions))


def _f1(references: Array, predictions: Array) -> float:
    """Of the label with id 1."""
    if max(references.max(), predictions.max()) > 1:
        raise ValueError("f1 is for two labels, ids 0 and 1")
    if not (references.any() or predictions.any()):
        raise Undefined("no row is positive, nor predicted to be")
    # Label 1 occurs, so it is the last one.
    return float(_f1_by_label(references, predictions)[-1])


def _macro_f1(references: Array, predictions: Array) -> float:
    """Mean F1 of the labels that occur, as a reference or as a prediction."""
    return float(np.mean(_f1_by_label(references, predictions)))


def _f1_by_label(references: Array, predictions: Array) -> Array:
    counts = _counts(references, predictions)
    found: Array = 2 * counts.diagonal() / (counts.sum(axis=0) + counts.sum(axis=1))
    return found


def _matthews(references: Array, predictions: Array) -> float:
    """For any number of labels (Gorodkin 2004). 0 when all predictions are the same, as GLUE has it."""
    if (references == references[0]).all():
        raise Undefined("all rows have the same label")
    counts = _counts(references, predictions)
    labelled, predicted, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    spread = (total**2 - predicted @ predicted) * (total**2 - labelled @ labelled)
    return float((counts.trace() * total - labelled @ predicted) / np.sqrt(spread)) if spread else 0.0


def _counts(references: Array, predictions: Array) -> Array:
    """How often a label (row) was predicted to be one (column), of the labels that occur."""
    names, ids = np.unique(np.concatenate([references, predictions]), return_inverse=True)
    counts = confusion_matrix(ids[: len(references)], ids[len(references) :], len(names))
    return np.asarray(counts, dtype=np.float64)


def _pearson(references: Array, predictions: Array) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, references, predictions)


def _spearman(references: Array, predictions: Array) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, references, predictions)


def _correlation(statistic: Callable[[Array, Array], Any], references: Array, predictions: Array) -> float:
    for values, what in ((references, "labels"), (predictions, "predictions")):
        if not np.isfinite(values).all():
            raise Undefined(f"not all {what} are finite")
        if (values == values[0]).all():
            raise Undefined(f"all {what} are the same")
    return float(statistic(references, predictions).statistic)


METRICS: dict[str, tuple[Callable[[Array, Array], float], str]] = {
    "accuracy": (_accuracy, "int64"),
    "f1": (_f1, "int64"),
    "macro_f1": (_macro_f1, "int64"),
    "matthews": (_matthews, "int64"),
    "pearson": (_pearson, "float64"),
    "spearman": (_spearman, "float64"),
}
"""Name → (function of references and predictions, type of both)."""


def score(name: str, *, predictions: Sequence[float], references: Sequence[float]) -> tuple[float | None, str | None]:
    """(value, None), or (None, why there is none). Ids for a metric of classes, numbers for a correlation.

    Raises:
        TypeError: predictions or references of a metric of classes are not whole numbers.
    """
    function, dtype = METRICS[name]
    _check_ids(name, predictions, references)
    try:
        return function(np.asarray(references, dtype=dtype), np.asarray(predictions, dtype=dtype)), None
    except Undefined as reason:
        return None, str(reason)


def load_metric(name: str) -> Any:
    """A metric with evaluate's interface, for scripts that have it already, such as in `evaluate.combine`.

    `compute` gives {name: value}, and "undefined": why, if value is None. It raises what `score` does.
    """
    return _metric_class()(config_name=name, keep_in_memory=True)


def confusion_matrix(
    references: Sequence[int] | Array, predictions: Sequence[int] | Array, num_labels: int
) -> list[list[int]]:
    """Counts by label (row) and prediction (column)."""
    counts = np.zeros((num_labels, num_labels), dtype=int)
    np.add.at(counts, (np.asarray(references), np.asarray(predictions)), 1)
    rows: list[list[int]] = counts.tolist()
    return rows


@functools.cache
def _metric_class() -> Any:
    """Built on first use: evaluate takes long to import, so nothing of ours goes this way."""
    import datasets
    import evaluate

    class Metric(evaluate.Metric):  # type: ignore[misc, unused-ignore]
        def _info(self) -> Any:
            _, dtype = METRICS[self.config_name]
            features = {name: datasets.Value(dtype) for name in ("predictions", "references")}
            return evaluate.MetricInfo(
                description=self.config_name, citation="", inputs_description="", features=datasets.Features(features)
            )

        def _build_data_dir(self) -> str:
            # evaluate makes this folder even if everything stays in memory, and the home may be read-only.
            return ""

        # evaluate casts silently: without these two a prediction of 0.9 would be scored as class 0.
        def add(self, *, prediction: Any = None, reference: Any = None, **rest: Any) -> None:
            """Add one row."""
            _check_ids(self.config_name, [prediction], [reference])
            super().add(prediction=prediction, reference=reference, **rest)

        def add_batch(self, *, predictions: Any = None, references: Any = None, **rest: Any) -> None:
            """Add rows."""
            _check_ids(self.config_name, predictions, references)
            super().add_batch(predictions=predictions, references=references, **rest)

        def _compute(self, predictions: Any, references: Any) -> dict[str, float | str | None]:
            value, undefined = score(self.config_name, predictions=predictions, references=references)
            return {self.config_name: value} | ({"undefined": undefined} if undefined else {})

    return Metric


def _check_ids(name: str, *columns: Any) -> None:
    if METRICS[name][1] == "int64" and any(np.asarray(column).dtype.kind not in "iu" for column in columns):
        raise TypeError(f"{name}: predictions and references are ids, whole numbers")
