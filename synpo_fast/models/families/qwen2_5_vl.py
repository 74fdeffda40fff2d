"""Qwen2.5-VL: patches span 2 frames and are merged 2 x 2; positions have three components (mRoPE), the first one encodes time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.models.families.base import Family, VideoFeatures, VideoInputs, concatenated, inner, place_of
from synpo_fast.models.families.chat_template import chatml_template
from synpo_fast.models.families.tower_inputs import host_grids, tower_inputs
from synpo_fast.models.families.video_frames import (
    CLIP_MEAN,
    CLIP_STD,
    VideoProcessing,
    fitting_size,
    frames_and_recipe,
    smart_resize,
)
from synpo_fast.ops.video_patches import Packing


class Qwen25VL(Family):
    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    video_markers: tuple[str, ...] = ("<|video_pad|>",)
    placeholder_token = "<|video_pad|>"
    packs_frames = True
    chat_template = chatml_template(
        "<|vision_start|><|video_pad|><|vision_end|>", default_system="You are a helpful assistant."
    )

    def default_processing(self, config: Any) -> VideoProcessing:
        return VideoProcessing(CLIP_MEAN, CLIP_STD, min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)

    def _video_inputs(
        self, config: Any, tokenizer: Any, frames: Tensor, seconds: float, processing: VideoProcessing
    ) -> VideoInputs:
        vision = config.vision_config
        packing = packing_of(config)

        def size_with(max_pixels: int) -> tuple[int, int]:
            factor = vision.patch_size * vision.spatial_merge_size
            return smart_resize(
                *frames.shape[1:3], factor=factor, min_pixels=processing.min_pixels, max_pixels=max_pixels
            )

        size = fitting_size(size_with, lambda size: packing.num_merged(len(frames), size), processing)
        grid = packing.grid(len(frames), size)
        resized, recipe = frames_and_recipe(frames, size, processing, packing)
        return VideoInputs(
            {"video_grid_thw": torch.tensor([grid])},
            token_ids=(config.video_token_id,) * packing.num_merged(len(frames), size),
            placeholder_id=config.video_token_id,
            seconds_per_grid=seconds * vision.temporal_patch_size,
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
        return [VideoFeatures(features) for features in output.pooler_output]

    def tower_inputs(self, model: nn.Module, grids: Tensor) -> dict[str, Any]:
        """Arguments that the tower would compute from the grid, computed beforehand on the host (tower_inputs.py)."""
        tower = inner(model).visual
        return tower_inputs(
            tower,
            grids,
            merge_size=tower.spatial_merge_size,
            device=place_of(tower)[0],
            windows=(tower.window_size, tower.patch_size),
        )

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        return [inner(model).visual]  # the projector ("merger") is part of it

    def position_ids(self, model: nn.Module, token_ids: Tensor, video: VideoInputs | None) -> Tensor:
        token_ids = token_ids.cpu()
        if video is None:
            return torch.arange(len(token_ids)).expand(3, -1)
        time = {}  # stays empty for Qwen3-VL, which writes timestamps into the prompt
        if video.seconds_per_grid is not None:
            time["second_per_grid_ts"] = torch.tensor([video.seconds_per_grid])
        positions, _ = inner(model).get_rope_index(
            token_ids[None],
            # 2 marks the tokens of a video. Without this argument the model falls back to one-dimensional positions.
            mm_token_type_ids=2 * (token_ids == video.placeholder_id)[None].int(),
            video_grid_thw=video.tensors["video_grid_thw"].cpu(),
            **time,
        )
        return positions[:, 0]


def packing_of(config: Any) -> Packing:
    vision = config.vision_config
    return Packing(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
