"""Triton kernel of video_patches: each program resizes, normalises and places tiles of frames.

A tile is BLOCK_Y x BLOCK_X output pixels of all three channels. A program loops over the input rows that its tile needs. It
resizes each row horizontally, rounds it to 0..255, and adds it to the tile's output rows with its vertical weights (0 for
output rows that do not use it). So the kernel reads only uint8 and writes only the result, and an input row is resized once
per tile, not once per output row.

The position of a pixel in the output is a sum of four terms, which depend on the frame, the channel, y and x respectively.
Channel-first frames are handled as one patch as large as the frame.
"""

import triton
import triton.language as tl

from synpo_fast.ops.video_patches import taps

TAP_STEP = tl.constexpr(taps.TAP_STEP)


@triton.jit
def _rounded(total, precision):
    return tl.minimum(tl.maximum((total + (1 << (precision - 1))) >> precision, 0), 255)


@triton.jit
def _resized_row(row, columns, stride_w, stride_c, weights, last_column, num_taps, out_width, precision):
    """The three channels of one input row, resized to some output columns; `columns` holds the first input of each."""
    red = tl.zeros_like(columns)
    green = tl.zeros_like(columns)
    blue = tl.zeros_like(columns)
    for first in range(0, num_taps, TAP_STEP):
        for k in tl.static_range(TAP_STEP):
            tap = first + k
            weight = tl.load(weights + tap * out_width)
            # Taps after the end have weight 0, so they may read any column of the row.
            pixel = row + tl.minimum(columns + tap, last_column) * stride_w
            red += weight * tl.load(pixel).to(tl.int32)
            green += weight * tl.load(pixel + stride_c).to(tl.int32)
            blue += weight * tl.load(pixel + 2 * stride_c).to(tl.int32)
    return _rounded(red, precision), _rounded(green, precision), _rounded(blue, precision)


@triton.jit
def _place_along(at, patch, merge, patch_step, row_step, block_step):
    """The position term of y or of x: the pixel in its patch, the patch in its block, and the block."""
    index = at // patch
    return (
        (at % patch).to(tl.int64) * patch_step
        + (index % merge).to(tl.int64) * row_step
        + (index // merge).to(tl.int64) * block_step
    )


@triton.jit(
    do_not_specialize=[
        "num_frames", "last_column", "out_height", "out_width", "stride_t", "stride_h", "stride_w",
        "taps_x", "taps_y", "precision_x", "precision_y", "patch_height", "patch_width", "merge", "temporal", "num_tiles",
    ]
)  # fmt: skip
def _video_patches_forward_kernel(
    frames, table_x, table_y, levels, pixels, num_frames, last_column, out_height, out_width,
    stride_t, stride_h, stride_w, stride_c, taps_x, taps_y, precision_x, precision_y,
    patch_height, patch_width, merge, temporal, num_tiles,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    tiles_x = tl.cdiv(out_width, BLOCK_X)
    tiles_y = tl.cdiv(out_height, BLOCK_Y)
    frame_step = patch_height.to(tl.int64) * patch_width
    channel_step = frame_step * temporal
    num_columns = 3 * channel_step
    patches_x = out_width // patch_width
    stride_t, stride_h = stride_t.to(tl.int64), stride_h.to(tl.int64)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        t = tile // (tiles_x * tiles_y)
        y = (tile // tiles_x % tiles_y) * BLOCK_Y + tl.arange(0, BLOCK_Y)[:, None]
        x = (tile % tiles_x) * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
        inside = (y < out_height) & (x < out_width)
        y, x = tl.minimum(y, out_height - 1), tl.minimum(x, out_width - 1)

        frame = frames + tl.minimum(t, num_frames - 1) * stride_t  # padding repeats the last frame
        columns = tl.load(table_x + x)
        rows = table_y + tile // tiles_x % tiles_y * (2 + taps_y * BLOCK_Y)
        first_row = tl.load(rows)
        weights_y = rows + 2 + tl.arange(0, BLOCK_Y)[:, None]
        red = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
        green = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
        blue = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
        for at in range(first_row, tl.load(rows + 1)):
            row_red, row_green, row_blue = _resized_row(
                frame + at * stride_h, columns, stride_w, stride_c, table_x + out_width + x,
                last_column, taps_x, out_width, precision_x,
            )  # fmt: skip
            weight = tl.load(weights_y + (at - first_row) * BLOCK_Y)
            red += weight * row_red
            green += weight * row_green
            blue += weight * row_blue

        # The patches of a block are adjacent, and so are the values of a patch.
        place = (
            _place_along(y, patch_height, merge, patch_width, num_columns * merge, num_columns * merge * patches_x)
            + _place_along(x, patch_width, merge, 1, num_columns, num_columns * merge * merge)
            + (t // temporal) * num_columns * patches_x * (out_height // patch_height)
            + (t % temporal) * frame_step
        )
        red = tl.load(levels + _rounded(red, precision_y))
        tl.store(pixels + place, red, mask=inside)
        green = tl.load(levels + 256 + _rounded(green, precision_y))
        tl.store(pixels + place + channel_step, green, mask=inside)
        blue = tl.load(levels + 512 + _rounded(blue, precision_y))
        tl.store(pixels + place + 2 * channel_step, blue, mask=inside)
