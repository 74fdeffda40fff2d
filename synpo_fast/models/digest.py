"""Content keys for stored results: SHA-256 digests of the weights and inputs that a result was computed from."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.models.families.registry import VideoInputs
from synpo_fast.models.policy import Policy, Sample


def weights_key(policy: Policy) -> str:
    """A digest of all weights and of the model's config. Reads every parameter once."""
    return _digest([policy.family.name, policy.base.config.to_json_string()], _named(policy.model))


def tower_key(policy: Policy) -> str:
    """A digest of all that a video's features depend on besides the video: tower, projector and config."""
    modules = policy.family.vision_modules(policy.base)
    tensors = [(f"{i}.{name}", tensor) for i, module in enumerate(modules) for name, tensor in _named(module)]
    return _digest([policy.family.name, policy.base.config.to_json_string()], tensors)


def video_key(video: VideoInputs) -> str:
    """The video's own key, or else a digest of the tower's input: frames, size, normalisation and packing included."""
    if video.key is not None:
        return video.key
    facts = [video.token_ids, video.placeholder_id, video.seconds_per_grid, repr(video.recipe)]
    frames = [] if video.frames is None else [("frames", video.frames)]
    return _digest(facts, [*sorted(video.tensors.items()), *frames])


def sample_key(sample: Sample) -> str:
    """A digest of all that a sample's log-probs depend on besides the weights."""
    return _digest([sample.prompt, sample.responses, None if sample.video is None else video_key(sample.video)], [])


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, sorted by name. Buffers outside the state_dict count too: results depend on rotary frequencies."""
    return sorted({**module.state_dict(), **dict(module.named_buffers())}.items())


def _digest(facts: Any, tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
