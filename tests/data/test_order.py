"""Every pair once an epoch over all ranks, whatever their number, and the same order again after a resume."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpo_fast.data.order import epoch_order, num_steps, step_positions

sizes = st.integers(0, 200)
worlds = st.integers(1, 9)
per_rank = st.integers(1, 7)


@given(sizes, worlds, per_rank, st.integers(0, 2**40), st.integers(0, 50))
def test_every_pair_once_over_all_ranks(num_samples, world_size, pairs_per_rank, seed, epoch):
    order = epoch_order(num_samples, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(num_samples))
    steps = num_steps(num_samples, world_size=world_size, pairs_per_rank=pairs_per_rank)
    seen, per_step = [], []
    for step in range(steps):
        parts = [
            list(step_positions(step, rank, world_size, pairs_per_rank, num_samples=num_samples))
            for rank in range(world_size)
        ]
        assert max(map(len, parts)) <= pairs_per_rank and max(map(len, parts)) - min(map(len, parts)) <= 1
        seen += [order[position] for part in parts for position in part]
        per_step.append(sum(map(len, parts)))
    assert sorted(seen) == list(range(num_samples))
    assert set(per_step[:-1]) <= {world_size * pairs_per_rank} and 0 not in per_step, "only the last step is smaller"


@given(st.integers(1, 200), st.integers(0, 20), st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)]))
def test_a_global_step_knows_nothing_of_the_number_of_ranks(num_samples, step, shape):
    world_size, pairs_per_rank = shape
    positions = sorted(
        position
        for rank in range(world_size)
        for position in step_positions(step, rank, world_size, pairs_per_rank, num_samples=num_samples)
    )
    assert positions == list(range(min(12 * step, num_samples), min(12 * step + 12, num_samples)))


def test_the_order_is_a_matter_of_seed_and_epoch_alone():
    orders = [tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(5)]
    assert len(set(orders)) == 20, "no two alike"
    assert tuple(epoch_order(50, seed=3, epoch=4)) == orders[-1]
    assert epoch_order(10, seed=0, epoch=0) == [3, 1, 8, 5, 9, 0, 6, 7, 4, 2], "runs of earlier versions must go on"
    assert epoch_order(7, seed=1, epoch=3, shuffle=False) == list(range(7))


def test_shuffling_favours_no_place():
    """Over many epochs each index stands in each place about equally often: chi-squared with 81 degrees of freedom."""
    counts = [[0] * 10 for _ in range(10)]
    for epoch in range(4000):
        for place, index in enumerate(epoch_order(10, seed=5, epoch=epoch)):
            counts[place][index] += 1
    statistic = sum((count - 400) ** 2 / 400 for row in counts for count in row)
    assert 40 < statistic < 140


def test_a_step_without_an_end_is_whole():
    assert list(step_positions(2, 1, 3, 4)) == [25, 28, 31, 34]
    assert list(step_positions(2, 1, 3, 4, num_samples=29)) == [25, 28]
    assert list(step_positions(2, 1, 3, 4, num_samples=25)) == []
    assert list(step_positions(9, 0, 3, 4, num_samples=25)) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_positions(0, 2, 2, 1), "rank=2 and world_size=2"),
        (lambda: step_positions(0, 0, 1, 0), "got 0 and 0"),
        (lambda: step_positions(-1, 0, 1, 1), "got 1 and -1"),
        (lambda: epoch_order(3, seed=0, epoch=-1), "got 3 and -1"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
