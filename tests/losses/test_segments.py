"""Segment reductions against Python sums, on ragged, empty and unused stretches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synpo_fast.losses import segments


def test_each_reduction_by_hand():
    # Responses [-1, -3], [], [-2], and one token at the end that no response owns.
    logps = torch.tensor([-1.0, -3.0, -2.0, -7.0])
    offsets = torch.tensor([0, 2, 2, 3])
    assert segments.segment_lengths(offsets).tolist() == [2, 0, 1]
    assert segments.segment_ids(offsets, 4).tolist() == [0, 0, 2, 3]
    assert segments.segment_sum(logps, offsets).tolist() == [-4.0, 0.0, -2.0]
    assert segments.segment_mean(logps, offsets).tolist() == [-2.0, 0.0, -2.0]
    geometric = segments.geometric_mean(logps, offsets).tolist()
    assert geometric == pytest.approx([math.exp(-2), 1.0, math.exp(-2)], rel=1e-6)
    arithmetic = segments.arithmetic_mean(logps, offsets).tolist()
    assert arithmetic == pytest.approx([(math.exp(-1) + math.exp(-3)) / 2, 0.0, math.exp(-2)], rel=1e-6)
    assert segments.per_token(torch.tensor([5.0, 6.0, 7.0]), offsets, 4).tolist() == [5.0, 5.0, 7.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_is_fp32_or_wider(dtype):
    x = torch.tensor([-1.5, -2.5], dtype=dtype)
    sums = segments.segment_sum(x, torch.tensor([0, 2]))
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert sums.item() == -4.0


def test_fp32_sum_of_32k_tokens_is_no_worse_than_eager():
    x = -3 * torch.rand(32768, generator=torch.Generator().manual_seed(0))
    truth = math.fsum(x.tolist())
    ours = abs(segments.segment_sum(x, torch.tensor([0, 32768])).item() - truth)
    assert ours <= abs(x.sum().item() - truth)
    assert ours <= abs(truth) * 2**-24


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(st.lists(st.floats(-50, 0), max_size=9), min_size=1, max_size=6))
def test_any_lengths_match_python(responses):
    offsets = torch.tensor([0, *[len(y) for y in responses]]).cumsum(0)
    x = torch.tensor([lp for y in responses for lp in y], dtype=torch.float64)
    expected = [math.fsum(y) for y in responses]
    assert segments.segment_sum(x, offsets).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    expected = [math.fsum(y) / len(y) if y else 0.0 for y in responses]
    assert segments.segment_mean(x, offsets).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_gradient_of_a_mean_is_one_over_its_length():
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    segments.segment_mean(x, torch.tensor([0, 2, 3])).sum().backward()
    assert x.grad.tolist() == [0.5, 0.5, 1.0, 0.0]  # the last token belongs to no response
