"""InternVL: frames of one fixed size, each numbered and enclosed in <img> tags; pixel shuffle merges 4 features into 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from synpo_fast.models.families.base import Family, VideoFeatures, VideoInputs, concatenated, inner, token_ids_of
from synpo_fast.models.families.chat_template import chatml_template
from synpo_fast.models.families.video_frames import IMAGENET_MEAN, IMAGENET_STD, VideoProcessing, frames_and_recipe


class InternVL(Family):
    name = "internvl"
    model_types = ("internvl",)
    video_markers = ("<video>", "<|video_pad|>")
    placeholder_token = "<IMG_CONTEXT>"
    chat_template = chatml_template("<video>\\n")

    def default_processing(self, config: Any) -> VideoProcessing:
        height, width = config.vision_config.image_size
        return VideoProcessing(IMAGENET_MEAN, IMAGENET_STD, size=(height, width))

    def _video_inputs(
        self, config: Any, tokenizer: Any, frames: Tensor, seconds: float, processing: VideoProcessing
    ) -> VideoInputs:
        size = self.default_processing(config).size
        if size is None or processing.size != size:
            raise ValueError(f"family {self.name!r} takes frames of {size}, got size {processing.size}")
        placeholders = (config.image_token_id,) * tokens_per_frame(config)
        pieces: list[str | Sequence[int]] = []
        for index in range(len(frames)):
            newline = "\n" if index else ""
            pieces += [f"{newline}Frame{index + 1}: <img>", placeholders, "</img>"]
        resized, recipe = frames_and_recipe(frames, size, processing, name="pixel_values")
        return VideoInputs(
            {},
            token_ids=token_ids_of(tokenizer, pieces),
            placeholder_id=config.image_token_id,
            frames=resized,
            recipe=recipe,
        )

    def encode_videos(self, model: nn.Module, videos: Sequence[VideoInputs]) -> list[VideoFeatures]:
        if not videos:
            return []
        pixels = concatenated(inner(model).vision_tower, videos, ("pixel_values",))["pixel_values"]
        output = inner(model).get_image_features(pixels, return_dict=True).pooler_output
        split = output.flatten(0, 1).split([video.num_placeholders for video in videos])
        return [VideoFeatures(features) for features in split]

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        return [inner(model).vision_tower, inner(model).multi_modal_projector]


def tokens_per_frame(config: Any) -> int:
    vision = config.vision_config
    (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
    return int((height // patch_height) * (width // patch_width) * config.downsample_ratio**2)
