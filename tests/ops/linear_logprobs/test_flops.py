"""Counted work: 4NDV with a frozen head, 6NDV with a trained one, 2NDV without a gradient, nothing for ignored rows."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from synpo_fast import fused_linear_logprobs
from synpo_fast.ops import native_library
from synpo_fast.ops.linear_logprobs import choose_backend
from tests.ops.linear_logprobs.problems import make_case

N, D, V = 60, 32, 90


def count_flops(
    backend: str,
    *,
    requires: tuple[str, ...],
    ignored: float = 0.0,
    backward: bool = True,
    keep_bytes: int | None = None,
) -> tuple[int, int]:
    """FLOPs and valid rows of one step."""
    case = make_case(N, D, V, ignored=ignored)
    hidden = case.hidden.float().requires_grad_("hidden" in requires)
    weight = case.weight.float().requires_grad_("weight" in requires)
    choose_backend(hidden, backend)  # loads the library: a counter made before that does not know its operators
    with FlopCounterMode(display=False) as counter:
        logps = fused_linear_logprobs(hidden, weight, case.labels, backend=backend, keep_bytes=keep_bytes)
        if backward:
            logps.sum().backward()
    return counter.get_total_flops(), int((case.labels != -100).sum())


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("requires", "backward", "products"),
    [(("hidden",), True, 4), ((), False, 2), (("hidden", "weight"), True, 6), (("weight",), True, 4)],
    ids=["frozen head", "no gradient", "trainable head", "head alone"],
)
def test_flops_follow_valid_rows(backend, ignored, requires, backward, products):
    if backend == "native" and not native_library.is_available():
        pytest.skip(str(native_library.reason_unavailable()))
    flops, valid = count_flops(backend, requires=requires, ignored=ignored, backward=backward)
    assert flops == products * valid * D * V


def test_no_grad_costs_no_more_than_the_logits():
    case = make_case(N, D, V)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fused_linear_logprobs(case.hidden.float().requires_grad_(), case.weight.float(), case.labels, backend="chunked")
    assert counter.get_total_flops() == 2 * N * D * V


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize(("kept", "products"), [(0, 8), (N // 2, 7), (N, 6)])
def test_rows_beyond_the_memory_bound_are_computed_again(backend, kept, products):
    if backend == "native" and not native_library.is_available():
        pytest.skip(str(native_library.reason_unavailable()))
    flops, valid = count_flops(backend, requires=("hidden", "weight"), keep_bytes=kept * V * 4 + V)
    assert flops == products * valid * D * V
