"""The order of examples: complete, seeded, and the same wherever one starts to read it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.engine.batches import BatchPlan, by_length

PLANS = st.builds(
    BatchPlan,
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=70),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)


@settings(max_examples=60, deadline=None)
@given(PLANS, st.integers(0, 3))
def test_every_example_stands_in_exactly_one_batch_of_an_epoch(plan: BatchPlan, epoch: int) -> None:
    batches = plan.batches(epoch)
    assert sorted(number for batch in batches for number in batch) == list(range(len(plan.lengths)))
    assert all(0 < len(batch) <= plan.batch_size for batch in batches)


@settings(max_examples=60, deadline=None)
@given(PLANS, st.integers(0, 12), st.integers(0, 12))
def test_steps_read_from_the_middle_are_those_of_a_whole_reading(plan: BatchPlan, start: int, more: int) -> None:
    assert list(plan.steps(start, start + more)) == list(plan.steps(0, start + more))[start:]


@settings(max_examples=30, deadline=None)
@given(PLANS)
def test_an_epoch_has_the_steps_it_says(plan: BatchPlan) -> None:
    steps = list(plan.steps(0, plan.steps_per_epoch))
    assert [number for _, window in steps for batch in window for number in batch] == [
        number for batch in plan.batches(0) for number in batch
    ]
    assert all(len(window) == plan.accumulation for _, window in steps[:-1])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    plan = BatchPlan(list(range(50)), 5, 1, 1, seed=1)
    other = BatchPlan(list(range(50)), 5, 1, 1, seed=2)
    assert plan.batches(0) == plan.batches(0)
    assert plan.batches(0) != plan.batches(1)
    assert plan.batches(0) != other.batches(0)


def test_a_window_saves_padding_and_keeps_batches_in_random_order() -> None:
    lengths = [1 + (7 * i) % 50 for i in range(320)]

    def padded(window: int) -> int:
        batches = BatchPlan(lengths, 8, 1, window, seed=0).batches(0)
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    assert padded(16) < 0.75 * padded(1)
    longest = [max(lengths[i] for i in batch) for batch in BatchPlan(lengths, 8, 1, 40, seed=0).batches(0)]
    assert longest != sorted(longest)


def test_scoring_takes_the_longest_batch_first() -> None:
    assert by_length([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]
