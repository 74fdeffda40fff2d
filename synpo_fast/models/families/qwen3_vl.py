"""Qwen3-VL: a timestamp before each row of the temporal grid; vision features are also added in the first decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.models.families.base import VideoFeatures, VideoInputs, concatenated, inner, place_of, token_ids_of
from synpo_fast.models.families.chat_template import chatml_template
from synpo_fast.models.families.qwen2_5_vl import Qwen25VL, packing_of
from synpo_fast.models.families.tower_inputs import host_grids, tower_inputs
from synpo_fast.models.families.video_frames import (
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
    # Every row of the temporal grid has its own start and end token, so those of the template are replaced, too.
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
        pixels = concatenated(inner(model).visual, videos, ("pixel_values_videos",))
        grids = host_grids(videos)
        output = inner(model).get_video_features(
            **pixels, video_grid_thw=grids, **self.tower_inputs(model, grids), return_dict=True
        )
        encoded = [VideoFeatures(features) for features in output.pooler_output]
        for layer in output.deepstack_features:
            # Up to transformers 5.19 this is one tensor for all videos; later versions split it by video.
            parts = layer.split([len(video.features) for video in encoded]) if isinstance(layer, Tensor) else layer
            encoded = [
                replace(video, deepstack=(*video.deepstack, part)) for video, part in zip(encoded, parts, strict=True)
            ]
        return encoded

    def tower_inputs(self, model: nn.Module, grids: Tensor) -> dict[str, Any]:
        tower = inner(model).visual
        table = {
            "num_grid_per_side": tower.num_grid_per_side,
            "mode": tower.interpolation_mode,
            "align_corners": tower.interpolation_align_corners,
            "spatial_merge_size": tower.spatial_merge_size,
        }
        return tower_inputs(
            tower,
            grids,
            merge_size=tower.spatial_merge_size,
            device=place_of(tower)[0],
            interpolation=table,
        )

    def language_model(self, model: nn.Module) -> nn.Module:
        """Returns the inner language model, with deepstack features added by position.

        transformers adds them by a bool mask, for which the host waits for the device twice per layer. The result is the same.
        """
        language_model: Any = super().language_model(model)
        language_model._deepstack_process = add_by_position
        return language_model

    def language_kwargs(self, placeholders: Tensor, features: Sequence[VideoFeatures]) -> dict[str, Any]:
        if not features:
            return {}
        layers = zip(*(video.deepstack for video in features), strict=True)
        return {
            "visual_pos_masks": placeholders,  # despite its name: int64 positions, which are passed to add_by_position
            "deepstack_visual_embeds": [torch.cat(layer) for layer in layers],
        }


def add_by_position(hidden_states: Tensor, placeholders: Tensor, features: Tensor) -> Tensor:
    """Adds features [P, D] to hidden_states [1, L, D] at positions placeholders [P]. Replaces a method of Qwen3VLTextModel.

    placeholders may also be a bool mask [B, L]: transformers' own composite forward of the same model still passes one.
    """
    if placeholders.dtype == torch.bool:
        return hidden_states.masked_scatter(
            placeholders[..., None], hidden_states[placeholders] + features.to(hidden_states)
        )
    here = hidden_states.index_select(1, placeholders) + features.to(hidden_states)
    return hidden_states.index_copy(1, placeholders, here)


def grid_times(num_frames: int, temporal_patch_size: int, seconds_per_frame: float) -> list[float]:
    """Returns the time in seconds of each row of the temporal grid, halfway between its first frame and its last.

    A video with an odd number of frames is padded by repeating its last frame; the repeated frame has the same time.
    """
    last = num_frames - 1
    return [
        (first + min(first + temporal_patch_size - 1, last)) / 2 * seconds_per_frame
        for first in range(0, num_frames, temporal_patch_size)
    ]
