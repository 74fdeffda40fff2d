"""The interface to a family of video-language models: everything that differs between them.

The composite forward of transformers is never called. A prompt is a list of token ids. Its video goes through the vision
tower separately, and the features replace the embeddings at the placeholder tokens. Position ids are computed for each
sample from its start. Then the inner language model runs on the embeddings, with our own attention. A `Family` supplies the
steps of this path that differ between models, and raises an error that names what it cannot do.

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

# Layers that a mask can restrict. Layers of any other kind carry a state from token to token.
MASKED_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass(frozen=True)
class VideoInputs:
    """One video, ready for the vision tower and for the prompt.

    tensors: keyword arguments of the family's vision call for this video, except the pixels.
    frames: uint8 [T, height, width, 3], resized for the tower; recipe: converts them to pixels on the tower's device when the
        tower is called. If both are None, the pixels are in tensors.
    key: identifies the video in a feature cache and among precomputed log-probs; None: a hash of its content is used.
    features: the tower's output, if it was found in a feature cache; then there are neither frames nor pixels.
    token_ids: the video's tokens in the prompt: placeholders, with the timestamps, separators and newlines that the family
        puts between them.
    placeholder_id: features replace the embeddings where token_ids has this value.
    seconds_per_grid: seconds between two rows of the temporal grid, for families whose position ids encode time.
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
        """Bytes held in memory: tensors, frames and features."""
        held = [*self.tensors.values(), *([] if self.frames is None else [self.frames])]
        if self.features is not None:
            held += [self.features.features, *self.features.deepstack]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def argument(self, name: str, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """One keyword argument of the vision call, on `device` (None: on its current device).

        Frames become pixels here. Only pixels are converted to `dtype` (None: fp32).
        """
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
        """All keyword arguments of the vision call, on their current device, with pixels in fp32."""
        names = [*([] if self.recipe is None else [self.recipe.name]), *self.tensors]
        return {name: self.argument(name) for name in names}


@dataclass(frozen=True)
class VideoFeatures:
    """The tower's output for one video.

    features: [P, D] for the P placeholders; deepstack: one [P, D] for each decoder layer that adds one.
    """

    features: Tensor
    deepstack: tuple[Tensor, ...] = ()


class Family(abc.ABC):
    """A family of models. Instances hold no state; FAMILIES in registry.py has one instance per family."""

    name: str
    model_types: tuple[str, ...]
    # Strings that a chat template writes for a video, longest first: the first one found is replaced by the video's tokens.
    video_markers: tuple[str, ...] = ()
    placeholder_token: str = ""
    # The family's published template, for tokenizers without one (some repositories store it with the processor).
    chat_template: str = ""
    default_seconds_per_frame: float = 0.5
    # True if the tower runs all frames as one row of patches, cut into segments that attend only to themselves.
    packs_frames: bool = False

    def load_class(self) -> Any:
        """Returns the transformers auto class whose from_pretrained and from_config build the model with its head."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText

    @abc.abstractmethod
    def default_processing(self, config: Any) -> VideoProcessing:
        """Returns the settings of the family's published preprocessor."""

    @abc.abstractmethod
    def _video_inputs(
        self, config: Any, tokenizer: Any, frames: Tensor, seconds: float, processing: VideoProcessing
    ) -> VideoInputs:
        """Implements video_inputs. The frames are checked and every option has its value."""

    def processing(self, config: Any, preprocessor: Mapping[str, Any] | None = None) -> VideoProcessing:
        """Returns the video settings: the published defaults, overridden by `preprocessor`, then by config.video_processing.

        `preprocessor` is the dict of a video_preprocessor_config.json or preprocessor_config.json.
        """
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
        """Prepares uint8 frames [T, H, W, 3] for the tower and the prompt, on the frames' device.

        config: the model's config. seconds_per_frame: the time between two of these frames (None: default_seconds_per_frame).
        processing: None means self.processing(config).
        Raises ValueError for frames of another shape or dtype, an empty video, or an aspect ratio above 200.
        """
        check_frames(frames)
        seconds = self.default_seconds_per_frame if seconds_per_frame is None else seconds_per_frame
        return self._video_inputs(config, tokenizer, frames, seconds, processing or self.processing(config))

    @abc.abstractmethod
    def encode_videos(self, model: nn.Module, videos: Sequence[VideoInputs]) -> list[VideoFeatures]:
        """Computes the features of each video with one call of the vision tower for all of them; [] for an empty list."""

    @abc.abstractmethod
    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        """Returns modules with every parameter that encode_videos uses: the tower, then a separate projector, then the rest."""

    def language_model(self, model: nn.Module) -> nn.Module:
        """Returns the inner language model.

        It takes inputs_embeds, position_ids, attention_mask and use_cache. Its .last_hidden_state includes the final norm.
        """
        return inner(model).language_model

    def language_kwargs(self, placeholders: Tensor, features: Sequence[VideoFeatures]) -> dict[str, Any]:
        """Returns further keyword arguments for the language model.

        placeholders: int64 [P], the positions of the video tokens in a single row (for several rows: bool [B, L], which costs a
        host sync on a GPU). features: those of the videos, in the same order.
        """
        return {}

    def position_ids(self, model: nn.Module, token_ids: Tensor, video: VideoInputs | None) -> Tensor:
        """Computes the position ids of one sample from its start: token_ids [L] -> int64 [L], or [3, L] for mRoPE.

        token_ids may continue after the prompt.
        """
        return torch.arange(len(token_ids))

    def prompt_ids(self, tokenizer: Any, text: str, video_token_ids: Sequence[int] | None = None) -> list[int]:
        """Returns the token ids of one user turn, with the video (if any) before the text, and of the assistant's header.

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
        """True if a layer carries a state that no mask stops, so that branches of one row would affect each other."""
        return not attention_kinds(config) <= MASKED_ATTENTION

    def reason_for_own_rows(self, config: Any) -> str | None:
        """Returns the reason each response needs a row of its own, or None if responses and samples may share a row.

        The reason continues a sentence that starts with the family's name.
        """
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
                f"a prompt may not contain {self.placeholder_token!r}: family {self.name!r} puts its video there"
            )
        return tokenizer(text, add_special_tokens=False).input_ids


def inner(model: nn.Module) -> Any:
    """Returns the model without its head: vision tower, projector and language model."""
    return model.model


def token_ids_of(tokenizer: Any, pieces: Sequence[str | Sequence[int]]) -> tuple[int, ...]:
    """Joins strings and token ids into one list of token ids. Neighbouring strings are tokenised together."""
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
    """Returns device and dtype of the first floating-point weight.

    A weight may be a buffer: frozen parameters that stay in fp32 during 16-bit training become buffers
    (fp32_parameters.py).
    """
    for owner in module.modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and name not in owner._non_persistent_buffers_set:
                return tensor.device, tensor.dtype
    raise AssertionError(f"{type(module).__name__} has no weights")


def concatenated(tower: nn.Module, videos: Sequence[VideoInputs], names: Sequence[str]) -> dict[str, Tensor]:
    """Concatenates the named arguments of all videos along the first dimension, on the tower's device.

    Frames are copied as uint8 and become pixels there, in the dtype to which the tower would cast them first.
    """
    device, dtype = place_of(tower)
    joined = {}
    for name in names:
        parts = [video.argument(name, device=device, dtype=dtype) for video in videos]
        joined[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined


def attention_kinds(config: Any) -> frozenset[str]:
    """Returns the kinds of the language model's layers: "full_attention", "sliding_attention", "linear_attention", ..."""
    text = config.get_text_config()
    for name in ("layer_types", "layers_block_type", "block_types"):
        kinds = getattr(text, name, None)
        if kinds:
            return frozenset(kinds)
    sliding = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    return frozenset({"sliding_attention" if sliding else "full_attention"})
