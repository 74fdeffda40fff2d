"""Counted FLOPs of a call, attention on CPUs included, which torch's counter leaves out.

Attention is counted as torch counts it on GPUs: every query with every key it is given, masked or not; a backward pass is
five such products against the forward's two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


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
