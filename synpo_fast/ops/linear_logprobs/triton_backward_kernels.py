"""Triton kernels of the backward of fused_linear_logprobs. triton_backward.py launches them.

Arguments that follow the number of rows are not specialised, as in triton_kernels.py.
"""

import triton
import triton.language as tl

from synpo_fast.ops.linear_logprobs.triton_kernels import _load_tile, _logit_slope, _logits_tile, _tile_of


@triton.jit(do_not_specialize=["grad_logps", "grad_stride", "labels"])
def _scale_rows_backward_kernel(
    grad_logps, grad_stride, direction, labels, place, out, D, ignore_index, BLOCK_D: tl.constexpr
):
    """Computes out[position] = grad_logps[position] * direction of that row, 0 where ignored."""
    position = tl.program_id(0).to(tl.int64)
    counted = tl.load(labels + position) != ignore_index
    n = tl.maximum(tl.load(place + position).to(tl.int64) - 1, 0)
    c = tl.load(grad_logps + position * grad_stride).to(tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x = tl.load(direction + n * D + d, mask=(d < D) & counted, other=0.0).to(tl.float32)
        tl.store(out + position * D + d, tl.where(counted, c * x, 0.0).to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["count", "first_row", "num_rows"])
def _logit_grads_backward_kernel(
    x, w, bias, labels, normalisers, misses, coefficients, logit_grads, column_sums, count, first_row, num_rows, first_column,
    strip_columns, V, D, weight_stride, logit_scale, softcap, num_programs,
    HAS_BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes c (onehot - softmax) z' of one strip for all valid rows from first_row on. `misses` holds 1 - p_y.

    Row r of logit_grads is row first_row + r of the other tensors, and num_rows is its number of rows.
    Rows between the last valid one and the end of its tile are set to 0, because the next product sums over whole tiles.
    """
    valid = tl.load(count).to(tl.int32) - first_row
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
        reference = tl.load(normalisers + 2 * (first_row + r), mask=inside, other=0.0)
        total = tl.load(normalisers + 2 * (first_row + r) + 1, mask=inside, other=1.0)
        coefficient = tl.load(coefficients + first_row + r, mask=inside, other=0.0)
        slope = _logit_slope(z, logit_scale, softcap, HAS_SOFTCAP)
        p = tl.exp(z - reference[:, None]) / total[:, None]
        miss = tl.load(misses + first_row + r, mask=inside, other=0.0)
        g = tl.where(c[None, :] == label[:, None], miss[:, None], -p) * slope * coefficient[:, None]
        g = tl.where(inside[:, None] & (c < V)[None, :], g, 0.0)
        if BIAS_GRAD:
            s = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
            tl.store(column_sums + row_tile * strip_columns + s, tl.sum(g, 0), mask=s < strip_columns)
        if TMA:
            logit_grads.store([row, column_tile * BLOCK_V], g.to(w.dtype))
        else:
            s = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
            place = logit_grads + r[:, None].to(tl.int64) * strip_columns + s[None, :]
            tl.store(
                place, g.to(logit_grads.dtype.element_ty), mask=(r < num_rows)[:, None] & (s < strip_columns)[None, :]
            )


@triton.jit(do_not_specialize=["count", "kept"])
def _weight_grad_backward_kernel(
    exponentials, scaled, logit_grads, x, grad_weight, peak, count, kept, first_column, strip_columns, kept_columns,
    V, D, num_programs, KEPT: tl.constexpr, REST: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes one strip of dW over all valid rows, summed in fp32 and rounded once.

    KEPT: adds exponentials^T scaled over the first `kept` rows. REST: adds logit_grads^T x over the others.
    """
    valid = tl.load(count).to(tl.int32)
    scale = tl.load(peak)
    row_tiles = tl.cdiv(tl.minimum(strip_columns, V - first_column), BLOCK_V)
    column_tiles = tl.cdiv(D, BLOCK_D)
    for index in tl.range(tl.program_id(0), row_tiles * column_tiles, num_programs):
        row_tile, column_tile = _tile_of(index, row_tiles, column_tiles, GROUP)
        v = row_tile * BLOCK_V
        d = column_tile * BLOCK_D
        total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
        # After the last valid row a tile of a factor holds zeros (copy engine) or is not read (pointers).
        if KEPT:
            rows = tl.minimum(valid, kept)
            for n in range(0, rows, BLOCK_N):
                g = _load_tile(
                    exponentials, n, first_column + v, kept_columns, rows, kept_columns, TMA, BLOCK_N, BLOCK_V
                )
                b = _load_tile(scaled, n, d, D, rows, D, TMA, BLOCK_N, BLOCK_D)
                total = tl.dot(g.T, b, total, input_precision=PRECISION)
        if REST:
            rows = valid - kept
            for n in range(0, rows, BLOCK_N):
                g = _load_tile(logit_grads, n, v, strip_columns, rows, strip_columns, TMA, BLOCK_N, BLOCK_V)
                b = _load_tile(x, kept + n, d, D, valid, D, TMA, BLOCK_N, BLOCK_D)
                total = tl.dot(g.T, b, total, input_precision=PRECISION)
        r = first_column + v + tl.arange(0, BLOCK_V)
        c = d + tl.arange(0, BLOCK_D)
        at = grad_weight + r.to(tl.int64)[:, None] * D + c[None, :]
        inside = ((v + tl.arange(0, BLOCK_V)) < strip_columns)[:, None] & (r < V)[:, None] & (c < D)[None, :]
        tl.store(at, (total * scale).to(grad_weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "kept"])
def _kept_bias_grad_backward_kernel(
    exponentials, factors, grad_bias, count, kept, kept_columns, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Computes the sum of factors_n * exponentials_nv over the kept valid rows, in fp32."""
    c = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.minimum(tl.load(count).to(tl.int32), kept)
    total = tl.zeros([BLOCK_V], tl.float32)
    for n in range(0, rows, BLOCK_N):
        r = n + tl.arange(0, BLOCK_N)
        inside = (r < rows)[:, None] & (c < V)[None, :]
        e = tl.load(exponentials + r[:, None].to(tl.int64) * kept_columns + c[None, :], mask=inside, other=0.0)
        total += tl.sum(e.to(tl.float32) * tl.load(factors + r, mask=r < rows, other=0.0)[:, None], 0)
    tl.store(grad_bias + c, total, mask=c < V)
