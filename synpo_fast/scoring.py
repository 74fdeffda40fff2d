"""Encodes pairs as tokens and pixels, and scores them: token log-probs of their responses."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synpo_fast.data.encoded import EncodedPair, PairTooLong
from synpo_fast.data.pair import LABELS, Pair
from synpo_fast.data.pair_frames import pair_frames
from synpo_fast.data.text_markers import marked_pairs, special_tokens
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.errors import UserError
from synpo_fast.models.families.registry import Family, VideoInputs
from synpo_fast.models.families.video_frames import VideoProcessing
from synpo_fast.models.policy import Policy, Sample

DEFAULT_SAMPLING = FrameSampling(fps=0.5, min_frames=8, max_frames=16)  # the setting with which SynPO was trained


@dataclass(frozen=True, eq=False)
class PairEncoder:
    """Turns pairs into tokens and pixels. It holds the parts of a policy that this needs, but no weights, and can be pickled.

    max_tokens: the maximum number of tokens of the prompt and its longest response together. with_ground_truth: encode a pair's
    ground truth, if it has one, as a further response. bound_name: the name of the option max_tokens, for messages. labelled: the
    loss reads each response by itself (kto), so a comparison becomes two labelled responses. chosen_only: the loss reads only the
    better response of each comparison (sft), so responses that are never better are left out.
    """

    family: Family
    config: Any
    tokenizer: Any
    processing: VideoProcessing | None = None
    max_tokens: int | None = None
    with_ground_truth: bool = False
    bound_name: str = "max_tokens"
    labelled: bool = False
    chosen_only: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token, which must close every response")

    @classmethod
    def of(
        cls,
        policy: Policy,
        *,
        max_tokens: int | None = None,
        with_ground_truth: bool = False,
        bound_name: str = "max_tokens",
        labelled: bool = False,
        chosen_only: bool = False,
    ) -> "PairEncoder":
        """Makes the encoder of a policy. bound_name: the caller's name for max_tokens, for messages."""
        parts = (policy.family, policy.base.config, policy.tokenizer, policy.processing)
        return cls(*parts, max_tokens, with_ground_truth, bound_name, labelled, chosen_only)

    def __call__(self, pair: Pair, frames: Tensor | None, seconds_per_frame: float | None = None) -> EncodedPair:
        """Encodes a pair. frames: uint8 [T, H, W, 3], None for a text pair; seconds_per_frame: the time between two of them.

        Nothing is ever cut, because a cut response or video would be a different one. Raises PairTooLong for a pair that is too
        long, and ValueError for one whose responses have the same tokens or whose texts contain special tokens.
        """
        return self.with_video(pair, None if frames is None else self.video_inputs(pair, frames, seconds_per_frame))

    def with_video(self, pair: Pair, video: VideoInputs | None) -> EncodedPair:
        """Encodes a pair whose video has already been prepared; None for a text pair. Raises the same errors as __call__."""
        self._check_texts(pair)
        prompt = self.family.prompt_ids(self.tokenizer, pair.prompt, None if video is None else video.token_ids)
        texts, comparisons = _responses_of(pair)
        labels: tuple[tuple[int, bool], ...] = ((0, pair.loss == LABELS[True]),) if pair.has_label else ()
        if self.chosen_only and comparisons:
            read = sorted({better for better, _ in comparisons})
            texts = [texts[index] for index in read]
            labels, comparisons = tuple((read.index(better), True) for better, _ in comparisons), ()
        ground_truth = mismatched = None
        if self.with_ground_truth and pair.ground_truth is not None:
            ground_truth = len(texts)
            texts.append(pair.ground_truth)
        responses = tuple(self._response_ids(text) for text in texts)
        if any(responses[better] == responses[worse] for better, worse in comparisons):
            which = "two of its responses" if pair.responses else "chosen and rejected"
            raise ValueError(f"pair {pair.id!r}: {which} are the same tokens, so there is nothing to prefer")
        self._check_length(pair, len(prompt), max(len(response) for response in responses))
        if pair.mismatched is not None:  # belongs to another pair, so its length is no reason to refuse this one
            mismatched = len(responses)
            responses += (self._response_ids(pair.mismatched),)
        if self.labelled:
            labels += tuple(label for better, worse in comparisons for label in ((better, True), (worse, False)))
            comparisons = ()
        sample = Sample(tuple(prompt), responses, video, pair.id)
        return EncodedPair(
            sample, pair.id, comparisons, ground_truth=ground_truth, labels=labels, mismatched=mismatched
        )

    def video_facts(self) -> str:
        """Returns a digest of all that a video's pixels and tokens depend on besides its frames.

        These are the family, its video settings, the vocabulary, and the result for a small example video. The example stands for
        the config, whose own text changes when a model is saved.
        """
        facts: list[Any] = [self.family.name, sorted(self.tokenizer.get_vocab().items())]
        if self.family.placeholder_token:
            processing = self.processing or self.family.processing(self.config)
            frames = torch.arange(12 * 50 * 70 * 3).remainder(251).to(torch.uint8).view(12, 50, 70, 3)
            video = self.family.video_inputs(
                self.config,
                self.tokenizer,
                frames,
                seconds_per_frame=1.37,
                processing=replace(processing, max_tokens=None),
            )
            assert video.frames is not None
            shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in sorted(video.tensors.items())}
            made = [video.token_ids, video.placeholder_id, video.seconds_per_grid, shapes, list(video.frames.shape)]
            facts += [repr(processing), repr(video.recipe), made]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def video_inputs(self, pair: Pair, frames: Tensor, seconds_per_frame: float | None) -> VideoInputs:
        """Prepares a pair's frames for the tower and the prompt. An error names the pair."""
        try:
            return self.family.video_inputs(
                self.config, self.tokenizer, frames, seconds_per_frame=seconds_per_frame, processing=self.processing
            )
        except ValueError as error:
            raise ValueError(f"pair {pair.id!r}: {error}") from error

    def _response_ids(self, text: str) -> tuple[int, ...]:
        return (*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id)

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        return special_tokens(self.tokenizer, self.family.placeholder_token, *self.family.video_markers)

    def _check_texts(self, pair: Pair) -> None:
        """Raises UserError for a text with a special token: the tokenizer would read it as EOS or as a video's placeholder."""
        for _, what in marked_pairs([pair], self._special_tokens):
            raise UserError(
                f"pair {pair.id!r} has {what}, a special token of the model's tokenizer. "
                "It would not be read as text: remove it"
            )

    def _check_length(self, pair: Pair, prompt: int, response: int) -> None:
        if self.max_tokens is not None and prompt + response > self.max_tokens:
            raise PairTooLong(
                f"pair {pair.id!r} needs {prompt + response} tokens ({prompt} of them for prompt and video), "
                f"more than {self.bound_name}={self.max_tokens}; raise it, sample fewer frames, or drop such pairs"
            )


def _responses_of(pair: Pair) -> tuple[list[str], tuple[tuple[int, int], ...]]:
    """The texts that the model runs, and the (better, worse) indices of those that the loss compares."""
    if pair.loss != "preference":
        return [pair.rejected if pair.loss == LABELS[False] else pair.chosen], ()
    if not pair.responses:
        return [pair.chosen, pair.rejected], ((0, 1),)
    if not pair.comparisons:
        raise ValueError(f"pair {pair.id!r}: all its responses have the same score, so there is nothing to prefer")
    return [response.text for response in pair.responses], pair.comparisons


@dataclass(frozen=True)
class EncodedPairs:
    """The result of encode_pairs: samples[i] has the responses of pair kept[i], chosen and rejected or all of `responses`.

    dropped: pairs too long."""

    samples: list[Sample]
    kept: list[int]
    dropped: list[int]


def encode_pairs(
    policy: Policy,
    pairs: Sequence[Pair],
    *,
    video_root: str | Path | None = None,
    sampling: FrameSampling = DEFAULT_SAMPLING,
    max_tokens: int | None = None,
    drop_too_long: bool = False,
) -> EncodedPairs:
    """Encodes pairs as tokens and pixels for a policy.

    Args:
        video_root: the folder that video paths are relative to and may not leave.
        sampling: the frames to take from a video.
        max_tokens: maximum number of tokens of a prompt and its longest response together.
        drop_too_long: skip pairs above max_tokens and list them in `dropped`; otherwise they raise PairTooLong.
    """
    for index, pair in enumerate(pairs):
        if not isinstance(pair, Pair):
            raise UserError(f"pairs[{index}]: expected Pair, got {type(pair).__name__}")
    encoder = PairEncoder.of(policy, max_tokens=max_tokens)
    samples, kept, dropped = [], [], []
    for index, pair in enumerate(pairs):
        try:
            encoded = encoder(pair, *pair_frames(pair, sampling, video_root=video_root))
        except PairTooLong:
            if not drop_too_long:
                raise
            dropped.append(index)
            continue
        samples.append(encoded.sample)
        kept.append(index)
    return EncodedPairs(samples, kept, dropped)


def encode_pair(
    policy: Policy,
    pair: Pair,
    *,
    video_root: str | Path | None = None,
    sampling: FrameSampling = DEFAULT_SAMPLING,
) -> Sample:
    """Encodes one pair as a sample: the prompt with its video's placeholders, and the responses closed by EOS."""
    return PairEncoder.of(policy)(pair, *pair_frames(pair, sampling, video_root=video_root)).sample


def score_pairs(
    policy: Policy,
    pairs: Sequence[Pair],
    *,
    video_root: str | Path | None = None,
    sampling: FrameSampling = DEFAULT_SAMPLING,
    share_prefix: bool = True,
    pack: bool = True,
) -> list[tuple[Tensor, ...]]:
    """Returns (chosen_logps, rejected_logps) for each pair: 1-D fp32, one value per response token, EOS included, with autograd.

    Args:
        policy: from load_policy.
        video_root: the folder that video paths are relative to and may not leave; None: paths are used unchanged.
        sampling: the frames to take from videos given by path or as clips: by default one every two seconds, at least 8
            and at most 16.
        share_prefix: run a pair's video and prompt once for all its responses.
        pack: put several pairs into one row.

    An "sft" pair has no rejected response: its rejected_logps is empty. A row of one labelled response has only chosen_logps
    or only rejected_logps. A pair with several `responses` has one tensor for each, in their order.
    Raises ValueError for a text that contains a special token of the model's tokenizer, as training does.
    """
    encoded = encode_pairs(policy, pairs, video_root=video_root, sampling=sampling)
    scored: list[tuple[Tensor, ...]] = []
    for pair, logps in zip(pairs, policy(encoded.samples, share_prefix=share_prefix, pack=pack), strict=True):
        every = tuple(logps) if len(logps) > 1 else (logps[0], logps[0].new_empty(0))
        scored.append(every[::-1] if pair.loss == LABELS[False] else every)
    return scored
