"""The integer weights: a resize made of them equals torch's own on uint8, to the bit."""

import pytest
import torch
import torch.nn.functional as F

from synpo_fast.ops.video_patches.taps import TAP_STEP, column_taps, row_taps


def resized(pixels: torch.Tensor, n_out: int) -> torch.Tensor:
    """The last axis of uint8 [..., n_in], output by output."""
    n_in = pixels.shape[-1]
    taps = column_taps(n_in, n_out, False)
    starts, weights = taps.table[0].long(), taps.table[1:].long()
    assert len(weights) == taps.num_taps and taps.num_taps % TAP_STEP == 0
    at = (starts + torch.arange(taps.num_taps)[:, None]).clamp(max=n_in - 1)
    total = (pixels.long()[..., at] * weights).sum(-2) + 2 ** (taps.precision - 1)
    assert total.abs().max() < 2**31  # the kernel adds in int32
    return (total >> taps.precision).clamp(0, 255).to(torch.uint8)


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="the integer code is AVX's")
def test_equal_to_torch_on_many_sizes():
    sizes = torch.randint(1, 80, (150, 4), generator=torch.Generator().manual_seed(0)).tolist()
    for height, width, new_height, new_width in [
        *sizes, (270, 480, 112, 196), (3, 1000, 2, 7), (1500, 2, 3, 2), (1, 1, 5, 6), (900, 1, 90, 1),
    ]:  # fmt: skip
        frames = torch.randint(256, (2, height, width, 3), dtype=torch.uint8)
        if height % 2:
            frames = (frames > 127).to(torch.uint8) * 255
        frames = frames.permute(0, 3, 1, 2)
        ours = resized(resized(frames, new_width).mT, new_height).mT
        theirs = F.interpolate(frames, (new_height, new_width), mode="bicubic", antialias=True)
        assert torch.equal(ours, theirs), (height, width, new_height, new_width)


@pytest.mark.parametrize("n_in, n_out", [(30, 11), (5, 21), (1, 9), (64, 8), (7, 7), (9, 1), (1000, 3)])
@pytest.mark.parametrize("block", [1, 8])
def test_rows_by_blocks_are_the_same_weights(n_in, n_out, block):
    """Dense matrices out of both tables."""
    columns, rows = column_taps(n_in, n_out, False), row_taps(n_in, n_out, block, False)
    assert columns.precision == rows.precision
    from_columns, from_rows = torch.zeros(2, n_out, n_in + columns.num_taps, dtype=torch.int32)
    for i in range(n_out):
        start = int(columns.table[0, i])
        from_columns[i, start : start + columns.num_taps] = columns.table[1:, i]
    for index, line in enumerate(rows.table):
        weights = line[2:].view(rows.num_taps, block)
        for tap, j in enumerate(range(int(line[0]), int(line[1]))):
            outputs = from_rows[index * block : (index + 1) * block]
            outputs[:, j] = weights[tap, : len(outputs)]
        assert not weights[int(line[1] - line[0]) :].any()
    assert torch.equal(from_columns, from_rows) and not from_columns[:, n_in:].any()
    sums = from_columns.double().sum(1) / 2**columns.precision
    torch.testing.assert_close(
        sums, torch.ones(n_out, dtype=torch.float64), rtol=0, atol=n_in * 2.0**-columns.precision
    )
