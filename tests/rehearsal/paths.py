"""The rehearsed paths: everything that training does with each family's model on a GPU, except the backward.

A path is a function that takes a prepared family and raises where a GPU run would. Pairs come from the loader, on the host, as in
training; everything from there to the loss happens on the device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoded import EncodedPair
from synpo_fast.data.loader import PairLoader
from synpo_fast.data.pair import Pair
from synpo_fast.losses import LOSSES
from synpo_fast.models import Policy, load_policy
from synpo_fast.models.families.registry import FAMILIES, VideoFeatures, VideoInputs
from synpo_fast.models.lora import add_lora
from synpo_fast.references import AdapterOff, FrozenCopy, Reference
from synpo_fast.scoring import DEFAULT_SAMPLING, PairEncoder
from synpo_fast.training.metrics import add_sums
from synpo_fast.training.pair_module import PairModule

# Places where the host may wait for the device on one path, as "file function: what", and how often. There are none.
ALLOWED: dict[str, int] = {}


@dataclass
class Rehearsed:
    """A family with an adapter on the device, and pairs on the host: two with videos of unequal size, one with only text."""

    policy: Policy
    pairs: list[EncodedPair]
    text: list[EncodedPair] = field(default_factory=list)


def prepare(family: str, dtype: torch.dtype | None = None) -> Rehearsed:
    """Loads a family with the defaults of a GPU; dtype None is bf16. Without peft the whole language model trains."""
    policy = load_policy(f"tiny:{family}", device="cuda", dtype=dtype, gradient_checkpointing=True)
    if importlib.util.find_spec("peft"):
        add_lora(policy, r=4, alpha=8, dropout=0.1)
    policy.train()
    pairs = list(_loaded(policy, _pairs(with_videos=family != "text")))
    return Rehearsed(policy, pairs, list(_loaded(policy, _pairs(with_videos=False))))


def _pairs(*, with_videos: bool) -> list[Pair]:
    def video(frames: int, height: int, width: int) -> Tensor | None:
        return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8) if with_videos else None

    return [
        Pair("What moves?", "A red ball rolls left.", "A dog.", video=video(4, 40, 56), id="a", ground_truth="A ball."),
        Pair("Describe it.", "x", "Two green squares fall.", video=video(3, 90, 61), id="b", ground_truth="Squares."),
        Pair("Say something.", "Yes, gladly.", "No.", id="text", ground_truth="Yes."),
    ]


def _loaded(policy: Policy, pairs: Sequence[Pair]) -> Iterator[EncodedPair]:
    encoder = PairEncoder.of(policy, with_ground_truth=True)
    with PairLoader(
        pairs, encoder, sampling=DEFAULT_SAMPLING, pairs_per_step=len(pairs), num_workers=0, shuffle=False
    ) as loader:
        for batch in loader.steps(0):
            assert not batch.bad, batch.bad
            yield from batch.pairs


def forward(family: Rehearsed, *, text: bool = False, **options: Any) -> None:
    pairs = family.text if text else family.pairs
    for responses in family.policy([pair.sample for pair in pairs], **options):
        assert all(logps.device.type == "cuda" and logps.dtype == torch.float32 for logps in responses)


class StoredFeatures:
    """A feature cache whose files have already been read to the host."""

    def __init__(self) -> None:
        self.kept: dict[int, VideoFeatures] = {}

    def get(self, video: VideoInputs) -> VideoFeatures | None:
        return self.kept.get(id(video))

    def put(self, video: VideoInputs, features: VideoFeatures) -> None:
        on_host = [torch.zeros(part.shape, dtype=part.dtype) for part in (features.features, *features.deepstack)]
        self.kept[id(video)] = VideoFeatures(on_host[0], tuple(on_host[1:]))


def stored_features(family: Rehearsed) -> None:
    policy = family.policy
    policy.feature_store = StoredFeatures()
    try:
        forward(family)
        forward(family)
    finally:
        policy.feature_store = None


def loss(name: str, *, precomputed: bool = False, **options: Any) -> Callable[[Rehearsed], None]:
    """A path that runs two micro-batches through the PairModule, with its reference, and adds up their metrics."""

    def run(family: Rehearsed) -> None:
        config = TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", loss_type=name, **options)
        module = PairModule(family.policy, config)
        if config.needs_reference:
            module.reference = _HostReference() if precomputed else _reference(family.policy)
        sums: dict[str, Any] = {}
        for pairs in (family.pairs[:1], family.pairs[1:]):
            value, more = module(pairs, 0.5)
            assert value.device.type == "cuda" and value.requires_grad
            add_sums(sums, more)
        assert all(total.device.type == "cuda" for total in sums.values())

    return run


def _reference(policy: Policy) -> Reference:
    return AdapterOff(policy) if hasattr(policy.model, "disable_adapter") else FrozenCopy(policy)


class _HostReference:
    """A reference whose log-probs are on the host, like those of references.Precomputed."""

    same_tower: Policy | None = None

    def __call__(self, samples: Sequence[Any]) -> list[list[Tensor]]:
        return [[torch.zeros(len(response)) for response in sample.responses] for sample in samples]


PATHS: dict[str, Callable[[Rehearsed], None]] = {
    "shared prompts": lambda family: forward(family),
    "unshared prompts": lambda family: forward(family, share_prefix=False),
    "rows apart": lambda family: forward(family, pack=False),
    "text only": lambda family: forward(family, text=True),
    "text only, unshared": lambda family: forward(family, text=True, share_prefix=False),
    "stored features": stored_features,
    **{f"loss {name}": loss(name) for name in (*LOSSES, "sft")},
    "loss dpo, precomputed": loss("dpo", precomputed=True),
    "loss synpo, with an NLL": loss("synpo", auxiliary_nll=0.1, auxiliary_target="ground_truth"),
}
FAMILY_NAMES = tuple(FAMILIES)
