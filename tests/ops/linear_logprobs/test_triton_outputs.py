"""Triton: statistics, kept exponentials and recomputed logits in one call, against fp64 and beside eager."""

import pytest
import torch

from synpo_fast.ops.linear_logprobs import fused_linear_outputs
from tests.ops.linear_logprobs.problems import allowed, device_of, error, make_case
from tests.ops.linear_logprobs.test_outputs import leaves_of, logits_of, truth_of

OPTIONS = {"bias": True, "logit_scale": 1.5, "softcap": 6.0, "ignored": 0.3, "num_hidden": 11, "ignore_index": -1}
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


def eager_gradients(case, dtype, valid):
    leaves = leaves_of(case, dtype)
    logits, labels = logits_of(case, leaves)
    logps = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    loss = (logps * case.upstream.to(logps)[valid]).sum() + 1e-3 * logits.logsumexp(1).square().sum()
    return [grad.double() for grad in torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("options", [{"ignored": 0.3}, OPTIONS], ids=["plain", "all together"])
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float32, 13), (torch.float32, 40), (torch.float16, 40)],
    ids=["fewer rows than valid", "more rows than valid", "float16, which keeps none"],
)
def test_statistics_beside_kept_rows(dtype, options, kept):
    """13 rows end inside a row tile; the rows after them have their logits computed twice."""
    device = device_of("triton", dtype)
    case = make_case(45, 40, 130, **options).rounded(dtype)
    valid = case.labels != case.options["ignore_index"]
    assert 13 < valid.sum() < 40
    leaves = leaves_of(case, dtype, device)
    found = fused_linear_outputs(
        leaves["hidden"], leaves["weight"], case.labels.to(device), bias=leaves.get("bias"),
        rows=None if case.rows is None else case.rows.to(device),
        keep_bytes=kept * 130 * dtype.itemsize, backend="triton", **case.options,
    )  # fmt: skip
    (truth, margin), (eager, _) = truth_of(case, torch.float64), truth_of(case, dtype)
    for name, values in truth.items():
        ours = error(getattr(found, name).detach().double().cpu()[valid], values)
        assert ours <= allowed(error(eager[name].double(), values), dtype), f"{name}: error {ours:.3g}"
    clear = margin.abs() > 8 * torch.finfo(dtype).eps * truth["logsumexp"].abs()
    assert torch.equal(found.is_top1.cpu()[valid][clear], (margin > 0)[clear])

    loss = (found.logps * case.upstream.to(found.logps)).sum() + 1e-3 * found.logsumexp.square().sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    trues, peers = eager_gradients(case, torch.float64, valid), eager_gradients(case, dtype, valid)
    for name, grad, true, peer in zip(leaves, grads, trues, peers, strict=True):
        ours, theirs = error(grad.double().cpu(), true), error(peer, true)
        assert ours <= allowed(theirs, dtype), f"{name}: error {ours:.3g}, eager {theirs:.3g}"


@both_dtypes
@pytest.mark.parametrize("num_labels", [0, 6])
def test_statistics_where_all_labels_are_ignored(dtype, num_labels):
    device = device_of("triton", dtype)
    hidden = torch.randn(num_labels, 8, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(20, 8, dtype=dtype, device=device, requires_grad=True)
    found = fused_linear_outputs(hidden, weight, torch.full((num_labels,), -100, device=device), backend="triton")
    for values in found[:5]:
        assert values.shape == (num_labels,) and not values.any()
    (found.logps.sum() + found.logsumexp.sum()).backward()
    assert not hidden.grad.any() and not weight.grad.any()


@both_dtypes
def test_the_head_alone_with_some_rows_kept(dtype):
    """Without a direction the kept rows store their exponentials all the same, and the others store none."""
    device = device_of("triton", dtype)
    case = make_case(45, 24, 90, ignored=0.3, keep_bytes=13 * 90 * dtype.itemsize).rounded(dtype)
    valid = case.labels != -100
    leaves = leaves_of(case, dtype, device)
    leaves["hidden"].requires_grad_(False)
    found = fused_linear_outputs(
        leaves["hidden"], leaves["weight"], case.labels.to(device), backend="triton", **case.options
    )
    (found.logps * case.upstream.to(found.logps)).sum().backward()

    def eager(dtype):
        leaves = leaves_of(case, dtype)
        logits, labels = logits_of(case, leaves)
        logps = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
        return torch.autograd.grad((logps * case.upstream.to(logps)[valid]).sum(), leaves["weight"])[0].double()

    true = eager(torch.float64)
    assert error(leaves["weight"].grad.double().cpu(), true) <= allowed(error(eager(dtype), true), dtype)
