"""fused_linear_outputs: logsumexp, entropy, top-1 and the sum of squared probabilities, every backend against fp64 and eager."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from synpo_fast import fused_linear_logprobs
from synpo_fast.ops.linear_logprobs import fused_linear_outputs
from tests.ops.linear_logprobs.problems import BACKEND_DTYPES, NAMES, allowed, device_of, error, make_case

every_backend = pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=NAMES)
OPTIONS = {
    "plain": {},
    "ignored": {"ignored": 0.4},
    "repeated rows": {"num_hidden": 9},
    "all together": {
        "bias": True, "logit_scale": 1.5, "softcap": 6.0, "ignored": 0.3, "num_hidden": 11, "ignore_index": -1,
    },
    "large logits": {"spread": 300.0},
}  # fmt: skip


def logits_of(case, leaves):
    """Logits and labels of the valid positions, in the leaves' dtype and then at least fp32."""
    hidden = leaves["hidden"] if case.rows is None else leaves["hidden"][case.rows]
    valid = case.labels != case.options["ignore_index"]
    raw = F.linear(hidden[valid], leaves["weight"], leaves.get("bias"))
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32)) * case.options.get("logit_scale", 1.0)
    softcap = case.options.get("softcap")
    return (raw if softcap is None else softcap * torch.tanh(raw / softcap)), case.labels[valid]


def leaves_of(case, dtype, device="cpu"):
    tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    return {n: t.to(device, dtype, copy=True).requires_grad_() for n, t in tensors.items() if t is not None}


def truth_of(case, dtype):
    logits, labels = logits_of(case, leaves_of(case, dtype))
    probs = logits.softmax(1)
    return {
        "logsumexp": logits.logsumexp(1),
        "entropy": -torch.where(probs > 0, probs * probs.log(), 0.0).sum(1),
        "log_sum_sq_probs": (2 * logits.log_softmax(1)).logsumexp(1),
    }, (logits.gather(1, labels[:, None]).squeeze(1) - logits.scatter(1, labels[:, None], -math.inf).amax(1))


def outputs_of(case, backend, dtype, leaves=None):
    device = device_of(backend, dtype)
    leaves = leaves or leaves_of(case, dtype, device)
    rows = None if case.rows is None else case.rows.to(device)
    return fused_linear_outputs(
        leaves["hidden"], leaves["weight"], case.labels.to(device), bias=leaves.get("bias"), rows=rows,
        backend=backend, **case.options,
    )  # fmt: skip


@every_backend
@pytest.mark.parametrize("options", OPTIONS)
def test_statistics_against_fp64(backend, dtype, options):
    case = make_case(45, 40, 130, **OPTIONS[options]).rounded(dtype)
    valid = case.labels != case.options["ignore_index"]
    found = outputs_of(case, backend, dtype)
    (truth, margin), (eager, _) = truth_of(case, torch.float64), truth_of(case, dtype)
    for name, values in truth.items():
        ours = getattr(found, name).double().cpu()
        assert (ours[~valid] == 0).all()
        mistake, peers = error(ours[valid], values), error(eager[name].double(), values)
        assert mistake <= allowed(peers, dtype), f"{name}: error {mistake:.3g}, eager {peers:.3g}"
    # A logit rounds to the input's dtype in the products of bf16: nearer than that the order may change.
    clear = margin.abs() > 8 * torch.finfo(dtype).eps * truth["logsumexp"].abs()
    assert clear.sum() > 20
    top1 = found.is_top1.cpu()
    assert top1.dtype == torch.bool and not top1[~valid].any()
    assert torch.equal(top1[valid][clear], (margin > 0)[clear])


@every_backend
def test_log_probs_are_those_of_the_plain_op(backend, dtype):
    case = make_case(30, 24, 90, ignored=0.2).rounded(dtype)
    leaves = leaves_of(case, dtype, device_of(backend, dtype))
    plain = fused_linear_logprobs(
        leaves["hidden"], leaves["weight"], case.labels.to(leaves["hidden"].device), backend=backend, ignore_index=-100
    )
    assert torch.equal(outputs_of(case, backend, dtype, leaves).logps, plain)


@every_backend
def test_certain_and_uniform_distributions(backend, dtype):
    """Entropy 0 and log V, and labels that are the top and that are not, where exp underflows."""
    case = make_case(4, 16, 80)
    case.hidden[:] = 0.0
    case.hidden[:2, 0] = 1.0
    case.weight[:, 0] = 0.0
    case.weight[5, 0] = 500.0
    case.labels = torch.tensor([5, 6, 7, 79])
    found = outputs_of(case, backend, dtype)
    torch.testing.assert_close(found.entropy.float().cpu(), torch.tensor([0.0, 0.0, math.log(80), math.log(80)]))
    torch.testing.assert_close(
        found.log_sum_sq_probs.float().cpu(), torch.tensor([0.0, 0.0, -math.log(80), -math.log(80)])
    )
    torch.testing.assert_close(found.logsumexp.float().cpu(), torch.tensor([500.0, 500.0, math.log(80), math.log(80)]))
    assert found.is_top1.tolist() == [True, False, True, True]  # equal logits all count as the top


@every_backend
@pytest.mark.parametrize("options", ["plain", "all together"])
@pytest.mark.parametrize("with_logps", [True, False], ids=["z-loss beside log-probs", "alone"])
def test_gradient_through_logsumexp(backend, dtype, options, with_logps):
    """Alone, the gradient of the head's row y is a small difference of two large terms, which 16 bits round."""
    if not with_logps and dtype != torch.float32:
        pytest.skip("16-bit gradients of the head are tested at the size that a z-loss has")
    case = make_case(45, 40, 130, **OPTIONS[options]).rounded(dtype)
    valid = case.labels != case.options["ignore_index"]
    weights = torch.linspace(-1, 2, 45, dtype=torch.float64)

    def gradients(leaves, logps, logsumexp, scale):
        loss = (logsumexp.square() * weights.to(logsumexp)[scale]).sum()
        loss = 1e-3 * loss + (logps * case.upstream.to(logps)[scale]).sum() if with_logps else loss
        return [grad.double().cpu() for grad in torch.autograd.grad(loss, list(leaves.values()))]

    def eager(dtype):
        leaves = leaves_of(case, dtype)
        logits, labels = logits_of(case, leaves)
        logps = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
        return gradients(leaves, logps, logits.logsumexp(1), valid)

    leaves = leaves_of(case, dtype, device_of(backend, dtype))
    found = outputs_of(case, backend, dtype, leaves)
    ours = gradients(leaves, found.logps, found.logsumexp, slice(None))
    # The direction is subtracted from W[y], which is several times larger than the difference: in fp32 some more rounding.
    slack = 2e-6 if dtype == torch.float32 else 0.0
    for name, mine, peer, true in zip(leaves, ours, eager(dtype), eager(torch.float64), strict=True):
        mistake, peers = error(mine, true), error(peer, true)
        assert mistake <= allowed(peers, dtype) + slack, f"{name}: error {mistake:.3g}, eager {peers:.3g}"


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_statistics_cost_no_products(backend):
    case = make_case(60, 32, 90)
    leaves = leaves_of(case, torch.float32, device_of(backend, torch.float32))
    with FlopCounterMode(display=False) as counter:
        found = outputs_of(case, backend, torch.float32, leaves)
        (found.logps.sum() + found.logsumexp.square().sum()).backward()
    assert counter.get_total_flops() == 6 * 60 * 32 * 90


def test_gradcheck_in_fp64():
    case = make_case(7, 5, 11, ignored=0.2, bias=True, softcap=3.0)
    inputs = [tensor.clone().requires_grad_() for tensor in (case.hidden, case.weight, case.bias)]

    def function(hidden, weight, bias):
        found = fused_linear_outputs(hidden, weight, case.labels, bias=bias, backend="chunked", softcap=3.0)
        return found.logps, found.logsumexp

    assert torch.autograd.gradcheck(function, inputs)


def test_in_a_compiled_function():
    torch.compiler.reset()
    case = make_case(20, 16, 60, ignored=0.3)
    hidden, weight = case.hidden.float().requires_grad_(), case.weight.float().requires_grad_()

    def loss(hidden, weight):
        found = fused_linear_outputs(hidden, weight, case.labels)
        return found.logps.sum() + found.logsumexp.square().mean(), found.entropy, found.is_top1

    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        total, entropy, top1 = function(hidden, weight)
        grads.append([*torch.autograd.grad(total, [hidden, weight]), entropy, top1])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


@every_backend
@pytest.mark.parametrize("options", ["plain", "ignored", "repeated rows"])
def test_mean_logits_and_their_gradient(backend, dtype, options):
    case = make_case(45, 40, 130, bias=True, logit_scale=0.7, **OPTIONS[options]).rounded(dtype)
    valid = case.labels != case.options["ignore_index"]
    weights = torch.linspace(-1, 2, 45, dtype=torch.float64)

    def of_logits(dtype):
        leaves = leaves_of(case, dtype)
        means = logits_of(case, leaves)[0].mean(1)
        grads = torch.autograd.grad((means * weights[valid].to(means)).sum(), list(leaves.values()))
        return [means.detach().double(), *(grad.double() for grad in grads)]

    device = device_of(backend, dtype)
    leaves = leaves_of(case, dtype, device)
    rows = None if case.rows is None else case.rows.to(device)
    means = fused_linear_outputs(
        leaves["hidden"], leaves["weight"], case.labels.to(device), bias=leaves["bias"], rows=rows, backend=backend,
        with_mean_logits=True, **case.options,
    ).mean_logits  # fmt: skip
    grads = torch.autograd.grad((means * weights.to(means)).sum(), list(leaves.values()))
    assert means.dtype == torch.float32 and not means[~valid.to(device)].any()
    found = [means[valid.to(device)], *grads]
    for mine, peer, true in zip(found, of_logits(dtype), of_logits(torch.float64), strict=True):
        assert error(mine.detach().double().cpu(), true) <= allowed(error(peer, true), dtype)


def test_mean_logits_stay_fp32_under_autocast():
    case = make_case(20, 16, 60)
    hidden, weight = case.hidden.bfloat16(), case.weight.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused_linear_outputs(hidden.float(), weight.float(), case.labels, with_mean_logits=True)
    torch.testing.assert_close(
        found.mean_logits.double(), (hidden.double() @ weight.double().t()).mean(1), rtol=1e-4, atol=1e-5
    )


def test_bias_gradient_of_a_z_loss_over_frequent_words():
    """Thousands of terms of a few labels: their sum must not stagnate in 16 bits."""
    case = make_case(2048, 32, 60, bias=True).rounded(torch.bfloat16)
    case.labels %= 20

    def gradients(dtype, fused):
        leaves = leaves_of(case, dtype)
        if fused:
            found = fused_linear_outputs(leaves["hidden"], leaves["weight"], case.labels, bias=leaves["bias"])
            loss = (1e-2 * found.logsumexp.square() - found.logps).mean()
        else:
            logits, labels = logits_of(case, leaves)
            loss = (1e-2 * logits.logsumexp(1).square()).mean() + F.cross_entropy(logits, labels)
        return [grad.double() for grad in torch.autograd.grad(loss, [leaves["weight"], leaves["bias"]])]

    truth, eager = gradients(torch.float64, False), gradients(torch.bfloat16, False)
    for mine, peer, true in zip(gradients(torch.bfloat16, True), eager, truth, strict=True):
        # The head's own gradient is rounded to bf16 before the targets' terms are added: two roundings more.
        assert error(mine, true) <= allowed(error(peer, true), torch.bfloat16) + 4e-3


def test_no_gradient_through_logsumexp_unless_wanted():
    case = make_case(12, 8, 30)
    hidden, weight = case.hidden.bfloat16().requires_grad_(), case.weight.bfloat16()
    found = fused_linear_outputs(hidden, weight, case.labels, logsumexp_grad=False)
    assert found.logps.requires_grad
    assert not any(each.requires_grad for each in (found.logsumexp, found.entropy, found.log_sum_sq_probs))
    saved = found.logps.grad_fn.saved_tensors if hasattr(found.logps.grad_fn, "saved_tensors") else ()
    assert all(tensor is None or tensor.data_ptr() != weight.data_ptr() for tensor in saved)
