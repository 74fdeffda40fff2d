"""video_patches: resizes, normalises, casts and places uint8 frames for a vision tower, in one pass.

    r = resize(frames)                     bicubic with antialiasing, uint8 to uint8, as torchvision does it on a CPU (taps.py)
    x = (r / 255 - mean) / std             in fp32, then cast
    pixels[place(t, c, y, x)] = x          channels first, or rows of patches (packing.py)

Eager operations need a cast, two resizing passes, a rounding, two passes for the normalisation, a cast and a permuted copy, each
through memory in fp32. The kernel reads the bytes once and writes the result once. Its result equals the reference's on a CPU,
to the bit.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs import triton_support
from synpo_fast.ops.video_patches.packing import Packing
from synpo_fast.ops.video_patches.reference import resize_frames, video_patches_reference

BACKENDS = ("reference", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def video_patches(
    frames: Tensor,
    *,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    packing: Packing | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """The pixel input of a vision tower for one video.

    Args:
        frames: uint8 [T, H, W, 3], with any strides: a slice or a permuted view is not copied.
        size: (height, width) to resize to; the frames' own size leaves them as they are.
        mean, std: three values each, of channels in [0, 1].
        packing: with None, pixels are [T, 3, height, width]. Otherwise [t * h * w, 3 * temporal_patch_size * patch_size^2] for
            the grid (t, h, w) = packing.grid(T, size); an incomplete last time step is filled by repeating the last frame.
        dtype: dtype of the result: float32, float16 or bfloat16. Everything before the final cast is fp32.
        backend: "reference" or "triton" (CUDA, or Triton's interpreter); None picks by device.

    On a CPU the reference gives torchvision's values, and Triton gives the same bits. On other devices the reference may
    differ by 1 of 255 before normalisation.

    Raises ValueError for frames that are empty or of another shape or dtype, for a size that packing does not divide, and for
    a backend that cannot run here.
    """
    check_frames(frames)
    size, mean, std = _check(size, mean, std, dtype)
    if packing is not None:
        packing.grid(len(frames), size)
    if _choose_backend(frames.device, backend) == "triton":
        from synpo_fast.ops.video_patches.triton_launch import video_patches_forward

        return video_patches_forward(frames, size, mean, std, packing, dtype)
    return video_patches_reference(frames, size, mean, std, packing, dtype)


def resized_frames(frames: Tensor, size: tuple[int, int], *, backend: str | None = None) -> Tensor:
    """Resizes uint8 frames [T, H, W, 3] to [T, height, width, 3] on their device: the first step of video_patches.

    video_patches gives the same bits for the resized frames as for the original ones. Frames that already have this size are
    returned without a copy. Raises ValueError as video_patches does.
    """
    check_frames(frames)
    size = _check_size(size)
    if frames.shape[1:3] == size:
        return frames
    if _choose_backend(frames.device, backend) == "triton":
        from synpo_fast.ops.video_patches.triton_launch import resize_forward

        resized = resize_forward(frames, size)
    else:
        resized = resize_frames(frames, size)
    return resized.permute(0, 2, 3, 1).contiguous()


def check_frames(frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3] with no dimension of 0, got {frames.dtype} {list(frames.shape)}"
        )


def _check(
    size: Sequence[int], mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...]]:
    checked_size = _check_size(size)
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"mean and std need 3 finite values, std above 0, got {mean} and {std}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    return checked_size, tuple(mean), tuple(std)


def _check_size(size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"size must be (height, width), both positive ints, got {size}")
    return size[0], size[1]


def _choose_backend(device: torch.device, wanted: str | None) -> str:
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {wanted!r}")
    if wanted == "reference" or (wanted is None and device.type != "cuda"):
        return "reference"
    if (reason := _why_no_triton(device)) is None:
        return "triton"
    if wanted is not None:
        raise ValueError(f"backend='triton' cannot be used here: {reason}")
    warnings.warn(f"frames are resized with torch operations, which is several times slower: {reason}", stacklevel=3)
    return "reference"


def _why_no_triton(device: torch.device) -> str | None:
    if not triton_support.interpreting() and device.type != "cuda":
        return f"it works on CUDA tensors, frames are on {device}"
    return triton_support.reason_unusable("cuda", torch.float32)
