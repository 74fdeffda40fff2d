"""Samples for the model tests, and their truth: each response run alone, with materialised logits and plain attention."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from synpo_fast.data import Pair
from synpo_fast.models import Policy, Sample
from synpo_fast.scoring import encode_pairs

VIDEO_FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "video_llama_3")
FAMILIES = (*VIDEO_FAMILIES, "text")


def some_pairs(family: str) -> list[Pair]:
    """Two videos of different length and size and a text pair; responses of different length, one of a single letter."""
    g = torch.Generator().manual_seed(0)

    def video(frames: int, height: int, width: int) -> Tensor | None:
        if family == "text":
            return None
        return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=g)

    return [
        Pair("What moves?", "A red ball rolls left.", "A dog.", video=video(4, 40, 56), id="a"),
        Pair(
            "Describe it in detail.",
            "x",
            "Two green squares fall, then a circle turns.",
            video=video(2, 56, 40),
            id="b",
        ),
        Pair("Say something.", "Yes, gladly.", "No.", id="text"),
    ]


def encoded(policy: Policy, pairs: list[Pair]) -> list[Sample]:
    return encode_pairs(policy, pairs).samples


@contextmanager
def plain_attention(policy: Policy) -> Iterator[None]:
    """transformers' own causal attention; held over the backward too, which may run layers again."""
    config = policy.family.language_model(policy.base).config
    was = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = was


def alone(policy: Policy, sample: Sample, response: int) -> Tensor:
    """Log-probs of one response: [prompt | response] as one causal sequence, softmax over materialised logits."""
    family, base = policy.family, policy.base
    answer = sample.responses[response]
    tokens = torch.tensor([*sample.prompt, *answer])
    embeddings = base.get_input_embeddings()(tokens)
    extra = {}
    if sample.video is not None:
        (features,) = family.encode_videos(base, [sample.video])
        mask = tokens == sample.video.placeholder_id
        embeddings = embeddings.masked_scatter(mask[:, None], features.features)
        extra = family.language_kwargs(mask.nonzero()[:, 0], [features])
    prompt = family.position_ids(base, torch.tensor(sample.prompt), sample.video)
    rest = prompt[..., -1:] + 1 + torch.arange(len(answer))
    with plain_attention(policy):
        hidden = family.language_model(base)(
            inputs_embeds=embeddings[None],
            position_ids=torch.cat([prompt, rest], -1).unsqueeze(-2),
            use_cache=False,
            **extra,
        ).last_hidden_state[0]
    logits = base.get_output_embeddings()(hidden[len(sample.prompt) - 1 : -1])
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad and p.grad is not None}
