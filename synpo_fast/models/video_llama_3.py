"""VideoLLaMA3: frames apart, a timestamp before each, and patches that equal those of the frame before left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.models.base import Family, VideoFeatures, VideoInputs, concatenated, inner, token_ids_of
from synpo_fast.models.video_frames import (
    HALF_MEAN,
    HALF_STD,
    VideoProcessing,
    check_frames,
    normalise_frames,
    pack_patches,
    processing_with,
    resize_frames,
    smart_resize,
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'video' -%}
{{ '<|video_pad|>\\n' }}
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

MERGE_SIZE = 2  # of videos; the config does not say it, the preprocessor does
REPEATED = 0.1  # a patch repeats the one before it when its pixels differ by less than this many of 255, on average


class VideoLlama3(Family):
    name = "video_llama_3"
    model_types = ("video_llama_3",)
    video_markers = ("<|video_pad|>",)
    placeholder_token = "<|video_pad|>"
    chat_template = CHAT_TEMPLATE
    default_seconds_per_frame = 1.0

    def processing(self, config: Any, preprocessor: Mapping[str, Any] | None = None) -> VideoProcessing:
        defaults = VideoProcessing(
            HALF_MEAN, HALF_STD, min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28, drop_repeated_tokens=True
        )
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
        patch_size = config.vision_config.patch_size
        size = smart_resize(
            frames.shape[1],
            frames.shape[2],
            factor=patch_size * MERGE_SIZE,
            min_pixels=processing.min_pixels,
            max_pixels=max(1, processing.max_pixels // len(frames)),
        )
        patches, (t, h, w) = pack_patches(
            normalise_frames(resize_frames(frames, size), processing),
            patch_size=patch_size,
            merge_size=MERGE_SIZE,
            temporal_patch_size=1,
        )
        kept = torch.ones(t, h * w // MERGE_SIZE**2, dtype=torch.bool)
        if processing.drop_repeated_tokens:
            kept = kept_tokens(patches.view(*kept.shape, -1)).cpu()
        seconds = self.default_seconds_per_frame if seconds_per_frame is None else seconds_per_frame
        pieces: list[str | Sequence[int]] = []
        for index, num_tokens in enumerate(kept.sum(1).tolist()):
            pieces += [f"{',' if index else ''}Time {index * seconds:.1f}s:", (config.video_token_id,) * num_tokens]
        return VideoInputs(
            {
                "pixel_values_videos": patches,
                "video_grid_thw": torch.tensor([[t, h, w]]),
                "video_merge_sizes": torch.tensor([MERGE_SIZE]),
                "video_compression_mask": kept.flatten(),
            },
            token_ids=token_ids_of(tokenizer, pieces),
            placeholder_id=config.video_token_id,
        )

    def encode_videos(self, model: nn.Module, videos: Sequence[VideoInputs]) -> list[VideoFeatures]:
        if not videos:
            return []
        tensors = concatenated(model, videos, ("pixel_values_videos", "video_grid_thw", "video_merge_sizes"))
        output = inner(model).get_video_features(**tensors, return_dict=True)
        return [
            VideoFeatures(features[video.tensors["video_compression_mask"].to(features.device)])
            for features, video in zip(output.pooler_output, videos, strict=True)
        ]

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        return [inner(model).vision_model, inner(model).projector]


def kept_tokens(merged_patches: Tensor) -> Tensor:
    """fp32 [T, P, C], normalised -> bool [T, P]: all of the first frame, then what changes, at least one of each frame."""
    kept = torch.ones(merged_patches.shape[:2], dtype=torch.bool, device=merged_patches.device)
    kept[1:] = (merged_patches[1:] - merged_patches[:-1]).abs().mean(-1) * 255 > REPEATED
    kept[:, 0] |= ~kept.any(1)
    return kept
