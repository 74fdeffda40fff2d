"""Launches the kernel of video_patches: one launch, three small tables copied from pinned memory, no synchronisation."""

import functools

import torch
from torch import Tensor

from synpo_fast.ops.video_patches import triton_kernels as kernels
from synpo_fast.ops.video_patches.packing import Packing
from synpo_fast.ops.video_patches.reference import normalise_frames
from synpo_fast.ops.video_patches.taps import column_taps, row_taps

BLOCK_Y, BLOCK_X = 8, 128
MAX_PROGRAMS = 65_536  # if there are more tiles, a program processes several


@functools.lru_cache(maxsize=64)
def level_table(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Table [3, 256] of the normalised value of each channel's 256 levels, computed by the reference for identical bits."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    table = normalise_frames(levels, mean, std).to(dtype).view(3, 256)
    return table.pin_memory() if pinned else table


@functools.lru_cache(maxsize=2)
def same_levels(pinned: bool) -> Tensor:
    """Identity table [3, 256]: every level maps to itself, for frames that are only resized."""
    table = torch.arange(256, dtype=torch.uint8).expand(3, 256).contiguous()
    return table.pin_memory() if pinned else table


def video_patches_forward(
    frames: Tensor,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    packing: Packing | None,
    dtype: torch.dtype,
) -> Tensor:
    return _launch(frames, size, level_table(mean, std, dtype, frames.device.type == "cuda"), packing)


def resize_forward(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes uint8 [T, H, W, 3] to uint8 [T, 3, height, width]."""
    return _launch(frames, size, same_levels(frames.device.type == "cuda"), None)


def _launch(frames: Tensor, size: tuple[int, int], levels: Tensor, packing: Packing | None) -> Tensor:
    """Launches the kernel. levels [3, 256]: the output value of each level of each channel; the result has its dtype."""
    num_frames, in_height, in_width, _ = frames.shape
    height, width = size
    if packing is None:
        pixels = torch.empty(num_frames, 3, height, width, dtype=levels.dtype, device=frames.device)
        places = (height, width, 1, 1)  # one patch as large as the frame
    else:
        t, h, w = packing.grid(num_frames, size)
        num_frames = t * packing.temporal_patch_size
        pixels = torch.empty(t * h * w, packing.num_columns, dtype=levels.dtype, device=frames.device)
        places = (packing.patch_size, packing.patch_size, packing.merge_size, packing.temporal_patch_size)
    if (in_width - 1) * frames.stride(2) + 2 * frames.stride(3) >= 2**31:  # offsets within a row are int32
        frames = frames.contiguous()
    pinned = frames.device.type == "cuda"
    columns, rows = column_taps(in_width, width, pinned), row_taps(in_height, height, BLOCK_Y, pinned)
    on_gpu = [table.to(frames.device, non_blocking=True) for table in (columns.table, rows.table, levels)]
    num_tiles = num_frames * -(-height // BLOCK_Y) * -(-width // BLOCK_X)
    with torch.cuda.device_of(frames):
        kernels._video_patches_forward_kernel[(min(num_tiles, MAX_PROGRAMS),)](
            frames, *on_gpu, pixels, frames.shape[0], in_width - 1, height, width, *frames.stride(),
            columns.num_taps, rows.num_taps, columns.precision, rows.precision, *places, num_tiles,
            BLOCK_Y=BLOCK_Y, BLOCK_X=BLOCK_X, num_warps=4,
        )  # fmt: skip
    return pixels
