"""What a person sees: numbers of three digits, nothing foreign that acts on the terminal."""

import pytest

from lora_cli.screen import Screen, count, duration, significant


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.31249, "0.312"), (12.3456, "12.3"), (0.0, "0.000"), (None, "–"), (1e-5, "1e-05"), (-0.5, "-0.500")],
)
def test_three_significant_digits(value: float | None, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(("value", "text"), [(1840, "1.84k"), (125.2e6, "125M"), (7, "7"), (2.5e9, "2.5G")])
def test_counts(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5s"), (101, "1m41s"), (7300, "2h01m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_are_plain_and_aligned_when_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.step(5, 500, 0.3124, 4.9e-4, 1840.0, 22_000.0, 101.0)
    screen.step(500, 500, 0.2, 0.0, 900.0, 9_000.0, 0.0)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step   5/500   loss   0.312   lr 4.9e-04   1.84k rows/s     22k tokens/s   eta 1m41s"
    assert second.index("lr") == first.index("lr")


def test_foreign_text_is_not_markup_and_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.fact("task", "[bold]a[/] \x1b[2J")
    screen.results({"[red]split": {"m[/]": 0.5}})
    captured = capsys.readouterr()
    assert "[bold]a[/] \\x1b[2J" in captured.err
    assert "[red]split" in captured.out


def test_results_go_to_stdout_and_the_rest_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.warning("careful")
    screen.scored(3, {"accuracy": 0.5}, best=True)
    screen.results({"validation": {"accuracy": 0.5, "f1": None}})
    captured = capsys.readouterr()
    assert captured.out.split() == ["split", "accuracy", "f1", "validation", "0.5000", "–"]
    assert "careful" in captured.err
    assert "(best so far)" in captured.err
