"""Each metric against its formula written out by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lora_cli.spec import METRICS as NAMES
from lora_cli.tasks.metrics import METRICS, confusion_matrix, load_metric, score

BINARY = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=20)
CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)
NUMBERS = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=20)


def scored(name: str, pairs: list[tuple[float, float]]) -> tuple[float | None, str | None]:
    references, predictions = zip(*pairs, strict=True)
    return score(name, predictions=predictions, references=references)


def f1(pairs: list[tuple[int, int]], label: int) -> float | None:
    true = sum(r == p == label for r, p in pairs)
    wrong = sum((r == label) != (p == label) for r, p in pairs)
    return 2 * true / (2 * true + wrong) if true + wrong else None


def covariance(x: list[float], y: list[float]) -> float:
    return sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y, strict=True))


def correlation(x: list[float], y: list[float]) -> float | None:
    spread = math.sqrt(covariance(x, x) * covariance(y, y))
    return covariance(x, y) / spread if spread else None


def ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def test_every_metric_of_the_spec_is_here() -> None:
    assert tuple(METRICS) == NAMES


@settings(max_examples=30, deadline=None)
@given(CLASSES)
def test_accuracy_is_the_share_of_equal_pairs(pairs) -> None:
    assert scored("accuracy", pairs) == (pytest.approx(mean(r == p for r, p in pairs)), None)


@settings(max_examples=30, deadline=None)
@given(BINARY)
def test_f1_is_of_label_1_and_none_without_positives(pairs) -> None:
    value, reason = scored("f1", pairs)
    assert value == (None if f1(pairs, 1) is None else pytest.approx(f1(pairs, 1)))
    assert (value is None) == (reason is not None)


@settings(max_examples=30, deadline=None)
@given(CLASSES)
def test_macro_f1_is_the_mean_over_labels_that_occur(pairs) -> None:
    expected = mean(value for label in range(4) if (value := f1(pairs, label)) is not None)
    assert scored("macro_f1", pairs)[0] == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(BINARY)
def test_matthews_is_the_correlation_of_two_classes(pairs) -> None:
    references, predictions = map(list, zip(*pairs, strict=True))
    expected = correlation(references, predictions)
    value, _ = scored("matthews", pairs)
    if len(set(references)) == 1:
        assert value is None
    else:
        assert value == pytest.approx(expected or 0.0, abs=1e-9)


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=100, deadline=None)
@given(CLASSES)
def test_metrics_of_classes_are_those_of_scikit_learn_to_the_last_bit(pairs) -> None:
    references, predictions = zip(*pairs, strict=True)
    assert scored("accuracy", pairs)[0] == accuracy_score(references, predictions)
    expected = f1_score(references, predictions, average="macro", zero_division=0.0)
    assert scored("macro_f1", pairs)[0] == expected
    assert scored("matthews", pairs)[0] in (None, matthews_corrcoef(references, predictions))


@settings(max_examples=100, deadline=None)
@given(BINARY)
def test_f1_is_that_of_scikit_learn_to_the_last_bit(pairs) -> None:
    assert scored("f1", pairs)[0] in (None, f1_score(*zip(*pairs, strict=True), zero_division=0.0))


@settings(max_examples=30, deadline=None)
@given(NUMBERS)
def test_pearson_and_spearman_follow_their_formulas(pairs) -> None:
    references, predictions = map(list, zip(*pairs, strict=True))
    expected = correlation(references, predictions)
    ranked = correlation(ranks(references), ranks(predictions))
    assert scored("pearson", pairs)[0] == (None if expected is None else pytest.approx(expected, abs=1e-9))
    assert scored("spearman", pairs)[0] == (None if ranked is None else pytest.approx(ranked, abs=1e-9))


@pytest.mark.parametrize(
    ("name", "pairs", "reason"),
    [
        ("f1", [(0, 0)], "no row is positive"),
        ("matthews", [(1, 0), (1, 1)], "all rows have the same label"),
        ("pearson", [(1.0, 2.0), (1.0, 3.0)], "all labels are the same"),
        ("spearman", [(1.0, 2.0), (2.0, 2.0)], "all predictions are the same"),
        ("pearson", [(1.0, math.nan), (2.0, 2.0)], "not all predictions are finite"),
        ("pearson", [(1.0, 1.0)], "all labels are the same"),
    ],
)
def test_an_undefined_metric_is_none_with_a_reason(name: str, pairs: list[tuple[float, float]], reason: str) -> None:
    value, said = scored(name, pairs)
    assert value is None
    assert reason in (said or "")


@pytest.mark.parametrize("predictions", [[0.9, 1.0], np.array([0.9, 1.0]), [True, False]])
def test_a_metric_of_classes_refuses_what_is_no_id(predictions) -> None:
    with pytest.raises(TypeError, match="whole numbers"):
        score("accuracy", predictions=predictions, references=[0, 1])
    with pytest.raises(TypeError, match="whole numbers"):
        load_metric("accuracy").compute(predictions=predictions, references=[0, 1])
    with pytest.raises(TypeError, match="whole numbers"):
        load_metric("accuracy").add(prediction=predictions[0], reference=0)


def test_scoring_classes_does_not_wait_for_large_packages() -> None:
    program = """if True:
        import sys
        from lora_cli.tasks.metrics import score
        assert score("accuracy", predictions=[1], references=[1]) == (1.0, None)
        assert not {"evaluate", "datasets", "torch", "sklearn", "scipy"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", program], check=True)


def test_f1_refuses_more_than_two_classes() -> None:
    with pytest.raises(ValueError, match="two labels"):
        scored("f1", [(0, 2), (1, 1)])


def test_metrics_have_evaluates_interface_and_write_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    metric = load_metric("accuracy")
    metric.add(prediction=1, reference=1)
    metric.add_batch(predictions=[1, 0], references=[0, 0])
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}
    assert metric.compute(predictions=[1], references=[1]) == {"accuracy": 1.0}
    assert not list(tmp_path.iterdir())


def test_confusion_counts_labels_by_row() -> None:
    assert confusion_matrix([0, 0, 1, 1], [0, 1, 1, 1], 3) == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
