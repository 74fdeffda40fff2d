"""Micro-batches: every sample once, in order, none above its bounds that could be smaller."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpo_fast.models.batching import micro_batches
from synpo_fast.models.policy import Sample


def sample(prompt: int, *responses: int) -> Sample:
    return Sample((1,) * prompt, tuple((2,) * length for length in responses))


some_samples = st.lists(
    st.builds(lambda p, r: sample(p, *r), st.integers(1, 30), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    max_size=12,
)


@given(some_samples, st.integers(1, 5), st.none() | st.integers(1, 90))
def test_every_sample_once_and_as_many_as_fit(samples, max_pairs, max_tokens):
    batches = micro_batches(samples, max_pairs=max_pairs, max_tokens=max_tokens)
    assert [index for batch in batches for index in batch] == list(range(len(samples)))

    def fits(indices):
        rows = [len(samples[k].prompt) + sum(len(r) - 1 for r in samples[k].responses) for k in indices]
        return len(indices) <= max_pairs and (max_tokens is None or sum(rows) <= max_tokens)

    for batch in batches:
        assert fits(batch) or len(batch) == 1
    for batch, following in pairwise(batches):
        assert not fits([*batch, following[0]]), "the first of the next batch had no room"


def test_a_sample_above_the_budget_stands_alone():
    samples = [sample(4, 2, 2), sample(50, 9, 9), sample(3, 2), sample(3, 2)]
    assert micro_batches(samples, max_pairs=8, max_tokens=10) == [[0], [1], [2, 3]]
    assert micro_batches(samples, max_pairs=8, max_tokens=8) == [[0], [1], [2, 3]], "4 + 4 fit into 8"
    assert micro_batches(samples, max_pairs=3) == [[0, 1, 2], [3]]
    assert micro_batches([], max_pairs=1) == []


@pytest.mark.parametrize(("max_pairs", "max_tokens"), [(0, None), (1, 0)])
def test_bounds_must_be_positive(max_pairs, max_tokens):
    with pytest.raises(ValueError, match=f"must be positive, got {max_pairs} and {max_tokens}"):
        micro_batches([], max_pairs=max_pairs, max_tokens=max_tokens)
