"""Counted work: 4NDV with a frozen head, 2NDV without a gradient, nothing for ignored rows; and the memory it takes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from synpo_fast import fused_linear_logprobs
from synpo_fast.ops import native_library
from synpo_fast.ops.linear_logprobs import choose_backend
from tests.ops.linear_logprobs.problems import make_case

N, D, V = 60, 32, 90


def count_flops(
    backend: str, *, requires: tuple[str, ...], ignored: float = 0.0, backward: bool = True
) -> tuple[int, int]:
    """FLOPs and valid rows of one step."""
    case = make_case(N, D, V, ignored=ignored)
    hidden = case.hidden.float().requires_grad_("hidden" in requires)
    weight = case.weight.float().requires_grad_("weight" in requires)
    choose_backend(hidden, backend)  # loads the library: a counter made before that does not know its operators
    with FlopCounterMode(display=False) as counter:
        logps = fused_linear_logprobs(hidden, weight, case.labels, backend=backend)
        if backward:
            logps.sum().backward()
    return counter.get_total_flops(), int((case.labels != -100).sum())


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("requires", "backward", "products"),
    [(("hidden",), True, 4), ((), False, 2), (("hidden", "weight"), True, 8), (("weight",), True, 6)],
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
