"""Video settings and frame sizes of the families' own processors, without torchvision.

ops/video_patches does the resizing, normalising and packing. Pillow's bicubic differs from it by at most 1 of 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from synpo_fast.errors import UserError
from synpo_fast.ops.video_patches import Packing, resized_frames, video_patches

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class VideoProcessing:
    """Settings for turning frames into pixels.

    mean, std: per channel, for values in [0, 1].
    min_pixels, max_pixels: bounds for families that keep the aspect ratio. They apply to one frame in Qwen2.5-VL and to all
        frames together in Qwen3-VL. In VideoLLaMA3, min_pixels applies to one frame and max_pixels to all frames together.
    size: (height, width) for families with one fixed size; None for the others.
    drop_repeated_tokens: VideoLLaMA3's token compression: a patch that equals the one before it in time is left out.
    max_tokens: the maximum number of a video's placeholders, for families that keep the aspect ratio: frames are shrunk until
        it is met. Timestamps do not count; tokens that VideoLLaMA3 will drop do.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int = 1
    max_pixels: int = 1 << 62
    size: tuple[int, int] | None = None
    drop_repeated_tokens: bool = False
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need 3 values, std above 0, got {self.mean} and {self.std}")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"need 0 < min_pixels <= max_pixels, got {self.min_pixels} and {self.max_pixels}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"video_max_tokens must be above 0, got {self.max_tokens}")


def processing_with(defaults: VideoProcessing, config: Any, preprocessor: Mapping[str, Any] | None) -> VideoProcessing:
    """Returns `defaults`, overridden by a preprocessor config, then by config.video_processing.

    The preprocessor config's keys are image_mean, image_std, size, min_pixels, max_pixels and use_token_compression.
    config.video_processing is a dict with the field names of VideoProcessing.
    """
    changes: dict[str, Any] = {}
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        if preprocessor and preprocessor.get(key) is not None:
            changes[name] = tuple(preprocessor[key])
    size = (preprocessor or {}).get("size") or {}
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            changes["size"] = (size["height"], size["width"])
        for name, key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            value = (preprocessor or {}).get(name) or size.get(key)
            if value:
                changes[name] = value
    if preprocessor and preprocessor.get("use_token_compression") is not None:
        changes["drop_repeated_tokens"] = preprocessor["use_token_compression"]
    changes |= getattr(config, "video_processing", None) or {}
    for name in ("mean", "std", "size"):
        if changes.get(name) is not None:  # JSON has lists only
            changes[name] = tuple(changes[name])
    return replace(defaults, **changes)


def with_resolution(
    processing: VideoProcessing,
    *,
    family: str,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    video_max_tokens: int | None = None,
) -> VideoProcessing:
    """Returns `processing` with the given bounds in place of its own.

    Raises ValueError for a family with a fixed frame size, and if the lower bound is above the upper one, given or its own.
    """
    asked = {"min_pixels": min_pixels, "max_pixels": max_pixels, "video_max_tokens": video_max_tokens}
    given = {name: value for name, value in asked.items() if value is not None}
    if not given:
        return processing
    if processing.size is not None:
        height, width = processing.size
        raise UserError(
            f"{', '.join(given)}: family {family!r} scales every frame to {height} x {width}, so there is no size to choose;"
            " leave it unset, and take fewer frames for fewer tokens"
        )
    for name, value in given.items():
        if value < 1:
            raise UserError(f"{name} must be above 0, got {value}")
    lowest, highest = min_pixels or processing.min_pixels, max_pixels or processing.max_pixels
    if lowest > highest:
        own = {name for name in ("min_pixels", "max_pixels") if asked[name] is None}
        source = f" ({own.pop()} is the model's own setting: give both)" if own else ""
        raise UserError(f"min_pixels={lowest} is above max_pixels={highest}{source}")
    return replace(
        processing, min_pixels=lowest, max_pixels=highest, max_tokens=video_max_tokens or processing.max_tokens
    )


def fitting_size(
    size_with: Callable[[int], tuple[int, int]],
    tokens_of: Callable[[tuple[int, int]], int],
    processing: VideoProcessing,
) -> tuple[int, int]:
    """Finds the largest size between min_pixels and max_pixels whose tokens are within the budget.

    size_with: the family's rule, max_pixels -> size; a lower max_pixels never gives a larger size. Raises ValueError if even
    min_pixels takes too many tokens.
    """
    size, budget = size_with(processing.max_pixels), processing.max_tokens
    if budget is None or tokens_of(size) <= budget:
        return size
    fits, above = processing.min_pixels, processing.max_pixels
    smallest = size_with(fits)
    if tokens_of(smallest) > budget:
        raise ValueError(
            f"its video takes {tokens_of(smallest)} tokens with frames of {smallest[0]} x {smallest[1]}, the smallest that"
            f" min_pixels={processing.min_pixels} allows, more than video_max_tokens={budget}; raise it, lower min_pixels,"
            " or take fewer frames"
        )
    while above - fits > 1:
        middle = (fits + above) // 2
        if tokens_of(size_with(middle)) <= budget:
            fits = middle
        else:
            above = middle
    return size_with(fits)


@dataclass(frozen=True)
class PixelRecipe:
    """Converts frames of the tower's size to pixels: normalises, casts, and packs them into patches if the tower needs that.

    name: the argument of the tower's call that takes the pixels. Frames stay uint8 until that call, because fp32 pixels take
    four times as many bytes.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    packing: Packing | None = None

    def pixels(self, frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Converts uint8 [T, height, width, 3] to [T, 3, height, width], or to rows of patches, on the frames' device."""
        size = (frames.shape[1], frames.shape[2])
        return video_patches(frames, size=size, mean=self.mean, std=self.std, packing=self.packing, dtype=dtype)


def frames_and_recipe(
    frames: Tensor,
    size: tuple[int, int],
    processing: VideoProcessing,
    packing: Packing | None = None,
    *,
    name: str = "pixel_values_videos",
) -> tuple[Tensor, PixelRecipe]:
    """Resizes uint8 [T, H, W, 3] to uint8 [T, *size, 3] on the same device; returns them with the recipe for their pixels."""
    return resized_frames(frames, size), PixelRecipe(name, processing.mean, processing.std, packing)


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns the nearest size with sides that are multiples of factor and an area in [min_pixels, max_pixels].

    The aspect ratio is nearly kept. A side is never below factor, even if the area then exceeds max_pixels.
    """
    _check_aspect_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        return _shrunk(height, width, math.sqrt(height * width / max_pixels), factor)
    if new_height * new_width < min_pixels:
        return _grown(height, width, math.sqrt(min_pixels / (height * width)), factor)
    return new_height, new_width


def smart_resize_volume(
    num_frames: int, height: int, width: int, *, temporal_factor: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Applies Qwen3-VL's rule: the bounds are on frames x height x width. A side below factor is scaled up first."""
    num_frames = max(num_frames, temporal_factor)  # a shorter video is padded by repeating its last frame
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    volume = round(num_frames / temporal_factor) * temporal_factor * new_height * new_width
    if volume > max_pixels:
        return _shrunk(height, width, math.sqrt(num_frames * height * width / max_pixels), factor)
    if volume < min_pixels:
        return _grown(height, width, math.sqrt(min_pixels / (num_frames * height * width)), factor)
    return new_height, new_width


def _check_aspect_ratio(height: int, width: int) -> None:
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"the aspect ratio of a frame may be {MAX_ASPECT_RATIO} at most, got {height} x {width}")


def _shrunk(height: int, width: int, scale: float, factor: int) -> tuple[int, int]:
    return (
        max(factor, math.floor(height / scale / factor) * factor),
        max(factor, math.floor(width / scale / factor) * factor),
    )


def _grown(height: int, width: int, scale: float, factor: int) -> tuple[int, int]:
    return math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
