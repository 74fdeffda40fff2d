"""Greedy captions from a policy, in plain torch, to show what the model generates during training.

The prompt runs once and fills a key-value cache. Then the most likely token is appended, one at a time. Positions continue
from the prompt's last one, as in training. Each call handles one sample, so nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from synpo_fast.models.attention import caps_scores
from synpo_fast.models.policy import Policy, Sample
from synpo_fast.models.rope_length import fresh_frequencies


@torch.no_grad()
def greedy_tokens(
    policy: Policy, sample: Sample, *, max_new_tokens: int, continue_after_eos: bool = False
) -> list[int]:
    """Generates the tokens of a response, without EOS.

    continue_after_eos: computes on after EOS up to max_new_tokens, so that all ranks of a sharded model call it equally often.
    """
    from transformers import DynamicCache

    eos = policy.tokenizer.eos_token_id
    language_model = policy.family.language_model(policy.base)
    was_training = policy.training
    policy.eval()
    try:
        with _plain_attention(language_model), fresh_frequencies(language_model):
            embeddings, positions, extra = _prompt_inputs(policy, sample)
            cache: Any = DynamicCache()
            tokens: list[int] = []
            ended = False
            for _ in range(max_new_tokens):
                output = language_model(
                    inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True, **extra
                )
                token = int(_logits(policy, output.last_hidden_state[:, -1]).argmax())
                ended = ended or token == eos
                if ended and not continue_after_eos:
                    break
                if not ended:
                    tokens.append(token)
                embeddings = policy.base.get_input_embeddings()(torch.tensor([[token]], device=policy.device))
                positions = positions[..., -1:] + 1
                extra = {}
            return tokens
    finally:
        policy.train(was_training)


def greedy_text(policy: Policy, sample: Sample, *, max_new_tokens: int, continue_after_eos: bool = False) -> str:
    """Generates a response as text, without special tokens; see greedy_tokens."""
    tokens = greedy_tokens(policy, sample, max_new_tokens=max_new_tokens, continue_after_eos=continue_after_eos)
    return policy.tokenizer.decode(tokens, skip_special_tokens=True)


def _prompt_inputs(policy: Policy, sample: Sample) -> tuple[Tensor, Tensor, dict[str, Any]]:
    device = policy.device
    tokens = torch.tensor(sample.prompt, device=device)
    embeddings = policy.base.get_input_embeddings()(tokens)
    positions = policy.family.position_ids(policy.base, torch.tensor(sample.prompt), sample.video)
    extra: dict[str, Any] = {}
    if sample.video is not None:
        (features,) = policy.encode_videos([sample])
        assert features is not None
        where = [i for i, token in enumerate(sample.prompt) if token == sample.video.placeholder_id]
        placeholders = torch.tensor(where, device=device)
        embeddings = embeddings.index_copy(0, placeholders, features.features.to(embeddings))
        extra = policy.family.language_kwargs(placeholders, [features])
    return embeddings[None], positions.to(device).unsqueeze(-2), extra


def _logits(policy: Policy, hidden: Tensor) -> Tensor:
    return policy.head().logits(hidden)


@contextmanager
def _plain_attention(language_model: Any) -> Iterator[None]:
    """Switches to sdpa or eager inside the context: the attention of packed rows does not support a key-value cache."""
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = "eager" if caps_scores(config) else "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before
