"""Gradients of a trained head from kept exponentials: for all rows, some and none, and memory that was not written."""

import warnings

import pytest
import torch

from synpo_fast import fused_linear_logprobs
from synpo_fast.ops.linear_logprobs import host
from tests.ops.linear_logprobs.problems import (
    BACKEND_DTYPES,
    NAMES,
    allowed,
    assert_as_good_as_eager,
    device_of,
    error,
    make_case,
    poison,
    run_eager,
    run_fused,
)

KEPT = [(pair, name) for pair, name in zip(BACKEND_DTYPES, NAMES, strict=True) if pair[0] != "reference"]
keeping_backends = pytest.mark.parametrize(
    ("backend", "dtype"), [pair for pair, _ in KEPT], ids=[name for _, name in KEPT]
)
OPTIONS = {
    "plain": {},
    "repeated rows": {"num_hidden": 11},
    "bias, scale, softcap": {"bias": True, "logit_scale": 1.5, "softcap": 6.0},
}


@keeping_backends
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dim", [15, 16], ids=["odd rows", "rows on 16-byte boundaries"])
@pytest.mark.parametrize("kept", [0, 13, 45], ids=["none", "13 rows", "all rows"])
def test_gradients_from_kept_exponentials(backend, dtype, options, dim, kept, monkeypatch):
    vocabulary = 9001 if backend == "native" else 90  # several tiles
    element_size = 4 if dtype == torch.float32 or (backend == "native" and dtype == torch.float16) else 2
    case = make_case(45, dim, vocabulary, ignored=0.4, keep_bytes=kept * vocabulary * element_size, **OPTIONS[options])
    empty = torch.empty

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    assert_as_good_as_eager(case, backend, dtype)


@keeping_backends
def test_the_head_alone(backend, dtype):
    device = device_of(backend, dtype)
    case = make_case(45, 24, 90, ignored=0.3, bias=True).rounded(dtype)
    truth, eager = run_eager(case, torch.float64), run_eager(case, dtype)
    weight = case.weight.to(device, dtype, copy=True).requires_grad_()
    logps = fused_linear_logprobs(
        case.hidden.to(device, dtype), weight, case.labels.to(device), bias=case.bias.to(device, dtype), backend=backend
    )
    (logps * case.upstream.to(logps)).sum().backward()
    ours, theirs = (
        error(weight.grad.double().cpu(), truth.grads["weight"]),
        error(eager.grads["weight"], truth.grads["weight"]),
    )
    assert ours <= allowed(theirs, dtype)


@pytest.mark.parametrize("backend", ["chunked", "native", "triton"])
def test_gradients_may_be_asked_for_twice(backend):
    device = device_of(backend, torch.float32)
    case = make_case(20, 16, 60)
    hidden, weight = (t.float().to(device).requires_grad_() for t in (case.hidden, case.weight))
    logps = fused_linear_logprobs(hidden, weight, case.labels.to(device), backend=backend)
    first = torch.autograd.grad(logps.sum(), [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(2 * logps.sum(), [hidden, weight])
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(2 * one, two)


@pytest.mark.parametrize("value", [-1, True, 1.5])
def test_a_bound_that_is_no_number_of_bytes(value):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with pytest.raises(ValueError, match="keep_bytes must be a number of bytes"):
        fused_linear_logprobs(hidden, weight, torch.tensor([0, 1, 2]), keep_bytes=value)


@pytest.mark.parametrize("backend", ["chunked", "native", "triton"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_confident_tokens_in_fp16_with_a_loss_scale(backend, trained):
    """1 - p of 1e-6 times W is below fp16's smallest number: the loss scale must arrive before anything is rounded to fp16."""
    case = make_case(32, 16, 60, spread=0.3).rounded(torch.float16)
    case.hidden[:, 0] = torch.linspace(1.6, 2.0, 32, dtype=torch.float64)
    case.weight[:, 0] = 0.0
    case.weight[7, 0] = 8.0
    case.labels[:] = 7
    case.upstream = torch.full((32,), 2.0**14, dtype=torch.float64)
    case = case.rounded(torch.float16)
    truth, eager, fused = (
        run_eager(case, torch.float64),
        run_eager(case, torch.float16),
        run_fused(case, backend, torch.float16),
    )
    names = ("hidden", "weight") if trained else ("hidden",)
    for name in names:
        ours, theirs = error(fused.grads[name], truth.grads[name]), error(eager.grads[name], truth.grads[name])
        assert ours <= allowed(theirs, torch.float16), f"{name}: error {ours:.3g}, eager {theirs:.3g}"


def test_a_bound_that_is_exceeded_is_said_once():
    host._warn_once_that_logits_are_computed_again.cache_clear()
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 4, -100])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_linear_logprobs(hidden, weight, labels, keep_bytes=5 * 5 * 4, backend="chunked")  # the valid rows fit
        fused_linear_logprobs(hidden, weight, labels, keep_bytes=0, backend="chunked")  # asked for
    for keep_bytes in (4 * 5 * 4, 1):
        host._warn_once_that_logits_are_computed_again.cache_clear()
        with pytest.warns(UserWarning, match="exceed keep_bytes"):
            fused_linear_logprobs(hidden, weight, labels, keep_bytes=keep_bytes, backend="chunked")


@pytest.mark.parametrize("backend", ["chunked", "native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_certain_tokens_with_large_coefficients(backend, dtype):
    """Every log-prob rounds to 0, so the largest c (1 - p) is 0, too: nothing may be divided by it."""
    device = device_of(backend, dtype)
    case = make_case(4, 16, 60, spread=0.1)
    case.hidden[:] = 0.0
    case.hidden[:, 0] = 16.0
    case.weight[7, 0] = 10.0
    case.labels[:] = 7
    weight, hidden = (t.to(device, dtype).requires_grad_() for t in (case.weight, case.hidden))
    logps = fused_linear_logprobs(hidden, weight, case.labels.to(device), backend=backend, keep_bytes=0)
    assert (logps == 0).all()
    (1024.0 * logps.sum()).backward()
    assert torch.isfinite(weight.grad).all() and torch.isfinite(hidden.grad).all()
