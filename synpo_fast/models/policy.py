"""A video-language model for training: it takes samples and returns the token log-probs of their responses.

The composite forward of the model is not used. A sample's video goes through the vision tower once, and its features replace
the embeddings of the prompt's placeholders. Prompts and responses are packed into rows (layout.py), and the language model
runs on each row with an attention that keeps branches apart (attention.py). Only hidden states that predict a response token
are projected to the vocabulary, by fused_linear_logprobs.

Adapters, gradient checkpointing, frozen and trainable towers all use this one path.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from synpo_fast.models import attention
from synpo_fast.models.families.registry import Family, VideoFeatures, VideoInputs
from synpo_fast.models.families.video_frames import VideoProcessing
from synpo_fast.models.head import Head, head_of
from synpo_fast.models.layout import RowLayout, SampleLengths, plan_rows
from synpo_fast.models.rope_length import ropes_by_length, whole_sequence
from synpo_fast.models.row_inputs import RowInputs, row_inputs
from synpo_fast.ops.copy_stream import CopyStream
from synpo_fast.ops.host_copy import to_device
from synpo_fast.ops.linear_logprobs import (
    TokenOutputs,
    default_keep_bytes,
    fused_linear_logprobs,
    fused_linear_outputs,
    kept_bytes_per_row,
)

Logps = list[list[Tensor]]  # for each sample, for each of its responses: [T] fp32


@dataclass(frozen=True, eq=False)
class Sample:
    """The tokens of a prompt, its video's placeholders included, and of any number of responses, each closed by EOS.

    encode_pairs makes samples from pairs.
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    video: VideoInputs | None = None
    name: str = ""

    @property
    def lengths(self) -> SampleLengths:
        return SampleLengths(len(self.prompt), tuple(len(response) for response in self.responses))


class FeatureStore(Protocol):
    """Storage for the features of a frozen tower, such as FeatureCache. get returns None for a video that is not stored."""

    def get(self, video: VideoInputs) -> VideoFeatures | None: ...
    def put(self, video: VideoInputs, features: VideoFeatures) -> None: ...


class Policy(nn.Module):
    """A model with its tokenizer and family: call it with samples to get the log-probs of their responses.

    load_policy makes one. `model` is a transformers model, possibly wrapped by peft. `notes` has sentences about the choices made
    at loading. Inside a module under ZeRO-3 call forward() instead: DeepSpeed hooks the backward of every tensor that __call__
    returns, one per response, and ranks with different numbers of responses would deadlock.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        family: Family,
        *,
        attn_implementation: str,
        row_tokens: int | None = None,
        backend: str | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.family = model, tokenizer, family
        self.attn_implementation, self.row_tokens, self.backend = attn_implementation, row_tokens, backend
        self.keep_bytes = keep_bytes  # of one forward; see fused_linear_logprobs
        self.vision_attn_implementation: str | None = None  # None: no tower
        self.processing: VideoProcessing | None = None  # None: the family's defaults for the model's config
        self.feature_store: FeatureStore | None = None
        self._copies: CopyStream | None = None
        self.notes: list[str] = []  # choices made at loading, printed when a run starts

    @property
    def base(self) -> Any:
        """The transformers model itself, adapters inside its layers."""
        unwrap = getattr(self.model, "get_base_model", None)
        return self.model if unwrap is None else unwrap()

    @property
    def device(self) -> torch.device:
        return self.base.get_input_embeddings().weight.device

    @property
    def reason_for_own_rows(self) -> str | None:
        """The reason each response runs in a row of its own, or None if rows are shared.

        The reason continues a sentence that starts with the family's name.
        """
        return self.family.reason_for_own_rows(self.base.config)

    @property
    def can_share(self) -> bool:
        """True if responses and samples may share a row without affecting each other."""
        return self.reason_for_own_rows is None

    def head(self) -> Head:
        return head_of(self.model)

    def vision_is_frozen(self) -> bool:
        modules = self.family.vision_modules(self.base)
        return not any(p.requires_grad for module in modules for p in module.parameters())

    def freeze_vision(self) -> None:
        for module in self.family.vision_modules(self.base):
            module.requires_grad_(False)

    def forward(self, samples: Sequence[Sample], *, share_prefix: bool = True, pack: bool = True) -> Logps:
        """Computes the token log-probs of every response, with autograd: for each sample, a list of fp32 tensors [T].

        Args:
            share_prefix: run a sample's video and prompt once for all its responses.
            pack: put several samples into one row, up to row_tokens.
        """
        return self._each_response(samples, share_prefix, pack, self._logps)

    def token_outputs(
        self,
        samples: Sequence[Sample],
        *,
        share_prefix: bool = True,
        pack: bool = True,
        logsumexp_grad: bool = False,
        with_mean_logits: bool = False,
    ) -> list[list[TokenOutputs]]:
        """Computes log-probs, logsumexp, entropy and more of every token of every response, in the layout of forward.

        logsumexp_grad, with_mean_logits: see fused_linear_outputs.
        """
        outputs = partial(self._outputs, logsumexp_grad=logsumexp_grad, with_mean_logits=with_mean_logits)
        return self._each_response(samples, share_prefix, pack, outputs)

    def _each_response(
        self, samples: Sequence[Sample], share_prefix: bool, pack: bool, values_of: Callable[..., Sequence[Any]]
    ) -> list[list[Any]]:
        """Runs the samples in rows. values_of: turns a row's hidden states into one value for each of its responses."""
        reason_for_own_rows = self.reason_for_own_rows
        if reason_for_own_rows is not None and (share_prefix or pack):
            _warn_once_that_nothing_is_shared(self.family.name, reason_for_own_rows)
            share_prefix = pack = False
        features = self.encode_videos(samples)
        plan = plan_rows(
            [sample.lengths for sample in samples], share_prefix=share_prefix, pack=pack, row_tokens=self.row_tokens
        )
        results: list[list[Any]] = [[None] * len(sample.responses) for sample in samples]
        head = self.head()
        allowed = default_keep_bytes(self.device) if self.keep_bytes is None else self.keep_bytes
        unused = allowed
        for row, inputs in zip(plan, self._row_inputs(plan, samples), strict=True):
            hidden = self.hidden_states(row, samples, features, inputs)
            names = [(group.sample, response) for group in row.groups for response in group.responses]
            lengths = [len(samples[sample].responses[response]) for sample, response in names]
            for (sample, response), value in zip(
                names, values_of(hidden, head, inputs, lengths, max(1, unused) if allowed else 0), strict=True
            ):
                results[sample][response] = value
            unused -= sum(lengths) * kept_bytes_per_row(hidden.dtype, hidden.device, head.weight.shape[0])
        return results

    def encode_videos(self, samples: Sequence[Sample]) -> list[VideoFeatures | None]:
        """Returns each sample's features (None without a video). The tower encodes each video once, and none that is stored."""
        found: list[VideoFeatures | None] = [None] * len(samples)
        frozen = self.vision_is_frozen()
        store = self.feature_store if frozen else None
        missing = []
        for index, sample in enumerate(samples):
            if sample.video is None:
                continue
            stored = None if store is None else store.get(sample.video)
            if stored is None:
                missing.append(index)
            else:
                found[index] = _on(self.device, stored)
        if missing:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                videos = [self._on_device(_video(samples[index])) for index in missing]
                encoded = self.family.encode_videos(self.base, videos)
            for index, features in zip(missing, encoded, strict=True):
                found[index] = features
                if store is not None:
                    store.put(_video(samples[index]), features)
        return found

    def begin_copies(self, samples: Sequence[Sample]) -> None:
        """Starts copying the frames of the samples to be encoded next to the GPU, in parallel with its computation."""
        if self.copies is not None:
            videos = [sample.video for sample in samples if sample.video is not None]
            self.copies.begin([video.frames for video in videos if video.frames is not None])

    @property
    def copies(self) -> CopyStream | None:
        """The stream for copies to the GPU, made when it is first needed. None on a CPU."""
        if self._copies is None and self.device.type == "cuda":
            self._copies = CopyStream(self.device)
        return self._copies

    def _on_device(self, video: VideoInputs) -> VideoInputs:
        if self.copies is None or video.frames is None:
            return video
        return replace(video, frames=self.copies.take(video.frames))

    def hidden_states(
        self,
        row: RowLayout,
        samples: Sequence[Sample],
        features: Sequence[VideoFeatures | None],
        inputs: RowInputs | None = None,
    ) -> Tensor:
        """Computes the hidden states [L, D] of one packed row, final norm included. inputs None: they are made for this row."""
        inputs = inputs or self._row_inputs([row], samples)[0]
        embeddings = self.base.get_input_embeddings()(inputs.tokens)
        parts = _features_in_order(row, samples, features)
        extra: dict[str, Any] = {}
        if parts:
            values = torch.cat([part.features for part in parts]).to(embeddings)
            embeddings = embeddings.index_copy(0, inputs.placeholders, values)
            extra = self.family.language_kwargs(inputs.placeholders, parts)
        if self.can_share:
            packed = inputs.packed
            extra["attention_mask"] = attention.attention_mask(packed, self.attn_implementation, embeddings.dtype)
            if self.attn_implementation in (attention.SEGMENTS, attention.VARLEN):
                extra["packed"] = packed
        language_model = self.family.language_model(self.base)
        by_length = bool(ropes_by_length(self.base.config))
        with whole_sequence(language_model) if by_length else nullcontext():
            output = language_model(
                inputs_embeds=embeddings[None], position_ids=inputs.positions.unsqueeze(-2), use_cache=False, **extra
            )
        return output.last_hidden_state[0]

    def _row_inputs(self, plan: Sequence[RowLayout], samples: Sequence[Sample]) -> list[RowInputs]:
        return row_inputs(plan, samples, family=self.family, model=self.base, device=self.device)

    def _logps(
        self, hidden: Tensor, head: Head, inputs: RowInputs, lengths: list[int], keep_bytes: int
    ) -> Sequence[Tensor]:
        return fused_linear_logprobs(
            hidden, head.weight, inputs.labels, bias=head.bias, rows=inputs.rows, logit_scale=head.logit_scale,
            softcap=head.softcap, keep_bytes=keep_bytes, backend=self.backend,
        ).split(lengths)  # fmt: skip

    def _outputs(
        self,
        hidden: Tensor,
        head: Head,
        inputs: RowInputs,
        lengths: list[int],
        keep_bytes: int,
        *,
        logsumexp_grad: bool,
        with_mean_logits: bool,
    ) -> Sequence[TokenOutputs]:
        return fused_linear_outputs(
            hidden, head.weight, inputs.labels, bias=head.bias, rows=inputs.rows, logit_scale=head.logit_scale,
            softcap=head.softcap, keep_bytes=keep_bytes, logsumexp_grad=logsumexp_grad,
            with_mean_logits=with_mean_logits, backend=self.backend,
        ).split(lengths)  # fmt: skip


def _on(device: torch.device, features: VideoFeatures) -> VideoFeatures:
    """Copies features to the device if they are on the host, as those read from disk are."""
    parts = dict(enumerate((features.features, *features.deepstack)))
    if features.features.device.type != "cpu":
        return features
    first, *deepstack = to_device(parts, device).values()
    return VideoFeatures(first, tuple(deepstack))


def _features_in_order(
    row: RowLayout, samples: Sequence[Sample], features: Sequence[VideoFeatures | None]
) -> list[VideoFeatures]:
    """Returns the features of a row's videos, in the order of their placeholders.

    Raises ValueError for a prompt that has more or fewer video tokens than its video has features.
    """
    parts: list[VideoFeatures] = []
    for group in row.groups:
        sample, feature = samples[group.sample], features[group.sample]
        if sample.video is None or feature is None:
            continue
        wanted = sample.prompt.count(sample.video.placeholder_id)
        if wanted != feature.features.shape[0]:
            raise ValueError(
                f"sample {sample.name!r}: its prompt has {wanted} video tokens, "
                f"its video {feature.features.shape[0]} features"
            )
        parts.append(feature)
    return parts


def _video(sample: Sample) -> VideoInputs:
    assert sample.video is not None
    return sample.video


@functools.cache
def _warn_once_that_nothing_is_shared(family: str, why: str) -> None:
    warnings.warn(
        f"{family} {why}: prefix sharing and packing are off, each response runs in a row of its own",
        stacklevel=3,
    )
