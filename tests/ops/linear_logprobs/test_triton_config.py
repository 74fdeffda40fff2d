"""The split of a problem keeps memory within its bound and does no work past the vocabulary."""

import pytest
import torch

from synpo_fast.ops.linear_logprobs import triton_config
from synpo_fast.ops.linear_logprobs.triton_config import cut_forward, cut_weight_grad, kernel_config

SHAPES = [(3584, 152064), (4096, 128256), (2048, 151936)]


@pytest.mark.parametrize(("dim", "vocabulary"), SHAPES)
@pytest.mark.parametrize("num_rows", [4096, 4097, 5000, 8192, 16384, 32768])
@pytest.mark.parametrize(("capability", "programs"), [(80, 108), (90, 132), (100, 148)])
def test_everything_held_is_within_five_percent_of_the_logits(dim, vocabulary, num_rows, capability, programs):
    config = kernel_config(torch.bfloat16, capability)
    cuts = cut_forward(num_rows, dim, vocabulary, 2, config, programs)
    held = (
        num_rows * dim * 2  # the copied rows, whose place the result takes
        + max(
            cut.splits * cut.rows * dim * 4  # partial sums
            + cut.rows * cut.columns * 2  # exponentials
            + 2 * cut.rows * cut.columns // config.logits.columns * 4  # references and sums of tiles
            for cut in cuts
        )
    )
    assert held <= num_rows * vocabulary * 4 * 0.05
    strip = cut_weight_grad(num_rows, dim, vocabulary, 2, config, programs) * num_rows * 2
    assert num_rows * dim * 2 + strip <= num_rows * vocabulary * 4 * 0.05


@pytest.mark.parametrize(("dim", "vocabulary"), [*SHAPES, (4096, 32000), (64, 100)])
@pytest.mark.parametrize("num_rows", [1, 100, 256, 512, 1024, 4096, 16384])
def test_strips_cover_the_vocabulary_in_whole_tiles_and_none_is_empty(dim, vocabulary, num_rows):
    """The kernels compute no tile past the vocabulary, so the last strip may be narrower than the others."""
    config = kernel_config(torch.bfloat16, 90)
    cuts = cut_forward(num_rows, dim, vocabulary, 2, config, 132)
    assert sum(cut.rows for cut in cuts) == num_rows
    widths = {cut.columns for cut in cuts} | {cut_weight_grad(num_rows, dim, vocabulary, 2, config)}
    for columns in widths:
        assert columns % config.logits.columns == 0 and columns % config.logit_grads.columns == 0
        strips = -(-vocabulary // columns)
        assert 0 < vocabulary - (strips - 1) * columns <= columns
    for cut in cuts:
        assert cut.rows >= 1 and 1 <= cut.splits <= 8
    assert all(cut.rows % config.logits.rows == 0 for cut in cuts[:-1])


def test_tiles_of_every_generation_are_known():
    for capability in (80, 86, 89, 90, 100, 103, 120):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for simple in (True, False):
                config = kernel_config(dtype, capability, simple=simple)
                assert config.copy_engine == (90 <= capability < 120)
                tile = config.logits
                assert (tile.rows + tile.columns) * tile.depth * dtype.itemsize * tile.num_stages < (
                    100_000 if capability >= 120 or capability in (86, 89) else 230_000
                )


def test_nearby_numbers_of_rows_share_one_computation():
    """Batches vary in length, and computing a choice takes about a millisecond."""
    config = kernel_config(torch.bfloat16, 90)
    computed = triton_config._Blocks.best.cache_info().misses
    for rows in range(33 * 128 + 1, 34 * 128):
        cut_forward(rows, 3584, 152064, 2, config, 132)
    assert triton_config._Blocks.best.cache_info().misses == computed + 1


@pytest.mark.parametrize(("capability", "programs"), [(0, 3), (80, 108), (90, 114), (100, 148), (120, 170)])
@pytest.mark.parametrize(("dim", "vocabulary"), [(8, 2), (576, 100), (16384, 32000), (4096, 262144)])
def test_any_problem_is_cut_into_blocks_that_cover_its_rows(capability, programs, dim, vocabulary):
    for dtype in (torch.float16, torch.float32):
        config = kernel_config(dtype, capability)
        whole = -(-vocabulary // config.logits.columns) * config.logits.columns
        for num_rows in (1, 129, 777, 4095, 20000):
            for kept in (0, num_rows // 3, num_rows):
                cuts = cut_forward(num_rows, dim, vocabulary, dtype.itemsize, config, programs, kept)
                ends = [sum(cut.rows for cut in cuts[: n + 1]) for n in range(len(cuts))]
                assert ends[-1] == num_rows and (kept == 0 or kept in ends)
                for cut, end in zip(cuts, ends, strict=True):
                    assert cut.rows > 0 and 0 < cut.columns <= whole and cut.columns % config.logits.columns == 0
                    assert cut.columns == whole or end > kept
