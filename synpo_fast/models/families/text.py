"""Language models without vision. Their prompts are text only; the rest of the path is the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from synpo_fast.errors import UserError
from synpo_fast.models.families.base import Family, VideoFeatures, VideoInputs
from synpo_fast.models.families.video_frames import VideoProcessing


class Text(Family):
    name = "text"
    # Decoders whose forward takes inputs_embeds and position_ids and returns normed hidden states.
    model_types = (
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_5_text",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "olmo2",
        "olmo3",
        "granite",
        "smollm3",
        "cohere",
        "cohere2",
        "glm",
        "glm4",
        "starcoder2",
        "stablelm",
        "gpt_neox",
        "exaone4",
    )

    def load_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def default_processing(self, config: Any) -> VideoProcessing:
        raise UserError(f"model_type {config.model_type!r} is a text model: it takes no video")

    def _video_inputs(
        self, config: Any, tokenizer: Any, frames: Tensor, seconds: float, processing: VideoProcessing
    ) -> VideoInputs:
        raise ValueError(f"model_type {config.model_type!r} is a text model: it takes no video")

    def encode_videos(self, model: nn.Module, videos: Sequence[VideoInputs]) -> list[VideoFeatures]:
        if videos:
            raise ValueError(f"a text model takes no video, got {len(videos)}")
        return []

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        return []

    def language_model(self, model: nn.Module) -> nn.Module:
        return model.base_model  # type: ignore[return-value]

    def prompt_ids(self, tokenizer: Any, text: str, video_token_ids: Sequence[int] | None = None) -> list[int]:
        """Returns the token ids of one user turn in the tokenizer's chat template.

        A tokenizer without a template (a base model's) encodes the plain text, with its default special tokens.
        """
        if video_token_ids is not None:
            raise ValueError(f"a text model takes no video, got {len(video_token_ids)} tokens of one")
        if not tokenizer.chat_template:
            return tokenizer(text).input_ids
        return self._text_ids(tokenizer, self._render(tokenizer, text))
