"""What differs between families of video-language models, behind one interface.

A composite forward of transformers is never called. A prompt is a list of token ids; its video goes through the vision
tower apart; the features replace the embeddings at the placeholder tokens; position ids are computed for each sample from
its start; then the inner language model runs on embeddings, with an attention of our own. A `Family` supplies the pieces
of that path which each model does in its own way, and refuses by name what it cannot do.

`model` is always the transformers model with its head (what from_pretrained returns), not a peft wrapper around it.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.models.families.video_frames import PixelRecipe, VideoProcessing, processing_with
from synpo_fast.models.rope_length import ropes_by_length
from synpo_fast.ops.video_patches import check_frames

# Layers whose reach a mask decides. Anything else carries a state from token to token.
MASKED_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass(frozen=True)
class VideoInputs:
    """One video, ready for the vision tower and for the prompt.

    tensors: keyword arguments of the family's vision call, for this video alone, but for its pixels.
    frames: uint8 [T, height, width, 3], resized for the tower; recipe: what makes them pixels, when the tower is called and on
        its device. Both None: the pixels stand in tensors.
    key: what the video is known by in a feature cache and among precomputed log-probs; None: its content is hashed.
    features: what the tower makes of it, where that was found in a feature cache; then there are neither frames nor pixels.
    token_ids: what stands for the video in the prompt: placeholders, with the timestamps, separators and newlines the
        family puts between them.
    placeholder_id: features replace the embeddings where token_ids equals it.
    seconds_per_grid: seconds between two rows of the temporal grid, for families whose positions tell time.
    """

    tensors: dict[str, Tensor]
    token_ids: tuple[int, ...]
    placeholder_id: int
    seconds_per_grid: float | None = None
    frames: Tensor | None = None
    recipe: PixelRecipe | None = None
    key: str | None = None
    features: VideoFeatures | None = None

    @property
    def num_placeholders(self) -> int:
        return self.token_ids.count(self.placeholder_id)

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors, frames and features included."""
        held = [*self.tensors.values(), *([] if self.frames is None else [self.frames])]
        if self.features is not None:
            held += [self.features.features, *self.features.deepstack]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def argument(self, name: str, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """One keyword argument of the vision call, on a device (None: where it is held). Pixels are made here; they and no
        others take the dtype (None: fp32)."""
        if self.recipe is None or self.recipe.name != name:
            if name not in self.tensors and self.features is not None:
                raise ValueError(
                    "this video came from a feature cache, with features and without pixels: set policy.feature_store to that "
                    "cache, or read the pair without it"
                )
            tensor = self.tensors[name]
            return tensor if device is None else tensor.to(device)
        assert self.frames is not None
        frames = self.frames if device is None else self.frames.to(device)
        return self.recipe.pixels(frames, dtype or torch.float32)

    def arguments(self) -> dict[str, Tensor]:
        """All of the vision call's keyword arguments, pixels in fp32, where they are held."""
        names = [*([] if self.recipe is None else [self.recipe.name]), *self.tensors]
        return {name: self.argument(name) for name in names}


@dataclass(frozen=True)
class VideoFeatures:
    """features [P, D] for the P placeholders of one video; deepstack: one [P, D] for each decoder layer that adds them."""

    features: Tensor
    deepstack: tuple[Tensor, ...] = ()


class Family(abc.ABC):
    """One family. Instances hold no state; FAMILIES in family.py has one of each."""

    name: str
    model_types: tuple[str, ...]
    # The tokens a chat template writes for a video, longest first: the first one found is replaced by the video.
    video_markers: tuple[str, ...] = ()
    placeholder_token: str = ""
    # The family's published template, for tokenizers that come without one (some repositories keep it with the processor).
    chat_template: str = ""
    default_seconds_per_frame: float = 0.5
    # Whether the tower runs all frames as one row of patches, cut into segments that attend to themselves.
    packs_frames: bool = False

    def load_class(self) -> Any:
        """The auto class whose from_pretrained and from_config build the model with its head."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText

    @abc.abstractmethod
    def default_processing(self, config: Any) -> VideoProcessing:
        """How the family's published preprocessor makes frames into pixels."""

    @abc.abstractmethod
    def _video_inputs(
        self, config: Any, tokenizer: Any, frames: Tensor, seconds: float, processing: VideoProcessing
    ) -> VideoInputs:
        """video_inputs, with frames checked and nothing left open."""

    def processing(self, config: Any, preprocessor: Mapping[str, Any] | None = None) -> VideoProcessing:
        """How frames become pixels: published defaults, then what `preprocessor` (the dict of a
        video_preprocessor_config.json or preprocessor_config.json) and config.video_processing say."""
        return processing_with(self.default_processing(config), config, preprocessor)

    def video_inputs(
        self,
        config: Any,
        tokenizer: Any,
        frames: Tensor,
        *,
        seconds_per_frame: float | None = None,
        processing: VideoProcessing | None = None,
    ) -> VideoInputs:
        """frames uint8 [T, H, W, 3] -> VideoInputs, on the frames' device. config is the model's;
        seconds_per_frame is the time between two of the frames given (None: default_seconds_per_frame); processing None:
        self.processing(config).

        Raises ValueError for frames of another shape or dtype, an empty video, or an aspect ratio above 200.
        """
        check_frames(frames)
        seconds = self.default_seconds_per_frame if seconds_per_frame is None else seconds_per_frame
        return self._video_inputs(config, tokenizer, frames, seconds, processing or self.processing(config))

    @abc.abstractmethod
    def encode_videos(self, model: nn.Module, videos: Sequence[VideoInputs]) -> list[VideoFeatures]:
        """Features of each video, from one call of the vision tower for the whole list; [] for an empty list."""

    @abc.abstractmethod
    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        """Every parameter encode_videos uses: the tower first, then the projector where it stands apart, then the rest."""

    def language_model(self, model: nn.Module) -> nn.Module:
        """Takes inputs_embeds, position_ids, attention_mask, use_cache; returns .last_hidden_state, final norm included."""
        return inner(model).language_model

    def language_kwargs(self, placeholders: Tensor, features: Sequence[VideoFeatures]) -> dict[str, Any]:
        """Further keyword arguments of the language model. placeholders int64 [P]: where the video tokens of its one row stand
        (for several rows: bool [B, L], which a GPU has to stop for). features: of the videos, in the same order."""
        return {}

    def position_ids(self, model: nn.Module, token_ids: Tensor, video: VideoInputs | None) -> Tensor:
        """Positions of one sample from its start: token_ids [L] -> int64 [L], or [3, L] where rotary positions have three
        components. The sample may go on after the prompt."""
        return torch.arange(len(token_ids))

    def prompt_ids(self, tokenizer: Any, text: str, video_token_ids: Sequence[int] | None = None) -> list[int]:
        """One user turn, the video (if any) before the text, and the opening of the assistant's turn.

        Raises ValueError if the chat template writes no video token, or if the text itself holds the placeholder.
        """
        content: list[dict[str, str]] = [{"type": "text", "text": text}]
        if video_token_ids is None:
            return self._text_ids(tokenizer, self._render(tokenizer, content))
        rendered = self._render(tokenizer, [{"type": "video"}, *content])
        marker = next((marker for marker in self.video_markers if marker in rendered), None)
        if marker is None:
            raise ValueError(
                f"the tokenizer's chat template writes none of {self.video_markers} for a video; set"
                f" tokenizer.chat_template to the one of family {self.name!r} (Family.chat_template)"
            )
        before, after = rendered.split(marker, maxsplit=1)
        return [*self._text_ids(tokenizer, before), *video_token_ids, *self._text_ids(tokenizer, after)]

    def has_linear_attention(self, config: Any) -> bool:
        """Whether some layer carries a state past any mask, so that branches of one row would see each other."""
        return not attention_kinds(config) <= MASKED_ATTENTION

    def why_apart(self, config: Any) -> str | None:
        """Why each response has to be a row of its own, as the rest of a sentence that begins with the family's name; None:
        responses and samples may share a row."""
        if self.has_linear_attention(config):
            return "has linear-attention layers, whose state would run from one branch into the next"
        if ropes := ropes_by_length(config):
            return f"has a rope of type {ropes[0]!r}, whose angles depend on how long the whole row is"
        return None

    def _render(self, tokenizer: Any, content: Any) -> str:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=tokenizer.chat_template or self.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )

    def _text_ids(self, tokenizer: Any, text: str) -> list[int]:
        if self.placeholder_token and self.placeholder_token in text:
            raise ValueError(
                f"a prompt may not hold {self.placeholder_token!r}: family {self.name!r} puts its video there"
            )
        return tokenizer(text, add_special_tokens=False).input_ids


def inner(model: nn.Module) -> Any:
    """The model without its head: vision tower, projector and language model."""
    return model.model


def token_ids_of(tokenizer: Any, pieces: Sequence[str | Sequence[int]]) -> tuple[int, ...]:
    """Strings and ready token ids in order. Neighbouring strings are tokenised together."""
    ids: list[int] = []
    text = ""
    for piece in [*pieces, ()]:
        if isinstance(piece, str):
            text += piece
            continue
        ids += tokenizer(text, add_special_tokens=False).input_ids if text else []
        ids += piece
        text = ""
    return tuple(ids)


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and floating-point type of the first weight. A weight is a parameter, or a buffer in its place, as frozen ones
    are that stay in fp32 while others train in 16 bits (training/fp32_parameters.py)."""
    for owner in module.modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and name not in owner._non_persistent_buffers_set:
                return tensor.device, tensor.dtype
    raise AssertionError(f"{type(module).__name__} has no weights")


def concatenated(tower: nn.Module, videos: Sequence[VideoInputs], names: Sequence[str]) -> dict[str, Tensor]:
    """The named arguments of all videos, concatenated along the first dimension, on the tower's device. Frames travel as
    uint8 and become pixels there, in the dtype that the tower casts them to first of all."""
    device, dtype = place_of(tower)
    joined = {}
    for name in names:
        parts = [video.argument(name, device=device, dtype=dtype) for video in videos]
        joined[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined


def attention_kinds(config: Any) -> frozenset[str]:
    """The kinds of the language model's layers: "full_attention", "sliding_attention", "linear_attention", "mamba", ..."""
    text = config.get_text_config()
    for name in ("layer_types", "layers_block_type", "block_types"):
        kinds = getattr(text, name, None)
        if kinds:
            return frozenset(kinds)
    sliding = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    return frozenset({"sliding_attention" if sliding else "full_attention"})
