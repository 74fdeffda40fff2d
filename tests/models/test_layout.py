"""Plans and attention of packed rows, against a naive statement of who may see whom."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synpo_fast.models.attention import (
    SEGMENTS,
    attention_mask,
    dense_mask,
    pack_row,
    segments_attention,
)
from synpo_fast.models.layout import SampleLengths, plan_rows

some_samples = st.lists(
    st.builds(SampleLengths, st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=6,
)


@given(some_samples, st.booleans(), st.booleans(), st.none() | st.integers(1, 80))
def test_every_response_is_placed_once_and_nothing_overlaps(samples, share, pack, budget):
    rows = plan_rows(samples, share_prefix=share, pack=pack, row_tokens=budget)
    placed = sorted((g.sample, r) for row in rows for g in row.groups for r in g.responses)
    assert placed == [(i, r) for i, s in enumerate(samples) for r in range(len(s.responses))]
    for row in rows:
        taken = [at for segment in row.segments for at in range(segment.start, segment.end)]
        assert taken == list(range(row.length)), "rows are filled in order, without a hole"
        assert budget is None or row.length <= budget or len(row.groups) == 1
        assert pack or len(row.groups) == 1
        for group in row.groups:
            for branch, response in enumerate(group.responses):
                predicting = group.predicting_rows(branch)
                assert len(predicting) == samples[group.sample].responses[response]
                assert predicting[0] == group.prefix.end - 1
    assert rows == plan_rows(samples, share_prefix=share, pack=pack, row_tokens=budget)


def test_packing_is_first_fit_by_length():
    samples = [SampleLengths(10, (5, 5)), SampleLengths(3, (2, 2)), SampleLengths(20, (5, 6)), SampleLengths(2, (1, 1))]
    rows = plan_rows(samples, row_tokens=30)  # lengths 18, 5, 29, 2
    assert [[group.sample for group in row.groups] for row in rows] == [[2], [0, 1, 3]]
    assert [row.length for row in rows] == [29, 25]


def naive_mask(row) -> torch.Tensor:
    """Row i sees row j if j is not after it and both are of one group, and not of two different branches."""
    owner = {}
    for g, group in enumerate(row.groups):
        for at in range(group.prefix.start, group.prefix.end):
            owner[at] = (g, None)
        for b, branch in enumerate(group.branches):
            for at in range(branch.start, branch.end):
                owner[at] = (g, b)
    mask = torch.zeros(row.length, row.length, dtype=torch.bool)
    for i in range(row.length):
        for j in range(i + 1):
            (gi, bi), (gj, bj) = owner[i], owner[j]
            mask[i, j] = gi == gj and (bj is None or bi == bj)
    return mask


def plain_varlen(q, k, v, packed):
    """The contract of varlen flash attention, by loops: sequence s has queries [q_s, q_s+1) and gathered keys
    [k_s, k_s+1); query i of n sees the first m - n + i + 1 of its m keys (causal from the bottom right)."""
    k, v = k[0][:, packed.key_index], v[0][:, packed.key_index]
    out = torch.empty_like(q[0])
    for s in range(packed.query_ends.shape[0] - 1):
        queries = range(int(packed.query_ends[s]), int(packed.query_ends[s + 1]))
        first, last = int(packed.key_ends[s]), int(packed.key_ends[s + 1])
        for i, at in enumerate(queries):
            seen = slice(first, last - len(queries) + i + 1)
            scores = (q[0][:, at, None] * k[:, seen]).sum(-1) / q.shape[-1] ** 0.5
            out[:, at] = (scores.softmax(-1)[..., None] * v[:, seen]).sum(1)
    return out.transpose(0, 1)[None]


@settings(max_examples=25)
@given(some_samples, st.booleans())
def test_mask_segments_and_varlen_agree(samples, share):
    (row,) = plan_rows(samples, share_prefix=share)
    torch.testing.assert_close(dense_mask(row), naive_mask(row))
    q, k, v = torch.randn(3, 1, 2, row.length, 8, dtype=torch.float64)
    packed = pack_row(row)
    masked = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=naive_mask(row)).transpose(1, 2)
    segments, _ = segments_attention(None, q, k, v, None, packed=packed)
    torch.testing.assert_close(segments, masked)
    torch.testing.assert_close(plain_varlen(q, k, v, packed), masked)


def test_grouped_heads():
    (row,) = plan_rows([SampleLengths(7, (4, 6))])
    q, k, v = torch.randn(1, 4, row.length, 8), torch.randn(1, 2, row.length, 8), torch.randn(1, 2, row.length, 8)
    grouped, _ = segments_attention(None, q, k, v, None, packed=pack_row(row), scaling=0.3)
    full, _ = segments_attention(
        None, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), None, packed=pack_row(row), scaling=0.3
    )
    torch.testing.assert_close(grouped, full)


def test_masks_by_implementation():
    (row,) = plan_rows([SampleLengths(3, (2, 3))])
    packed = pack_row(row)
    assert attention_mask(packed, "sdpa", torch.float32).dtype == torch.bool
    additive = attention_mask(packed, "eager", torch.float32)
    assert additive.is_floating_point() and (additive == 0).equal(naive_mask(row)[None, None])
    assert attention_mask(packed, SEGMENTS, torch.float32).numel() == 1
    with pytest.raises(ValueError, match="attn_implementation='flex_attention'"):
        attention_mask(packed, "flex_attention", torch.float32)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([SampleLengths(0, (2,))], "sample 0 has an empty prompt"),
        ([SampleLengths(1, (2,)), SampleLengths(1, (2, 0))], r"sample 1 has an empty response: lengths \[2, 0\]"),
        ([SampleLengths(1, ())], "sample 0 has an empty response"),
    ],
)
def test_mistakes_are_named(samples, message):
    with pytest.raises(ValueError, match=message):
        plan_rows(samples)
