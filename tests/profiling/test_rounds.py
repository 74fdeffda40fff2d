"""Interleaved rounds: their order, and what is made of their times. No test asserts a time."""

import itertools
import math
import random

import pytest
import torch

from synpo_fast.profiling.rounds import (
    Timing,
    interleave,
    median_interval,
    median_ratio,
    round_order,
    spread,
    summarise,
)

CPU = torch.device("cpu")


def test_the_order_alternates():
    seen = []
    names = ["a", "b", "c"]
    calls = {name: lambda name=name: seen.append(name) for name in names}
    samples = interleave(calls, rounds=6, device=CPU)
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert len(rounds) == 6 and all(sorted(order) == names for order in rounds)
    assert rounds == [round_order(names, i) for i in range(6)]
    assert {order[0] for order in rounds} == set(names)  # everyone goes first at some time
    assert all(first != second for first, second in itertools.pairwise(rounds))
    followers = {(order[i], order[i + 1]) for order in rounds for i in range(2)}
    assert len(followers) == 6  # and follows everyone else
    assert all(len(times) == 6 for times in samples.values())


def test_two_contestants_swap_places():
    assert {tuple(round_order(["a", "b"], i)) for i in range(4)} == {("a", "b"), ("b", "a")}


def test_the_budget_ends_the_rounds_but_not_before_three():
    samples = interleave({"a": lambda: None}, rounds=50, device=CPU, budget_seconds=0.0, timer=lambda call: 1.0)
    assert samples == {"a": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize("rounds", [5, 7, 8, 11, 20])
def test_the_interval_holds_the_median_in_nine_of_ten_repetitions(rounds):
    draw = random.Random(rounds)
    held = narrower = 0
    for _ in range(4000):
        values = [draw.expovariate(1.0) for _ in range(rounds)]
        low, high = median_interval(values)
        held += low <= math.log(2) <= high
        rising = sorted(values)
        narrower += rising[1] > low
    assert held / 4000 > 0.9
    assert (narrower == 0) == (rounds >= 8), "it is no wider than it has to be"


def test_everyone_follows_others_from_round_to_round():
    """A profile's warm-up has the rounds before 0."""
    names = list("abcdefgh")
    orders = [round_order(names, index) for index in range(-2, 2 * len(names))]
    assert all(sorted(order) == sorted(names) for order in orders)
    for place in (0, -1):
        assert {order[place] for order in orders} == set(names)


def test_summaries():
    assert summarise([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    assert summarise([1.0, 2.0, 3.0, 4.0, 100.0]) == Timing(3.0, 2.0, 4.0, 5)
    assert median_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0  # by round, not of the medians
    assert spread([5.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 5.0}
    with pytest.raises(ValueError, match="no samples"):
        summarise([])
