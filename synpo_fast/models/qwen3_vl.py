"""Qwen3-VL: a timestamp before each row of the temporal grid, and vision features added in the first decoder layers too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.models.base import VideoFeatures, VideoInputs, concatenated, inner, token_ids_of
from synpo_fast.models.chat_template import chatml_template
from synpo_fast.models.qwen2_5_vl import Qwen25VL, packing_of
from synpo_fast.models.video_frames import (
    HALF_MEAN,
    HALF_STD,
    VideoProcessing,
    fitting_size,
    frames_and_recipe,
    smart_resize_volume,
)


class Qwen3VL(Qwen25VL):
    name = "qwen3_vl"
    model_types = ("qwen3_vl",)
    # Every row of the temporal grid brings a start and an end of its own, so those of the template go.
    video_markers = ("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    chat_template = chatml_template("<|vision_start|><|video_pad|><|vision_end|>")

    def default_processing(self, config: Any) -> VideoProcessing:
        return VideoProcessing(HALF_MEAN, HALF_STD, min_pixels=128 * 32 * 32, max_pixels=768 * 32 * 32)

    def _video_inputs(
        self, config: Any, tokenizer: Any, frames: Tensor, seconds: float, processing: VideoProcessing
    ) -> VideoInputs:
        vision = config.vision_config
        packing = packing_of(config)

        def size_with(max_pixels: int) -> tuple[int, int]:
            return smart_resize_volume(
                *frames.shape[:3],
                temporal_factor=vision.temporal_patch_size,
                factor=vision.patch_size * vision.spatial_merge_size,
                min_pixels=processing.min_pixels,
                max_pixels=max_pixels,
            )

        size = fitting_size(size_with, lambda size: packing.num_merged(len(frames), size), processing)
        t, h, w = packing.grid(len(frames), size)
        row = (
            config.vision_start_token_id,
            *(config.video_token_id,) * (h * w // vision.spatial_merge_size**2),
            config.vision_end_token_id,
        )
        pieces: list[str | Sequence[int]] = []
        for time in grid_times(len(frames), vision.temporal_patch_size, seconds):
            pieces += [f"<{time:.1f} seconds>", row]
        resized, recipe = frames_and_recipe(frames, size, processing, packing)
        return VideoInputs(
            {"video_grid_thw": torch.tensor([[t, h, w]])},
            token_ids=token_ids_of(tokenizer, pieces),
            placeholder_id=config.video_token_id,
            frames=resized,
            recipe=recipe,
        )

    def encode_videos(self, model: nn.Module, videos: Sequence[VideoInputs]) -> list[VideoFeatures]:
        if not videos:
            return []
        tensors = concatenated(inner(model).visual, videos, ("pixel_values_videos", "video_grid_thw"))
        output = inner(model).get_video_features(**tensors, return_dict=True)
        encoded = [VideoFeatures(features) for features in output.pooler_output]
        for layer in output.deepstack_features:
            # One tensor for all videos up to transformers 5.19, split by video after that.
            parts = layer.split([len(video.features) for video in encoded]) if isinstance(layer, Tensor) else layer
            encoded = [
                replace(video, deepstack=(*video.deepstack, part)) for video, part in zip(encoded, parts, strict=True)
            ]
        return encoded

    def language_kwargs(self, placeholder_mask: Tensor, features: Sequence[VideoFeatures]) -> dict[str, Any]:
        if not features:
            return {}
        layers = zip(*(video.deepstack for video in features), strict=True)
        return {
            "visual_pos_masks": placeholder_mask,
            "deepstack_visual_embeds": [torch.cat(layer) for layer in layers],
        }


def grid_times(num_frames: int, temporal_patch_size: int, seconds_per_frame: float) -> list[float]:
    """The time of each row of the temporal grid: halfway between its first frame and its last. The frame that pads an odd
    video has the time of the frame it repeats."""
    last = num_frames - 1
    return [
        (first + min(first + temporal_patch_size - 1, last)) / 2 * seconds_per_frame
        for first in range(0, num_frames, temporal_patch_size)
    ]
