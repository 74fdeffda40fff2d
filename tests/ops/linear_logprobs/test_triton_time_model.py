"""The model of time counts what a reader counts by hand, and the splits that triton_config.py chooses with it are good ones."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from synpo_fast.ops.linear_logprobs.triton_config import (
    MIB,
    Cut,
    Tile,
    cut_forward,
    cut_weight_grad,
    kernel_config,
)
from synpo_fast.ops.linear_logprobs.triton_time_model import (
    EXPOSED,
    FILL,
    HOPPER,
    LAUNCH,
    ROW,
    Product,
    backward_products,
    backward_time,
    forward_products,
    forward_time,
    kept_time,
    occupancy,
    product_time,
)

SHAPES = [(3584, 152064), (4096, 128256), (2048, 151936), (4096, 32000)]
ROWS = [512, 1000, 2048, 4096, 8192, 16384]
PROGRAMS = {90: 132, 100: 148}


def occupied(cuts, dim, vocabulary, kernel=None, arch=90):
    config = kernel_config(torch.bfloat16, arch)
    products = forward_products(cuts, dim, vocabulary, 2, config, PROGRAMS[arch])
    return occupancy([product for product in products if kernel in (None, product.kernel)], PROGRAMS[arch])


def test_occupancy_counted_by_hand():
    """With D = 3584 a block of R rows has R / 128 * 14 tiles of 128 x 256, times the partial sums; a wave has 132."""
    for rows, splits, tiles, waves in (
        (2048, 1, 224, 2),
        (4096, 1, 448, 4),
        (3584, 1, 392, 3),
        (1792, 2, 392, 3),
        (512, 7, 392, 3),
    ):
        found = occupied([Cut(rows, 50 * 256, splits)], 3584, 152064, "weighted")
        assert found == pytest.approx(tiles / (132 * waves)), rows
    assert pytest.approx(0.848, abs=5e-4) == 224 / 264 and pytest.approx(0.99, abs=1e-3) == 392 / 396
    # 152064 columns are 594 tiles: 11 strips of 50 tiles and one of 44. 16 row tiles: 800 tiles in 7 waves, 704 in 6.
    exponentials = occupied([Cut(2048, 50 * 256, 1)] * 2, 3584, 152064, "exponentials")
    assert exponentials == pytest.approx((11 * 800 + 704) / (132 * (11 * 7 + 6)))
    assert exponentials == pytest.approx(0.867, abs=1e-3)


def test_time_of_one_product_counted_by_hand():
    """265 tiles are 3 waves. A tile: 2 * 128 * 256 * 640 operations, filling and epilogue, 1 MB of partial sums."""
    tile = Tile(128, 256, 64, 8, 8, 3)
    product = Product("", 1, tile, tiles=265, depth=600, epilogue=0.5, summed=10**6, traffic=10**8)
    seconds = 2 * 128 * 256 * 640 / HOPPER.operations + (FILL + 0.5 * 128 * 256) / HOPPER.clock + 1e6 / HOPPER.memory
    assert 3 * seconds > 1e8 / 4.3e12
    assert product_time(product, HOPPER, 132) == pytest.approx(3 * seconds + EXPOSED * 1e8 / 4.3e12 + LAUNCH)
    traffic = product._replace(traffic=10**12)
    assert product_time(traffic, HOPPER, 132) == pytest.approx((1 + EXPOSED) * 1e12 / 4.3e12 + LAUNCH)


def test_the_products_cover_every_tile_once():
    """1000 rows in blocks of 384 and 5000 columns in strips of 1536: the operations are those of whole tiles."""
    config = kernel_config(torch.bfloat16, 90)
    products = list(forward_products([*[Cut(384, 1536, 2)] * 2, Cut(232, 1536, 2)], 700, 5000, 2, config, 132))
    tiles = {
        kernel: sum(p.launches * p.tiles for p in products if p.kernel == kernel)
        for kernel in ("exponentials", "weighted")
    }
    assert tiles["exponentials"] == (2 * 3 + 2) * 20
    assert tiles["weighted"] == (2 * 3 + 2) * 4 * 3 * 2  # row tiles, strips, column tiles of D, partial sums
    launches = Counter[int]()
    for p in products:
        launches[p.summed] += p.launches if p.kernel == "weighted" else 0
    assert +launches == {128 * 256 * 4: 3, 2 * 128 * 256 * 4: 3 * 3}  # the first strip of a block reads no earlier sums
    products = list(backward_products(1000, 700, 5000, 2, config, 1536))
    tiles = {
        kernel: sum(p.launches * p.tiles for p in products if p.kernel == kernel)
        for kernel in ("logit_grads", "weight_grad")
    }
    assert tiles == {"logit_grads": 8 * 20, "weight_grad": 40 * 3}


@pytest.mark.parametrize("arch", PROGRAMS)
@pytest.mark.parametrize(("dim", "vocabulary"), SHAPES)
def test_more_rows_take_longer_and_no_prediction_beats_the_rate_of_a_bare_product(arch, dim, vocabulary):
    """cuBLAS reached 798 TFLOP/s at best on an H200, QuACK publishes 732 for this head; a prediction above either is wrong."""
    config, programs = kernel_config(torch.bfloat16, arch), PROGRAMS[arch]
    before = forward_before = 0.0
    for rows in ROWS:
        problem = (dim, vocabulary, 2, config)
        forward = forward_time(cut_forward(rows, *problem, programs), *problem, programs)
        backward = backward_time(rows, *problem, cut_weight_grad(rows, *problem, programs), programs)
        for seconds in (forward, backward):
            assert 4 * rows * dim * vocabulary / seconds < (732e12 if arch == 90 else 0.71 * 2250e12)
        assert forward > forward_before and backward > before
        before, forward_before = backward, forward


def every_split(num_rows, dim, vocabulary, config):
    """Equal blocks of whole tiles and a rest, with all numbers of partial sums and many widths of strips that fit."""
    unit, columns = max(config.logits.rows, config.weighted.rows), config.logits.columns
    allowed = max((48 if num_rows >= 4096 else 96) * MIB, num_rows * vocabulary // 5 - num_rows * dim * 2)

    def cuts(rows):
        for splits in range(1, 9):
            left = min(allowed - splits * rows * dim * 4, 256 * MIB)
            widest = min(left // (rows * (2 * columns + 8)), -(-vocabulary // columns))
            for tiles in range(widest, widest // 2, -max(1, widest // 24)):
                yield Cut(rows, tiles * columns, splits)

    for rows in range(unit, min(num_rows, 4096) + 1, unit):
        full, rest = divmod(num_rows, rows)
        last = [[cut] for cut in cuts(rest)] if rest else [[]]
        programs = PROGRAMS[90] if config.chip is HOPPER else PROGRAMS[100]
        best = min(last, key=lambda last: forward_time(last, dim, vocabulary, 2, config, programs) if last else 0.0)
        for cut in cuts(rows):
            yield [*[cut] * full, *best]


@pytest.mark.parametrize("arch", PROGRAMS)
@pytest.mark.parametrize(
    ("num_rows", "dim", "vocabulary"), [(640, 2048, 151936), (2176, 3584, 152064), (4096, 4096, 128256)]
)
def test_the_choice_is_within_two_percent_of_the_best_split(arch, num_rows, dim, vocabulary):
    config, programs = kernel_config(torch.bfloat16, arch), PROGRAMS[arch]

    def predicted(cuts):
        return forward_time(cuts, dim, vocabulary, 2, config, programs)

    best = min(predicted(cuts) for cuts in every_split(num_rows, dim, vocabulary, config))
    assert predicted(cut_forward(num_rows, dim, vocabulary, 2, config, programs)) <= 1.02 * best


@pytest.mark.parametrize(("dim", "vocabulary"), SHAPES[:3])
@pytest.mark.parametrize("num_rows", [4096, 4500, 8192, 16384])
def test_hopper_is_full_from_4096_rows_on(num_rows, dim, vocabulary):
    """Blocks of 2,048 or 4,096 rows with one partial sum leave 14 % of the second product's slots empty at D = 3584."""
    config = kernel_config(torch.bfloat16, 90)
    cuts = cut_forward(num_rows, dim, vocabulary, 2, config, 132)
    assert sum(cut.rows for cut in cuts) == num_rows
    assert occupied(cuts, dim, vocabulary) >= 0.97, cuts


@pytest.mark.parametrize(("dim", "vocabulary"), SHAPES)
@pytest.mark.parametrize("num_rows", [512, 4096, 16384])
def test_the_backward_is_full_too(num_rows, dim, vocabulary):
    config = kernel_config(torch.bfloat16, 90)
    columns = cut_weight_grad(num_rows, dim, vocabulary, 2, config, 132)
    products = list(backward_products(num_rows, dim, vocabulary, 2, config, columns))
    assert occupancy(products, 132) >= 0.94, columns


def test_kept_rows_are_blocks_with_all_columns_and_save_the_second_logits():
    config = kernel_config(torch.bfloat16, 90)
    cuts = cut_forward(5000, 3584, 152064, 2, config, 132, 4096)
    ends = [sum(cut.rows for cut in cuts[: n + 1]) for n in range(len(cuts))]
    assert 4096 in ends and ends[-1] == 5000
    assert all(cut.columns == 152064 for cut, end in zip(cuts, ends, strict=True) if end <= 4096)
    small = cut_forward(4096, 4096, 32000, 2, config, 132, 4096)
    assert (
        max(cut.splits * cut.rows for cut in small) * 4096 * 4 <= 48 * MIB
    )  # the bound holds for partial sums here, too
    kept = cut_forward(4096, 3584, 152064, 2, config, 132, 4096)
    again = backward_time(4096, 3584, 152064, 2, config, cut_weight_grad(4096, 3584, 152064, 2, config, 132), 132)
    again += forward_time(cut_forward(4096, 3584, 152064, 2, config, 132), 3584, 152064, 2, config, 132)
    assert 0.65 < kept_time(kept, 3584, 152064, 2, config, 132) / again < 0.75  # 6NDV beside 8NDV


def test_rates_follow_the_chip():
    """Twice the rates take half the time, but for launches and programs of one row."""
    config = kernel_config(torch.bfloat16, 90)
    chip = replace(HOPPER, operations=2 * HOPPER.operations, memory=2 * HOPPER.memory, clock=2 * HOPPER.clock)
    cuts = [Cut(1024, 12800, 1)] * 4
    slow = forward_time(cuts, 3584, 152064, 2, config, 132)
    fast = forward_time(cuts, 3584, 152064, 2, replace(config, chip=chip), 132)
    launches = LAUNCH * (1 + 4 * (3 * 12 + 1))  # 12 strips: two products and one settling each; preparing and finishing
    fixed = launches + (1 + 12 + 4) * 4096 * ROW / 132
    assert slow - fixed == pytest.approx(2 * (fast - fixed))
