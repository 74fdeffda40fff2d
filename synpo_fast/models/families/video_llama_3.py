"""VideoLLaMA3: a timestamp before each frame; patches that repeat those of the frame before are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.models.families.base import (
    Family,
    VideoFeatures,
    VideoInputs,
    concatenated,
    inner,
    place_of,
    token_ids_of,
)
from synpo_fast.models.families.chat_template import chatml_template
from synpo_fast.models.families.tower_inputs import host_grids, tower_inputs
from synpo_fast.models.families.video_frames import (
    HALF_MEAN,
    HALF_STD,
    VideoProcessing,
    fitting_size,
    frames_and_recipe,
    smart_resize,
)
from synpo_fast.ops.host_copy import to_device
from synpo_fast.ops.video_patches import Packing

# Differences are computed in chunks: for a whole video they would take as much memory as its pixels.
CHUNK_BYTES = 32 << 20
MERGE_SIZE = 2  # the merge size for videos, from the preprocessor; it is not in the config
# A patch repeats the one before it if 255 times the mean difference of their normalised pixels is at most this.
REPEATED = 0.1


class VideoLlama3(Family):
    name = "video_llama_3"
    model_types = ("video_llama_3",)
    video_markers = ("<|video_pad|>",)
    placeholder_token = "<|video_pad|>"
    packs_frames = True
    chat_template = chatml_template("<|video_pad|>\\n")
    default_seconds_per_frame = 1.0

    def default_processing(self, config: Any) -> VideoProcessing:
        return VideoProcessing(
            HALF_MEAN, HALF_STD, min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28, drop_repeated_tokens=True
        )

    def _video_inputs(
        self, config: Any, tokenizer: Any, frames: Tensor, seconds: float, processing: VideoProcessing
    ) -> VideoInputs:
        patch_size = config.vision_config.patch_size
        packing = Packing(patch_size, MERGE_SIZE)

        def size_with(max_pixels: int) -> tuple[int, int]:
            return smart_resize(
                *frames.shape[1:3],
                factor=patch_size * MERGE_SIZE,
                min_pixels=processing.min_pixels,
                max_pixels=max(1, max_pixels // len(frames)),
            )

        size = fitting_size(size_with, lambda size: packing.num_merged(len(frames), size), processing)
        t, h, w = packing.grid(len(frames), size)
        resized, recipe = frames_and_recipe(frames, size, processing, packing)
        kept = torch.ones(t, h * w // MERGE_SIZE**2, dtype=torch.bool)
        if processing.drop_repeated_tokens:
            kept = kept_tokens(recipe.pixels(resized).view(*kept.shape, -1)).cpu()
        pieces: list[str | Sequence[int]] = []
        for index, num_tokens in enumerate(kept.sum(1).tolist()):
            pieces += [f"{',' if index else ''}Time {index * seconds:.1f}s:", (config.video_token_id,) * num_tokens]
        return VideoInputs(
            {
                "video_grid_thw": torch.tensor([[t, h, w]]),
                "video_merge_sizes": torch.tensor([MERGE_SIZE]),
                "video_compression_mask": kept.flatten(),
            },
            token_ids=token_ids_of(tokenizer, pieces),
            placeholder_id=config.video_token_id,
            frames=resized,
            recipe=recipe,
        )

    def encode_videos(self, model: nn.Module, videos: Sequence[VideoInputs]) -> list[VideoFeatures]:
        if not videos:
            return []
        pixels = concatenated(inner(model).vision_model, videos, ("pixel_values_videos",))
        device = place_of(model)[0]
        grids = host_grids(videos)
        merge_sizes = torch.cat([video.tensors["video_merge_sizes"].cpu() for video in videos])
        made = tower_inputs(inner(model).vision_model, grids, merge_size=merge_sizes, device=device)
        output = inner(model).get_video_features(
            **pixels, video_grid_thw=grids, video_merge_sizes=merge_sizes, **made, return_dict=True
        )
        # Selected by index, not by mask: the host would have to wait for a mask on the device.
        kept = {
            index: video.tensors["video_compression_mask"].cpu().nonzero()[:, 0] for index, video in enumerate(videos)
        }
        return [
            VideoFeatures(features.index_select(0, rows))
            for features, rows in zip(output.pooler_output, to_device(kept, device).values(), strict=True)
        ]

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        return [inner(model).vision_model, inner(model).projector]


def kept_tokens(merged_patches: Tensor) -> Tensor:
    """Marks the tokens to keep: normalised fp32 [T, P, C] -> bool [T, P].

    All tokens of the first frame are kept, then those that changed, and at least one of each frame.
    """
    kept = torch.ones(merged_patches.shape[:2], dtype=torch.bool, device=merged_patches.device)
    step = max(1, CHUNK_BYTES // (4 * merged_patches[0].numel()))
    for start in range(1, len(kept), step):
        now = merged_patches[start : start + step]
        change = (now - merged_patches[start - 1 : start - 1 + len(now)]).abs_().mean(-1)
        kept[start : start + step] = change * 255 > REPEATED
    kept[:, 0] |= ~kept.any(1)
    return kept
