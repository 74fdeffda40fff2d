"""Qwen3-VL: a timestamp before each row of the temporal grid, and vision features added in the first decoder layers too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.models.base import VideoFeatures, VideoInputs, concatenated, inner, token_ids_of
from synpo_fast.models.qwen2_5_vl import Qwen25VL
from synpo_fast.models.video_frames import (
    HALF_MEAN,
    HALF_STD,
    VideoProcessing,
    check_frames,
    normalise_frames,
    pack_patches,
    processing_with,
    resize_frames,
    smart_resize_volume,
)

# As Qwen2.5-VL's, without a system prompt of its own.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'video' -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


class Qwen3VL(Qwen25VL):
    name = "qwen3_vl"
    model_types = ("qwen3_vl",)
    # Every row of the temporal grid brings a start and an end of its own, so those of the template go.
    video_markers = ("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    chat_template = CHAT_TEMPLATE

    def processing(self, config: Any, preprocessor: Mapping[str, Any] | None = None) -> VideoProcessing:
        defaults = VideoProcessing(HALF_MEAN, HALF_STD, min_pixels=128 * 32 * 32, max_pixels=768 * 32 * 32)
        return processing_with(defaults, config, preprocessor)

    def video_inputs(
        self,
        config: Any,
        tokenizer: Any,
        frames: Tensor,
        *,
        seconds_per_frame: float | None = None,
        processing: VideoProcessing | None = None,
    ) -> VideoInputs:
        check_frames(frames)
        processing = processing or self.processing(config)
        vision = config.vision_config
        size = smart_resize_volume(
            *frames.shape[:3],
            temporal_factor=vision.temporal_patch_size,
            factor=vision.patch_size * vision.spatial_merge_size,
            min_pixels=processing.min_pixels,
            max_pixels=processing.max_pixels,
        )
        patches, (t, h, w) = pack_patches(
            normalise_frames(resize_frames(frames, size), processing),
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )
        seconds = self.default_seconds_per_frame if seconds_per_frame is None else seconds_per_frame
        row = (
            config.vision_start_token_id,
            *(config.video_token_id,) * (h * w // vision.spatial_merge_size**2),
            config.vision_end_token_id,
        )
        pieces: list[str | Sequence[int]] = []
        for time in grid_times(len(frames), vision.temporal_patch_size, seconds):
            pieces += [f"<{time:.1f} seconds>", row]
        return VideoInputs(
            {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[t, h, w]])},
            token_ids=token_ids_of(tokenizer, pieces),
            placeholder_id=config.video_token_id,
        )

    def encode_videos(self, model: nn.Module, videos: Sequence[VideoInputs]) -> list[VideoFeatures]:
        if not videos:
            return []
        tensors = concatenated(model, videos, ("pixel_values_videos", "video_grid_thw"))
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
