"""LLaVA-OneVision: square frames of one fixed size, features pooled 2 x 2, one newline token after the video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.models.families.base import Family, VideoFeatures, VideoInputs, concatenated, inner
from synpo_fast.models.families.video_frames import HALF_MEAN, HALF_STD, VideoProcessing, frames_and_recipe

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'video' -%}
{{ '<video>\\n' }}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{ part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


class LlavaOneVision(Family):
    name = "llava_onevision"
    model_types = ("llava_onevision",)
    video_markers = ("<video>",)
    placeholder_token = "<video>"
    chat_template = CHAT_TEMPLATE

    def default_processing(self, config: Any) -> VideoProcessing:
        side = config.vision_config.image_size
        return VideoProcessing(HALF_MEAN, HALF_STD, size=(side, side))

    def _video_inputs(
        self, config: Any, tokenizer: Any, frames: Tensor, seconds: float, processing: VideoProcessing
    ) -> VideoInputs:
        side = config.vision_config.image_size
        if processing.size != (side, side):
            raise ValueError(f"family {self.name!r} takes frames of {side} x {side}, got size {processing.size}")
        resized, recipe = frames_and_recipe(frames, (side, side), processing)
        return VideoInputs(
            {},
            token_ids=(config.video_token_id,) * (len(frames) * tokens_per_frame(config) + 1),
            placeholder_id=config.video_token_id,
            frames=resized,
            recipe=recipe,
        )

    def encode_videos(self, model: nn.Module, videos: Sequence[VideoInputs]) -> list[VideoFeatures]:
        if not videos:
            return []
        # The tower treats frames separately, so videos of any length can be concatenated into one. The output ends with the
        # newline feature in some versions of transformers only.
        name = "pixel_values_videos"
        pixels = concatenated(inner(model).vision_tower, videos, (name,))[name]
        output = inner(model).get_video_features(pixels[None], return_dict=True).pooler_output[0]
        lengths = [video.num_placeholders - 1 for video in videos]
        newline = inner(model).image_newline[None].to(output)
        split = output[: sum(lengths)].split(lengths)
        return [VideoFeatures(torch.cat([features, newline])) for features in split]

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        base = inner(model)
        modules: list[nn.Module] = [base.vision_tower, base.multi_modal_projector]
        if isinstance(base.image_newline, nn.Parameter):  # a buffer if it stays in fp32 during 16-bit training
            modules.append(nn.ParameterList([base.image_newline]))
        return modules


def tokens_per_frame(config: Any) -> int:
    """Returns the number of features per frame: the model pools the tower's square grid to half its side, rounded up."""
    return math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2) ** 2
