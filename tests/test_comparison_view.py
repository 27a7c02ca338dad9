"""What a person reads of a comparison."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from lora_cli.comparison_view import legend, plot, results_view, seconds, size, sizes_view
from lora_cli.engine.memory import Footprint
from lora_cli.runs.comparison import Goal, Spread

GOAL = Goal("accuracy", "validation", 0.8)
LARGE = {
    "validation/accuracy": Spread((0.85, 0.87)),
    "trainable_parameters": Spread((124_647_939.0,) * 2),
    "adapter_bytes": Spread((498_612_824.0,) * 2),
    "peak_memory_mib": Spread((2934.5, 2941.0)),
    "train_s": Spread((1201.0, 1203.0)),
    "rows_per_s": Spread((11.25, 11.5)),
    "steps": Spread((4590.0,) * 2),
    "steps_to_target": Spread((1377.0,) * 2),
    "train_s_to_target": Spread((361.0,) * 2),
}


def lines(table: Table, width: int = 80) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue().splitlines()


def test_a_large_training_fits_on_a_narrow_terminal() -> None:
    heads, row = lines(results_view(GOAL, {"lora_plus": LARGE}, 2), 90)
    assert heads.split() == ["method", "accuracy", "trains", "on", "disk", "memory", "time", "rows/s", "to", "0.8"]
    assert row.split("  ")[0] == "lora_plus"
    for cell in ("0.860 ± 0.014", "125M", "476 MiB", "2.87 GiB", "20m02s", "11.4", "1377 steps, 6m01s"):
        assert cell in row


def test_a_target_that_some_seeds_missed_is_no_time() -> None:
    some = {**LARGE, "steps_to_target": Spread((12.0,)), "train_s_to_target": Spread((3.0,))}
    none = {**LARGE, "steps_to_target": Spread(()), "train_s_to_target": Spread(())}
    rows = lines(results_view(GOAL, {"some": some, "none": none}, 2), 100)
    assert rows[1].rstrip().endswith("1 of 2 seeds")
    assert rows[2].rstrip().endswith("never")


def test_missing_trainings_are_told_beside_the_name() -> None:
    one = {name: Spread(spread.values[:1]) for name, spread in LARGE.items()}
    _, partial, failed = lines(results_view(GOAL, {"lora": one, "dora": {}}, 2), 120)
    assert partial.startswith("lora (1 of 2 seeds)")
    assert "0.850  " in partial
    assert failed.startswith("dora (0 of 2 seeds)")
    assert failed.count("–") == 6


def test_without_a_target_there_is_no_such_column() -> None:
    heads, _ = lines(results_view(Goal("accuracy", "test", None), {"lora": LARGE}, 2))
    assert heads.split()[-1] == "rows/s"


def test_the_legend_tells_what_a_single_seed_cannot_show() -> None:
    assert "±" not in legend(GOAL, 1)
    assert "over 3 seeds: mean ± standard deviation" in legend(GOAL, 3)


def test_sizes_are_those_of_the_footprint_and_fit() -> None:
    found = Footprint(
        total_parameters=10**8,
        trainable_parameters=10**6,
        weight_bytes=4 * 10**8,
        gradient_bytes=4 * 10**6,
        optimizer_bytes=8 * 10**6,
        base_bytes=4 * 10**8 - 4 * 10**6,
        task_bytes=4 * 10**6,
    )
    heads, row = lines(sizes_view({"rslora": found}, 100))
    assert heads.rstrip().endswith("100 tasks")
    assert " ".join(row.split()) == "rslora 1M 381 MiB 3.81 MiB 7.63 MiB 393 MiB 3.81 MiB 759 MiB"


def test_the_plot_has_a_dot_for_each_seed_in_each_panel() -> None:
    assert plot("mrpc", GOAL, {"lora": LARGE, "dora": {}}).count("<circle") == 4 * 2


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (90_899_456, "86.7 MiB"), (2**51, "2.05e+03 TiB")]
)
def test_bytes_are_said_to_three_digits(value: float, text: str) -> None:
    assert size(value) == text


def test_short_times_have_a_decimal() -> None:
    assert [seconds(value) for value in (0.04, 9.94, 10, 200)] == ["0.0s", "9.9s", "10s", "3m20s"]
