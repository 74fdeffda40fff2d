"""Counts the FLOPs of a call, including attention on CPUs, which torch's counter omits.

Attention is counted as torch counts it on GPUs: every query with every key it is given, masked or not. The forward is two such
products, the backward five.

The counter cannot see matrix products inside our own kernels or flash attention. `visible_products` replaces them by versions in
plain torch that do the same work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from synpo_fast.models.attention import SEGMENTS, VARLEN
from synpo_fast.models.policy import Policy
from synpo_fast.models.vision_attention import FLASH_ATTENTION_2, set_vision_attention

# Attention implementations that the counter cannot see -> those that do the same work in plain torch.
PLAIN: dict[str | None, str] = {VARLEN: SEGMENTS, FLASH_ATTENTION_2: "sdpa"}


@functools.cache
def _register_cpu_attention() -> None:
    aten = torch.ops.aten

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
    def forward(query, key, value, *_, out_shape=None, **__) -> int:
        return sdpa_flop_count(query, key, value)

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
    def backward(grad_out, query, key, value, *_, out_shape=None, **__) -> int:
        return sdpa_backward_flop_count(grad_out, query, key, value)


def count_flops(call: Callable[[], Any]) -> int:
    """The FLOPs of one call, by operator. Make the call once before, so that the counter knows lazily loaded operators."""
    _register_cpu_attention()
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@contextmanager
def visible_products(policies: Sequence[Policy]) -> Iterator[None]:
    """Switches policies on a GPU to the chunked head and to attention in plain torch, and switches them back at the end."""
    on_gpu = [policy for policy in policies if policy.device.type == "cuda"]
    before = [(policy.backend, policy.attn_implementation, policy.vision_attn_implementation) for policy in on_gpu]
    try:
        for policy, (_, language, vision) in zip(on_gpu, before, strict=True):
            _use(policy, "chunked", PLAIN.get(language, language), PLAIN.get(vision, vision))
        yield
    finally:
        for policy, was in zip(on_gpu, before, strict=True):
            _use(policy, *was)


def _use(policy: Policy, backend: str | None, attention: str, vision: str | None) -> None:
    policy.backend, policy.attn_implementation = backend, attention
    if vision is not None:
        dtype = policy.base.get_input_embeddings().weight.dtype
        policy.vision_attn_implementation = set_vision_attention(
            policy.family, policy.base, vision, dtype=dtype, device=policy.device
        )
    language_model: Any = policy.family.language_model(policy.base)
    language_model.config._attn_implementation = attention
