"""Backend "reference": video_patches in plain torch. Resizes, normalises and places a few frames at a time.

On a CPU it gives the same bits as torchvision gives for uint8 frames, and it is the definition that the kernel is tested
against. On other devices torch has no uint8 resize, so the same filter runs in fp32 and is rounded once instead of after each
axis; single values may differ by 1 of 255.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from synpo_fast.ops.host_copy import to_device
from synpo_fast.ops.video_patches.packing import Packing

CHUNK_BYTES = 32 << 20  # fp32 pixels at a time; a whole long video would need several times the memory of the result


def video_patches_reference(
    frames: Tensor,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    packing: Packing | None,
    dtype: torch.dtype,
) -> Tensor:
    num_frames, period = len(frames), 1 if packing is None else packing.temporal_patch_size
    padded = -(-num_frames // period) * period
    if packing is None:
        pixels = torch.empty(num_frames, 3, *size, dtype=dtype, device=frames.device)
    else:
        t, h, w = packing.grid(num_frames, size)
        pixels = torch.empty(t * h * w, packing.num_columns, dtype=dtype, device=frames.device)
    places = pixels if packing is None else _places(pixels, size, packing)
    step = max(1, CHUNK_BYTES // (12 * size[0] * size[1]) // period) * period
    for start in range(0, padded, step):
        stop = min(start + step, padded)
        chunk = normalise_frames(resize_frames(frames[start:stop], size), mean, std)
        if stop > num_frames:
            chunk = torch.cat([chunk, chunk[-1:].expand(stop - num_frames, -1, -1, -1)])
        target = places[start // period : stop // period]
        target.copy_(chunk.reshape(target.shape))
    return pixels


def resize_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes uint8 [T, H, W, 3] to uint8 [T, 3, height, width]: bicubic (a = -0.5), antialiased where it shrinks."""
    frames = frames.permute(0, 3, 1, 2)
    if frames.shape[-2:] == size:
        return frames
    if frames.device.type == "cpu":
        return F.interpolate(frames, size, mode="bicubic", antialias=True)
    resized = F.interpolate(frames.float(), size, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def normalise_frames(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Computes (x / 255 - mean) / std in fp32 from uint8 [T, 3, H, W]; the division by 255 is folded into mean and std."""
    levels = to_device({"levels": torch.tensor([mean, std], dtype=torch.float32)}, frames.device)["levels"]
    mean_255, std_255 = levels.view(2, 3, 1, 1) * 255
    return frames.float().sub_(mean_255).div_(std_255)


def _places(pixels: Tensor, size: tuple[int, int], packing: Packing) -> Tensor:
    """A view of the patch rows as frames: [t, temporal, 3, h / merge, merge, patch, w / merge, merge, patch]."""
    P, M = packing.patch_size, packing.merge_size
    blocks = pixels.view(-1, size[0] // (P * M), size[1] // (P * M), M, M, 3, packing.temporal_patch_size, P, P)
    return blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
