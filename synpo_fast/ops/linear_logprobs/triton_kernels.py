"""Triton kernels of fused_linear_logprobs. triton_launch.py launches them; README.md in this folder counts their work.

The kernels work on compacted rows: valid rows come first in a [N, D] copy. The number of valid rows stays on the device, so
dropping ignored rows needs no synchronisation. Row tiles beyond that number are never visited.

Exponentials are exp(z - t_n) with a reference t_n that starts at the target's logit, or `headroom` below it, and changes lazily.
A tile uses its own maximum only if it holds a logit more than LIMIT above the reference, and only then _settle_rows_kernel
rescales the row's earlier sums to the new reference. bf16 and fp32 keep their relative precision from e^-60 to e^60, so this
loses no precision, and in ordinary data no partial sum is rescaled. The target itself is excluded from every sum.

With STATS three more sums of each row are computed: dots, the sum of e (z - t); best, the largest logit; squares, the sum of
exp(2 (z - best)). Entropy and the sum of squared probabilities follow from them.

Arguments that follow the number of rows are not specialised: otherwise Triton would compile a kernel again for a length of 1, for
a multiple of 16, or for a pointer off a 16-byte boundary.
"""

import triton
import triton.language as tl


@triton.jit
def _bounded_logit(raw, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """f(raw) = softcap * tanh(raw * logit_scale / softcap)."""
    z = raw * logit_scale
    if HAS_SOFTCAP:
        x = z / softcap
        bounded = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
        z = tl.where(x < 0, -bounded, bounded) * softcap
    return z


@triton.jit
def _logit_slope(z, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Derivative df/draw from z = f(raw)."""
    if HAS_SOFTCAP:
        t = z / softcap
        return logit_scale * (1.0 - t * t)
    else:
        return tl.zeros_like(z) + logit_scale


@triton.jit
def _log1p(x):
    small = x * (1.0 - x * (0.5 - x * (0.3333333333 - x * (0.25 - x * 0.2))))
    return tl.where(x < 0.03125, small, tl.log(1.0 + x))


@triton.jit
def _tile_of(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile coordinates in an order that visits GROUP row tiles together, so that both operands stay in L2."""
    per_group = GROUP * column_tiles
    first = (index // per_group) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + (index % per_group) % height, (index % per_group) // height


@triton.jit
def _load_tile(source, row, column, stride, num_rows, num_columns, TMA: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Loads the tile [R, C] at (row, column) of a row-major matrix, 0 outside. `source` is a tensor descriptor or a pointer."""
    if TMA:
        return source.load([row, column])
    else:
        r = row + tl.arange(0, R)
        c = column + tl.arange(0, C)
        inside = (r[:, None] < num_rows) & (c[None, :] < num_columns)
        return tl.load(source + r[:, None].to(tl.int64) * stride + c[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["labels", "rows", "num_hidden"])
def _prepare_rows_kernel(
    hidden, weight, bias, labels, rows, place, num_hidden, V, D, hidden_stride, weight_stride, logit_scale, softcap,
    ignore_index, headroom, compact, label_out, target_out, top_out, others_out,
    HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copies a valid row to its position among the valid rows and computes its target logit as an fp32 dot product.

    headroom: distance of the first reference below the target's logit.
    For a label or row out of range the target is NaN, so that the log-prob shows the error without a synchronisation.
    """
    position = tl.program_id(0)
    label = tl.load(labels + position)
    if label != ignore_index:
        n = tl.load(place + position).to(tl.int64) - 1
        source = position.to(tl.int64)
        if HAS_ROWS:
            source = tl.load(rows + position)
        in_range = (label >= 0) & (label < V) & (source >= 0) & (source < num_hidden)
        label = tl.where(in_range, label, 0)
        source = tl.where(in_range, source, 0)
        products = tl.zeros([BLOCK_D], tl.float32)
        for begin in range(0, D, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            x = tl.load(hidden + source * hidden_stride + d, mask=d < D, other=0.0)
            w = tl.load(weight + label * weight_stride + d, mask=d < D, other=0.0)
            tl.store(compact + n * D + d, x, mask=d < D)
            products += x.to(tl.float32) * w.to(tl.float32)
        raw = tl.sum(products, 0)
        if HAS_BIAS:
            raw += tl.load(bias + label).to(tl.float32)
        target = _bounded_logit(raw, logit_scale, softcap, HAS_SOFTCAP)
        target = tl.where(in_range, target, float("nan"))
        tl.store(label_out + n, label)
        tl.store(target_out + n, target)
        tl.store(top_out + n, tl.where(target == target, tl.maximum(target - headroom, -1e30), 0.0))
        tl.store(others_out + n, 0.0)


@triton.jit
def _logits_tile(
    x, w, bias, row, column, D, V, num_rows, weight_stride, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits z = f(x W^T + bias) of one tile, in fp32."""
    raw = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for d in range(0, D, BLOCK_D):
        a = _load_tile(x, row, d, D, num_rows, D, TMA, BLOCK_N, BLOCK_D)
        b = _load_tile(w, column, d, weight_stride, V, D, TMA, BLOCK_V, BLOCK_D)
        raw = tl.dot(a, b.T, raw, input_precision=PRECISION)
    if HAS_BIAS:
        c = column + tl.arange(0, BLOCK_V)
        raw += tl.load(bias + c, mask=c < V, other=0.0).to(tl.float32)[None, :]
    return _bounded_logit(raw, logit_scale, softcap, HAS_SOFTCAP)


@triton.jit(do_not_specialize=["count", "first_row", "num_rows"])
def _exp_logits_forward_kernel(
    x, w, bias, labels, top, exponentials, tile_top, tile_sum, tile_dots, tile_best, tile_squares, count, first_row, num_rows,
    first_column, strip_columns, V, D, weight_stride, logit_scale, softcap, num_programs,
    KEEP: tl.constexpr, STATS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes each tile's t and sum of exp(z - t) for one vocabulary strip and one row block.

    KEEP: also stores exp(z - t) z' in the input's dtype. exponentials [num_rows, strip_columns], tile_* [column tiles, num_rows].
    """
    valid = tl.minimum(tl.load(count).to(tl.int32) - first_row, num_rows)
    row_tiles = tl.cdiv(valid, BLOCK_N)
    column_tiles = tl.cdiv(tl.minimum(strip_columns, V - first_column), BLOCK_V)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, num_programs):
        row_tile, column_tile = _tile_of(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * BLOCK_N
        column = first_column + column_tile * BLOCK_V
        z = _logits_tile(
            x, w, bias, first_row + row, column, D, V, first_row + num_rows, weight_stride, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        r = row + tl.arange(0, BLOCK_N)
        c = column + tl.arange(0, BLOCK_V)
        inside = r < valid
        label = tl.load(labels + first_row + r, mask=inside, other=-1)
        counted = (c[None, :] < V) & (c[None, :] != label[:, None])
        z = tl.where(counted, z, float("-inf"))
        reference = tl.load(top + first_row + r, mask=inside, other=0.0)
        highest = tl.max(z, 1)
        reference = tl.where(highest > reference + LIMIT, highest, reference)
        e = tl.exp(z - reference[:, None])
        at = column_tile * num_rows + r
        tl.store(tile_top + at, reference, mask=inside)
        tl.store(tile_sum + at, tl.sum(e, 1), mask=inside)
        if STATS:
            best = tl.maximum(highest, -1e30)
            tl.store(tile_best + at, best, mask=inside)
            tl.store(tile_dots + at, tl.sum(tl.where(e > 0, e * (z - reference[:, None]), 0.0), 1), mask=inside)
            # exp(z - best) from e: if best is far below the reference, the tile adds nothing to the row's squares.
            lifted = e * tl.exp(tl.minimum(reference - best, 80.0))[:, None]
            tl.store(tile_squares + at, tl.sum(lifted * lifted, 1), mask=inside)
        if KEEP:
            if HAS_SOFTCAP:
                e = tl.where(counted, e * _logit_slope(z, logit_scale, softcap, HAS_SOFTCAP), 0.0)
            if TMA:
                exponentials.store([row, column_tile * BLOCK_V], e.to(w.dtype))
            else:
                s = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
                place = exponentials + r[:, None].to(tl.int64) * strip_columns + s[None, :]
                tl.store(
                    place, e.to(exponentials.dtype.element_ty), mask=inside[:, None] & (s < strip_columns)[None, :]
                )


@triton.jit(do_not_specialize=["count", "first_row", "num_rows", "tiles", "splits"])
def _settle_rows_kernel(
    top, others, dots, best, squares, tile_top, tile_sum, tile_dots, tile_best, tile_squares, exponentials, totals, count,
    first_row, num_rows, strip_columns, D, tiles, splits,
    KEEP: tl.constexpr, STATS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the strip's sums to each row's total; if a tile raised the reference, rescales the row's earlier results."""
    r = tl.program_id(0)
    n = first_row + r
    if n < tl.load(count).to(tl.int32):
        t = tl.arange(0, BLOCK_T)
        tile_row = t * num_rows + r
        before = tl.load(top + n)
        used = tl.load(tile_top + tile_row, mask=t < tiles, other=float("-inf"))
        sums = tl.load(tile_sum + tile_row, mask=t < tiles, other=0.0)
        after = tl.maximum(before, tl.max(used, 0))
        shrink = tl.exp(before - after)
        factors = tl.exp(used - after)
        earlier = tl.load(others + n)
        total = earlier * shrink + tl.sum(sums * factors, 0)
        if STATS:
            moved = tl.where(t < tiles, used - after, 0.0)
            strip_dots = tl.load(tile_dots + tile_row, mask=t < tiles, other=0.0) + moved * sums
            dot = (tl.load(dots + n) + (before - after) * earlier) * shrink + tl.sum(strip_dots * factors, 0)
            highest = tl.load(tile_best + tile_row, mask=t < tiles, other=-1e30)
            best_before = tl.load(best + n)
            best_after = tl.maximum(best_before, tl.max(highest, 0))
            square = tl.load(tile_squares + tile_row, mask=t < tiles, other=0.0) * tl.exp(2.0 * (highest - best_after))
            square = tl.load(squares + n) * tl.exp(2.0 * (best_before - best_after)) + tl.sum(square, 0)
        # One thread stores what every warp has loaded, and every warp branches on its own load below.
        tl.debug_barrier()
        tl.store(others + n, total)
        tl.store(top + n, after)
        if STATS:
            tl.store(dots + n, dot)
            tl.store(best + n, best_after)
            tl.store(squares + n, square)
        if KEEP:
            if after > before:
                for split in range(splits):
                    for begin in range(0, D, BLOCK_D):
                        d = begin + tl.arange(0, BLOCK_D)
                        at = totals + (split * num_rows + r).to(tl.int64) * D + d
                        tl.store(at, tl.load(at, mask=d < D, other=0.0) * shrink, mask=d < D)
                for tile in range(tiles):
                    factor = tl.exp(tl.load(tile_top + tile * num_rows + r) - after)
                    if factor != 1.0:
                        v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
                        at = exponentials + r.to(tl.int64) * strip_columns + v
                        e = tl.load(at, mask=v < strip_columns, other=0.0).to(tl.float32) * factor
                        tl.store(at, e.to(exponentials.dtype.element_ty), mask=v < strip_columns)


@triton.jit(do_not_specialize=["count", "first_row", "num_rows", "splits"])
def _weighted_rows_kernel(
    exponentials, w, totals, count, first_row, num_rows, first_column, strip_columns, V, D, weight_stride, splits,
    num_programs, FIRST: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Adds exponentials x W of one strip to totals. The strip's columns are split into `splits` parts, each with its own sum.

    SPLIT: there is more than one part. Without that knowledge the common case of one part would spill registers on sm_90.
    """
    if not SPLIT:
        splits = 1
    valid = tl.minimum(tl.load(count).to(tl.int32) - first_row, num_rows)
    row_tiles = tl.cdiv(valid, BLOCK_N)
    column_tiles = tl.cdiv(D, BLOCK_D)
    width = tl.minimum(strip_columns, V - first_column)
    part = tl.cdiv(width, splits * BLOCK_V) * BLOCK_V
    for index in tl.range(tl.program_id(0), row_tiles * column_tiles * splits, num_programs):
        split = index % splits
        row_tile, column_tile = _tile_of(index // splits, row_tiles, column_tiles, GROUP)
        row = row_tile * BLOCK_N
        d = column_tile * BLOCK_D
        r = row + tl.arange(0, BLOCK_N)
        c = d + tl.arange(0, BLOCK_D)
        at = totals + (split * num_rows + r).to(tl.int64)[:, None] * D + c[None, :]
        inside = (r < valid)[:, None] & (c < D)[None, :]
        # The sum of earlier strips is loaded before the product; loading it afterwards would need additional registers.
        if FIRST:
            total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        else:
            total = tl.load(at, mask=inside, other=0.0)
        for v in range(split * part, tl.minimum((split + 1) * part, width), BLOCK_V):
            a = _load_tile(exponentials, row, v, strip_columns, num_rows, strip_columns, TMA, BLOCK_N, BLOCK_V)
            b = _load_tile(w, first_column + v, d, weight_stride, V, D, TMA, BLOCK_V, BLOCK_D)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        tl.store(at, total, mask=inside)


@triton.jit
def _row_stats(z, t, rest, logp, dots, best, squares):
    """logsumexp, entropy, is_top1 and log_sum_sq_probs of a row from its target's logit z and the sums over the other tokens."""
    log_total = tl.log(rest + tl.exp(z - t))
    # Entropy is the sum of p (logsumexp - z) over all tokens: every term is at least 0.
    entropy = (rest * log_total - dots) / (rest + tl.exp(z - t)) + tl.where(logp > -80.0, -logp * tl.exp(logp), 0.0)
    highest = tl.maximum(z, best)
    square = squares * tl.exp(2.0 * (best - highest)) + tl.exp(2.0 * (z - highest))
    log_highest = tl.where(z >= best, logp, best - t - log_total)
    is_top1 = tl.where(z >= best, 1.0, 0.0)
    return t + log_total, tl.where(entropy < 0, 0.0, entropy), is_top1, tl.log(square) + 2.0 * log_highest


@triton.jit(do_not_specialize=["position_labels", "first_row", "num_rows", "splits"])
def _finish_rows_kernel(
    weight, position_labels, labels, place, target, top, others, dots, best, squares, totals, logps, normalisers, direction,
    exponentials, stats, first_row, num_rows, strip_columns, D, splits, weight_stride, logit_scale, softcap, ignore_index,
    DIRECTION: tl.constexpr, KEPT: tl.constexpr, STATS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes log-prob and normaliser (t, sum) of each valid row of a block.

    DIRECTION: also (1 - p) z' W[y] - sum of p_v z'_v W[v]. KEPT: also the target's entry of the exponentials, see
    problem.Computed. STATS: also the columns of problem.STATS.
    """
    position = tl.program_id(0)
    if tl.load(position_labels + position) != ignore_index:
        n = tl.load(place + position).to(tl.int64) - 1
        r = n - first_row
        if (r >= 0) & (r < num_rows):
            z = tl.load(target + n)
            t = tl.load(top + n)
            rest = tl.load(others + n)
            at_target = tl.exp(z - t)
            total = rest + at_target
            logp = tl.where(z >= t, -_log1p(rest / at_target), (z - t) - tl.log(total))
            tl.store(logps + position, logp)
            tl.store(normalisers + 2 * n, t)
            tl.store(normalisers + 2 * n + 1, total)
            if STATS:
                moments = _row_stats(z, t, rest, logp, tl.load(dots + n), tl.load(best + n), tl.load(squares + n))
                tl.store(stats + 4 * position.to(tl.int64), moments[0])
                tl.store(stats + 4 * position.to(tl.int64) + 1, moments[1])
                tl.store(stats + 4 * position.to(tl.int64) + 2, moments[2])
                tl.store(stats + 4 * position.to(tl.int64) + 3, moments[3])
            label = tl.load(labels + n)
            slope = _logit_slope(z, logit_scale, softcap, HAS_SOFTCAP)
            scale = 1.0  # the part of the slope that the exponentials do not include
            if not HAS_SOFTCAP:
                scale = logit_scale
            if KEPT:
                tl.store(
                    exponentials + r * strip_columns + label, (-rest * slope / scale).to(exponentials.dtype.element_ty)
                )
            if DIRECTION:
                toward = rest / total * slope
                away = scale / total
                for begin in range(0, D, BLOCK_D):
                    d = begin + tl.arange(0, BLOCK_D)
                    w = tl.load(weight + label * weight_stride + d, mask=d < D, other=0.0).to(tl.float32)
                    pulled = tl.zeros([BLOCK_D], tl.float32)
                    for split in range(splits):
                        pulled += tl.load(totals + (split * num_rows + r) * D + d, mask=d < D, other=0.0)
                    result = toward * w - away * pulled
                    tl.debug_barrier()  # the sums may lie where the direction goes
                    tl.store(direction + n * D + d, result.to(direction.dtype.element_ty), mask=d < D)
