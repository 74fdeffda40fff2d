"""The supported model families by name, and the lookup of a config's family."""

from __future__ import annotations

from typing import Any

from synpo_fast.errors import UserError
from synpo_fast.models.families.base import Family, VideoFeatures, VideoInputs, attention_kinds
from synpo_fast.models.families.internvl import InternVL
from synpo_fast.models.families.llava_onevision import LlavaOneVision
from synpo_fast.models.families.qwen2_5_vl import Qwen25VL
from synpo_fast.models.families.qwen3_vl import Qwen3VL
from synpo_fast.models.families.text import Text
from synpo_fast.models.families.video_llama_3 import VideoLlama3

__all__ = ["FAMILIES", "Family", "VideoFeatures", "VideoInputs", "attention_kinds", "family_of"]

FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": Qwen3VL(),
    "llava_onevision": LlavaOneVision(),
    "internvl": InternVL(),
    "video_llama_3": VideoLlama3(),
    "text": Text(),
}


def family_of(config: Any) -> Family:
    """Returns the family of config.model_type. Raises ValueError with the type and the supported ones."""
    for family in FAMILIES.values():
        if config.model_type in family.model_types:
            return family
    served = "; ".join(f"{name}: {', '.join(family.model_types)}" for name, family in FAMILIES.items())
    raise UserError(f"model_type {config.model_type!r} is not supported. Supported are {served}")
