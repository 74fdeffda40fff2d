"""Values and gradients of fused_linear_logprobs, every backend against fp64 and beside eager."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synpo_fast import fused_linear_logprobs
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

every_backend = pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=NAMES)

SHAPES = {
    "one row, one feature, two words": {"num_labels": 1, "dim": 1, "vocabulary": 2},
    "one word: every log-prob is 0": {"num_labels": 5, "dim": 8, "vocabulary": 1},
    "nothing a multiple of anything": {"num_labels": 37, "dim": 29, "vocabulary": 101},
    "rows on 16-byte boundaries": {"num_labels": 33, "dim": 24, "vocabulary": 97},
    "several tiles in each direction": {"num_labels": 70, "dim": 64, "vocabulary": 300},
}
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 4.0},
    "ignored": {"ignored": 0.4},
    "repeated rows": {"num_hidden": 9},
    "all together": {
        "bias": True, "logit_scale": 1.5, "softcap": 6.0, "ignored": 0.3, "num_hidden": 11, "ignore_index": -1,
    },
}  # fmt: skip


@every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, dtype, shape):
    assert_as_good_as_eager(make_case(**SHAPES[shape]), backend, dtype)


@every_backend
@pytest.mark.parametrize("options", OPTIONS)
def test_options(backend, dtype, options):
    assert_as_good_as_eager(make_case(45, 40, 130, **OPTIONS[options]), backend, dtype)


@every_backend
@pytest.mark.parametrize("spread", [30.0, 1e3, 1e4])
def test_large_logits(backend, dtype, spread):
    """The maximum moves by thousands between tiles: earlier sums must follow it, and nothing may overflow."""
    case = make_case(40, 48, 200, spread=spread)
    if dtype == torch.float16 and spread == 1e4:
        case.weight *= 0.5  # the largest product stays inside fp16, where eager's logits would be infinite
    assert_as_good_as_eager(case, backend, dtype)


@every_backend
def test_rising_maximum(backend, dtype):
    """Logits that grow by 1,000 over the vocabulary: each tile overtakes all before it."""
    case = make_case(20, 8, 257, spread=1.0)
    case.hidden[:, 0] = 1.0
    case.weight[:, 0] = torch.linspace(-500, 500, 257, dtype=torch.float64)
    assert_as_good_as_eager(case, backend, dtype)


@every_backend
def test_confident_targets_keep_their_gradient(backend, dtype):
    """Margin over 17 nats: 1 - p is below fp32's rounding of 1, where a subtraction from 1 would leave nothing."""
    case = make_case(24, 16, 90, spread=0.5)
    case.weight[case.labels] = 0
    case.weight[:, 0] = 0
    case.hidden[:, 0] = 1.0
    case.labels[:] = 7
    case.weight[7] = 0
    case.weight[7, 0] = 24.0
    fused = assert_as_good_as_eager(case, backend, dtype)
    if dtype == torch.float16:
        return  # 1e-9 is 0 in fp16, so no gradient in fp16 can show it
    truth = run_eager(case.rounded(dtype), torch.float64)
    assert truth.logps.max() > -1e-7, "the case must be a confident one"
    if backend != "reference":
        assert error(fused.logps, truth.logps) < 1e-2
        assert error(fused.grads["hidden"], truth.grads["hidden"]) < 2e-2


def confident_case(margin: float):
    """A head of the usual size, and hidden states that point to the label: logits lead by about `margin`."""
    case = make_case(24, 64, 400)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(24, 64, generator=generator, dtype=torch.float64)
    case.weight = torch.randn(400, 64, generator=generator, dtype=torch.float64) * 0.02
    toward = case.weight[case.labels]
    case.hidden = toward * (margin / toward.square().sum(1, keepdim=True)) + noise * 0.6
    return case


@pytest.mark.parametrize("backend", ["chunked", "native", "triton"])
@pytest.mark.parametrize("margin", [21.0, 24.0, 27.0])
def test_fp16_directions_of_confident_tokens_survive_until_the_loss_scale(backend, margin):
    """1 - p is 1e-5 to 1e-7 and the head's entries 0.02: what multiplies a coefficient is far below fp16's smallest number."""
    case = confident_case(margin).rounded(torch.float16)
    truth = run_eager(case, torch.float64)
    case.upstream = case.upstream * 2.0**16
    eager, fused = run_eager(case, torch.float16), run_fused(case, backend, torch.float16)
    true = truth.grads["hidden"] * 2.0**16
    ours, theirs = error(fused.grads["hidden"], true), error(eager.grads["hidden"], true)
    assert ours <= allowed(theirs, torch.float16), f"error {ours:.3g}, eager {theirs:.3g}"


@every_backend
def test_logps_of_a_tie_at_the_top(backend, dtype):
    """All logits equal: log-prob is exactly -log V, and no side of the maximum is favoured."""
    device = device_of(backend, dtype)
    logps = fused_linear_logprobs(
        torch.zeros(3, 8, dtype=dtype, device=device), torch.ones(50, 8, dtype=dtype, device=device),
        torch.tensor([0, 25, 49], device=device), backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(logps.cpu(), torch.full((3,), -torch.tensor(50.0).log().item()))


@every_backend
def test_all_rows_ignored_and_no_rows(backend, dtype):
    device = device_of(backend, dtype)
    for num_labels in (0, 6):
        hidden = torch.randn(num_labels, 8, dtype=dtype, device=device, requires_grad=True)
        weight = torch.randn(20, 8, dtype=dtype, device=device, requires_grad=True)
        bias = torch.randn(20, dtype=dtype, device=device, requires_grad=True)
        labels = torch.full((num_labels,), -100, device=device)
        logps = fused_linear_logprobs(hidden, weight, labels, bias=bias, backend=backend)
        logps.sum().backward()
        assert logps.shape == labels.shape and (logps == 0).all()
        for leaf in (hidden, weight, bias):
            assert leaf.grad is not None and (leaf.grad == 0).all()


@every_backend
def test_ignored_rows_may_hold_anything(backend, dtype):
    """Padding rows are often garbage: NaN in one of them must reach nothing."""
    case = make_case(30, 16, 60, ignored=0.5)
    clean = run_fused(case, backend, dtype)
    case.hidden[case.labels == -100] = float("nan")
    dirty = run_fused(case, backend, dtype)
    assert torch.equal(clean.logps, dirty.logps)
    assert (dirty.logps[case.labels == -100] == 0).all()
    for name, grad in clean.grads.items():
        assert torch.equal(grad, dirty.grads[name]), name


@every_backend
def test_non_contiguous_inputs_of_more_dimensions(backend, dtype):
    device = device_of(backend, dtype)
    hidden = torch.randn(6, 4, 20, dtype=dtype, device=device).transpose(0, 1)[:, :, ::2]
    weight = torch.randn(10, 33, dtype=dtype, device=device).t()
    labels = torch.randint(33, (6, 4), device=device).t()
    found = fused_linear_logprobs(hidden, weight, labels, backend=backend)
    plain = fused_linear_logprobs(hidden.contiguous(), weight.contiguous(), labels.contiguous(), backend=backend)
    assert found.shape == (4, 6)
    torch.testing.assert_close(found, plain)


@every_backend
def test_strided_vectors(backend, dtype):
    """Labels, rows and bias that are columns of something else, or one number expanded."""
    device = device_of(backend, dtype)
    hidden = torch.randn(6, 12, dtype=dtype, device=device)
    weight = torch.randn(33, 12, dtype=dtype, device=device)
    labels, rows = (torch.randint(n, (6, 2), device=device)[:, 0] for n in (33, 6))
    bias = torch.randn(33, 2, dtype=dtype, device=device)[:, 1]
    for y in (labels, torch.tensor(3, device=device).expand(6)):
        found = fused_linear_logprobs(hidden, weight, y, bias=bias, rows=rows, backend=backend)
        plain = fused_linear_logprobs(hidden, weight, y.clone(), bias=bias.clone(), rows=rows.clone(), backend=backend)
        torch.testing.assert_close(found, plain, rtol=0, atol=0)


@every_backend
def test_memory_that_was_not_written_is_not_read(backend, dtype, monkeypatch):
    """torch.empty filled with NaN, with and without rows on 16-byte boundaries: nothing of it reaches a result."""
    cases = [make_case(40, dim, 70, ignored=0.4) for dim in (15, 16)]
    clean = [run_fused(case, backend, dtype) for case in cases]
    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poisoned(make):
        return lambda *args, **kwargs: poison(make(*args, **kwargs))

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    dirty = [run_fused(case, backend, dtype) for case in cases]
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one.logps, other.logps)
        for name, grad in one.grads.items():
            assert torch.equal(grad, other.grads[name]), name


@every_backend
def test_garbage_gradients_and_rows_of_ignored_positions(backend, dtype):
    """A loss may send NaN to ignored positions, and their row index may be anything."""
    device = device_of(backend, dtype)
    hidden = torch.randn(5, 16, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(40, 16, dtype=dtype, device=device, requires_grad=True)
    labels = torch.tensor([3, -100, 7, -100], device=device)
    rows = torch.tensor([0, -1, 4, 99], device=device)
    logps = fused_linear_logprobs(hidden, weight, labels, rows=rows, backend=backend)
    logps.backward(torch.tensor([1.0, float("nan"), -2.0, float("inf")], device=device))
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    assert (hidden.grad[1:4] == 0).all()


@every_backend
def test_gradients_only_where_required(backend, dtype):
    """A frozen head, a frozen trunk, a trainable bias alone: the others get None, not zeros."""
    device = device_of(backend, dtype)
    case = make_case(21, 16, 50, bias=True, ignored=0.2)
    full = run_fused(case, backend, dtype)
    for wanted in (["hidden"], ["weight"], ["bias"], ["hidden", "bias"]):
        leaves = {name: getattr(case, name).to(device, dtype, copy=True) for name in ("hidden", "weight", "bias")}
        for name in wanted:
            leaves[name].requires_grad_()
        logps = fused_linear_logprobs(
            leaves["hidden"], leaves["weight"], case.labels.to(device), bias=leaves["bias"], backend=backend
        )
        (logps * case.upstream.to(logps)).sum().backward()
        for name, leaf in leaves.items():
            if name in wanted:
                torch.testing.assert_close(leaf.grad.double().cpu(), full.grads[name], rtol=1e-5, atol=1e-6)
            else:
                assert leaf.grad is None


@every_backend
def test_autocast_casts_as_a_linear_layer_does(backend, dtype):
    if dtype != torch.float32 or (backend == "triton" and not torch.cuda.is_available()):
        pytest.skip("autocast starts from fp32, and here casts to a dtype that the interpreter cannot compute")
    device = device_of(backend, dtype)
    hidden = torch.randn(12, 16, device=device, requires_grad=True)
    weight = torch.randn(40, 16, device=device, requires_grad=True)
    labels = torch.randint(40, (12,), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = fused_linear_logprobs(hidden, weight, labels, backend=backend)
    inside.sum().backward()
    outside = fused_linear_logprobs(hidden.bfloat16(), weight.bfloat16(), labels, backend=backend)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside)
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@every_backend
def test_minus_infinite_bias_masks_words(backend, dtype):
    """Some trainers mask vocabulary entries with -inf: they get probability 0 and no NaN, even as a label."""
    device = device_of(backend, dtype)
    hidden = torch.randn(9, 16, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(40, 16, dtype=dtype, device=device)
    bias = torch.zeros(40, dtype=dtype, device=device)
    bias[10:30] = float("-inf")
    labels = torch.randint(10, (9,), device=device)
    labels[0] = 20
    logps = fused_linear_logprobs(hidden, weight, labels, bias=bias, backend=backend)
    assert logps[0] == float("-inf")
    kept = torch.cat([weight[:10], weight[30:]])
    expected = fused_linear_logprobs(hidden[1:], kept, labels[1:], backend="reference")
    torch.testing.assert_close(logps[1:], expected, rtol=1e-2, atol=3e-2 if dtype != torch.float32 else 1e-5)
    logps[1:].sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_reference_and_chunked_keep_fp64():
    case = make_case(20, 12, 40, ignored=0.3, num_hidden=7, bias=True, softcap=5.0)
    truth = run_eager(case, torch.float64)
    for backend in ("reference", "chunked"):
        found = run_fused(case, backend, torch.float64)
        assert error(found.logps, truth.logps) < 1e-14
        for name, grad in truth.grads.items():
            assert error(found.grads[name], grad) < 1e-13, name


def test_gradcheck():
    hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, -100, 0, 10, 3, 7])
    rows = torch.tensor([0, 1, 2, 2, 4, 0])

    def logps(hidden, weight, bias):
        return fused_linear_logprobs(
            hidden, weight, labels, bias=bias, rows=rows, logit_scale=0.8, softcap=3.0, backend="chunked"
        )

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias))


def test_more_rows_than_a_block():
    """2,500 rows cross the native backend's row blocks; 700 x 9,000 cross the tiles of the chunked one."""
    for backend, shape in (("native", (2500, 8, 600)), ("native", (600, 8, 9001)), ("chunked", (2100, 8, 9000))):
        assert_as_good_as_eager(make_case(*shape, ignored=0.05), backend, torch.float32)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads(num_threads):
    """Rows are shared out among threads; more of them than cores makes a race likelier to show."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            assert_as_good_as_eager(make_case(300, 24, 1500, ignored=0.1, softcap=20.0, bias=True), "native", dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["chunked", "native", "triton"])
@settings(max_examples=30)
@given(data=st.data())
def test_any_shape_and_options(backend, data):
    draw = data.draw
    dtypes = [torch.float32, torch.float16] if backend == "triton" else [torch.float32, torch.bfloat16, torch.float16]
    case = make_case(
        num_labels=draw(st.integers(1, 40)),
        dim=draw(st.integers(1, 40)),
        vocabulary=draw(st.integers(1, 150)),
        num_hidden=draw(st.none() | st.integers(1, 12)),
        ignored=draw(st.sampled_from([0.0, 0.3, 0.9])),
        bias=draw(st.booleans()),
        spread=draw(st.sampled_from([0.1, 2.0, 8.0])),
        seed=draw(st.integers(0, 10**6)),
        ignore_index=draw(st.sampled_from([-100, -1])),
        softcap=draw(st.none() | st.sampled_from([2.0, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.3, -1.0])),
    )
    dtype = draw(st.sampled_from(dtypes))
    case = case.rounded(dtype)
    truth, found = run_eager(case, torch.float64), run_fused(case, backend, dtype)
    # A drawn problem can be so small that eager happens to be exact, so the bar here is the dtype's own rounding.
    slack = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    assert (found.logps <= 0).all()
    torch.testing.assert_close(found.logps, truth.logps, rtol=slack, atol=slack)
    for name, grad in truth.grads.items():
        scale = max(1.0, grad.abs().max().item())
        torch.testing.assert_close(found.grads[name], grad, rtol=slack, atol=slack * scale)


def test_coefficients_below_fp16_reach_the_head():
    """Coefficients of 1e-9 are 0 in fp16: the head's gradient is computed from normalised ones and scaled in fp32."""
    from synpo_fast.ops.linear_logprobs import backends
    from synpo_fast.ops.linear_logprobs.problem import Wanted, make_problem

    case = make_case(16, 16, 40).rounded(torch.float16)
    expected = run_eager(case, torch.float64).grads["weight"]
    for backend in ("chunked", "native", "triton"):
        device = device_of(backend, torch.float16)
        problem = make_problem(
            case.hidden.to(device, torch.float16), case.weight.to(device, torch.float16), case.labels.to(device),
            bias=None, rows=None, logit_scale=1.0, softcap=None, ignore_index=-100,
        )  # fmt: skip
        tiny = (case.upstream * 2.0**-8).float().to(device)  # results stay normal in fp16, c * (1 - p) often does not
        for keep_rows in (0, 16) if backend == "native" else (0,):  # the others keep none in fp16
            computed = backends.forward(problem, Wanted(True, keep_rows), backend)
            _, grad, _ = backends.backward(problem, tiny, computed, (False, True, False), backend)
            assert error(grad.double().cpu() * 2.0**8, expected) < 5e-3, (backend, keep_rows)


def test_chunked_tiles_on_a_gpu_grow_with_the_bound():
    """In fp32 at the largest head: few tiles, since each reads W twice, within 5 % of full fp32 logits."""
    from synpo_fast.ops.linear_logprobs.chunked import rows_per_tile

    rows, vocabulary = 4096, 152064
    tile = rows_per_tile(rows, vocabulary, torch.float32, "cuda")
    assert -(-rows // tile) == 21 and tile * vocabulary * 4 <= 0.05 * rows * vocabulary * 4
    assert rows_per_tile(rows, vocabulary, torch.bfloat16, "cuda") * vocabulary * 6 <= 0.05 * rows * vocabulary * 4
    assert rows_per_tile(64, vocabulary, torch.float32, "cuda") == 64  # few rows: one tile of at most 64 MiB
    assert rows_per_tile(rows, vocabulary, torch.float32, "cpu") * vocabulary * 4 <= 64 * 2**20
