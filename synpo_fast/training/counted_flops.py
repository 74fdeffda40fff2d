"""Counted FLOPs of a call, attention on CPUs included, which torch's counter leaves out.

Attention is counted as torch counts it on GPUs: every query with every key it is given, masked or not; a backward pass is
five such products against the forward's two.

A product inside a kernel of our own, or of flash attention, is seen by no counter. `visible_products` puts their twins in
plain torch in their place, which do the same work.
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
    """FLOPs of one call, by operator. Call it once before, so that lazily loaded operators are known to the counter."""
    _register_cpu_attention()
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@contextmanager
def visible_products(policies: Sequence[Policy]) -> Iterator[None]:
    """Policies on a GPU: the chunked head for the Triton one, attention segment by segment for flash attention."""
    on_gpu = [policy for policy in policies if policy.device.type == "cuda"]
    before = [(policy.backend, policy.attn_implementation) for policy in on_gpu]
    try:
        for policy in on_gpu:
            _use(policy, "chunked", SEGMENTS if policy.attn_implementation == VARLEN else policy.attn_implementation)
        yield
    finally:
        for policy, was in zip(on_gpu, before, strict=True):
            _use(policy, *was)


def _use(policy: Policy, backend: str | None, attention: str) -> None:
    policy.backend, policy.attn_implementation = backend, attention
    language_model: Any = policy.family.language_model(policy.base)
    language_model.config._attn_implementation = attention
