"""Evaluates a trained model on unseen videos: greedy captions, their accuracy, and the NLL of the true captions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from synpo_fast.data.pair import Pair
from synpo_fast.data.pair_frames import pair_frames
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.demo.accuracy import Accuracy
from synpo_fast.demo.captions import PROMPT
from synpo_fast.demo.dataset import Clip
from synpo_fast.demo.world import FPS, FRAMES_PER_EVENT
from synpo_fast.models.generate import greedy_text
from synpo_fast.models.loading import load_policy
from synpo_fast.models.lora import add_lora, load_adapter
from synpo_fast.models.policy import Policy, Sample
from synpo_fast.scoring import PairEncoder

SAMPLING = FrameSampling(fps=FPS, min_frames=FRAMES_PER_EVENT, max_frames=3 * FRAMES_PER_EVENT)
VIDEO_BACKEND = "pyav"  # frames of 64 x 64 pixels are too small for a GPU's VP9 decoder
MAX_NEW_TOKENS = 48
NLL_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """A model's results. captions: one per video. nll: mean over the tokens of the true captions, end of text included."""

    captions: list[str]
    accuracy: Accuracy
    nll: float


def load_trained(model: Path, adapter: Path | None, *, lora_r: int, lora_alpha: int) -> Policy:
    """The model in fp32, on a GPU if there is one, with its adapter if one is given."""
    policy = load_policy(
        str(model), dtype=torch.float32, attn_implementation="sdpa"
    )  # flash attention does not support fp32
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft calls it
            add_lora(policy, r=lora_r, alpha=lora_alpha, dropout=0.0)
        load_adapter(policy, adapter)
        policy.model.to(policy.device)
    return policy.eval()


def encode_clips(policy: Policy, clips: Sequence[Clip], root: Path) -> list[Sample]:
    """Decodes the videos and encodes each with its true caption as the only response."""
    encoder = PairEncoder.of(policy)
    samples = []
    for clip in clips:
        pair = Pair(PROMPT, clip.truth, "", video=clip.video, id=clip.video, loss="sft")
        samples.append(encoder(pair, *pair_frames(pair, SAMPLING, video_root=root, backend=VIDEO_BACKEND)).sample)
    return samples


def evaluate(policy: Policy, clips: Sequence[Clip], samples: Sequence[Sample]) -> Evaluation:
    """Captions all clips with the policy, and rates the captions. samples: the encoded clips."""
    captions = []
    accuracy = Accuracy()
    for clip, sample in zip(clips, samples, strict=True):
        captions.append(greedy_text(policy, sample, max_new_tokens=MAX_NEW_TOKENS))
        accuracy.add(clip.scene, captions[-1])
    return Evaluation(captions, accuracy, truth_nll(policy, samples))


@torch.no_grad()
def truth_nll(policy: Policy, samples: Sequence[Sample]) -> float:
    """The mean NLL per token of the samples' responses, which are the true captions."""
    total, tokens = 0.0, 0
    for begin in range(0, len(samples), NLL_BATCH):
        for (logps,) in policy(samples[begin : begin + NLL_BATCH]):
            total -= float(logps.sum())
            tokens += len(logps)
    return total / tokens
