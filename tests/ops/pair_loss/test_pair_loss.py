"""synpo_pair_loss: each backend against the formulas in Python floats and against autograd in fp64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from synpo_fast.ops import native_library
from synpo_fast.ops.pair_loss import synpo_pair_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request) -> str:
    if request.param == "native" and (reason := native_library.reason_unavailable()) is not None:
        pytest.skip(reason)
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


def device_of(backend: str) -> str:
    return "cpu" if backend == "native" else DEVICE


def ragged(lengths: list[tuple[int, int]], scale: float = 1.0, gap: int = 0) -> tuple[torch.Tensor, ...]:
    """Flat log-probs, all chosen responses first; `gap` unused tokens stand between the halves."""
    chosen = torch.tensor([0, *(c for c, _ in lengths)]).cumsum(0)
    rejected = torch.tensor([int(chosen[-1]) + gap, *(r for _, r in lengths)]).cumsum(0)
    logps = -torch.rand(int(rejected[-1])).mul(scale)
    return logps, chosen, rejected


def truth(logps, chosen, rejected, mask, alpha=30.0, beta=0.2, link="sigmoid"):
    """Loss and gradient by fp64 autograd over the published formula."""
    lp = logps.double().cpu().requires_grad_()
    losses = []
    for i in range(chosen.shape[0] - 1):
        parts = []
        for offsets in (chosen, rejected):
            part = slice(int(offsets[i]), int(offsets[i + 1]))
            parts.append(lp[part] if mask is None else lp[part][mask[part].cpu()])
        G = [part.mean().exp() for part in parts]
        x = alpha * (G[0] - G[1])
        contrast = torch.sigmoid(x) if link == "sigmoid" else torch.nn.functional.logsigmoid(x)
        losses.append(-contrast - beta * parts[0].exp().mean())
    losses = torch.stack(losses)
    (grad,) = torch.autograd.grad(losses.sum(), lp)
    return losses.detach(), grad


def run(logps, chosen, rejected, backend, mask=None, **options):
    device = device_of(backend)
    lp = logps.to(device).requires_grad_()
    mask = None if mask is None else mask.to(device)
    out = synpo_pair_loss(lp, chosen.to(device), rejected.to(device), mask=mask, backend=backend, **options)
    out.losses.sum().backward()
    return out, lp.grad.cpu()


def test_a_case_by_hand(backend):
    """Two tokens chosen, one rejected, worked out in Python."""
    lp = [math.log(0.5), math.log(0.125), math.log(0.1)]
    out, grad = run(torch.tensor(lp), torch.tensor([0, 2]), torch.tensor([2, 3]), backend)
    G_chosen, G_rejected, A = 0.25, 0.1, 0.3125
    s = 1 / (1 + math.exp(-30 * (G_chosen - G_rejected)))
    assert out.losses.item() == pytest.approx(-s - 0.2 * A, rel=1e-6)
    assert out.chosen_geometric.item() == pytest.approx(G_chosen, rel=1e-6)
    assert out.rejected_geometric.item() == pytest.approx(G_rejected, rel=1e-6)
    assert out.chosen_arithmetic.item() == pytest.approx(A, rel=1e-6)
    expected = [
        -(30 * s * (1 - s) * G_chosen + 0.2 * 0.5) / 2,
        -(30 * s * (1 - s) * G_chosen + 0.2 * 0.125) / 2,
        30 * s * (1 - s) * G_rejected,
    ]
    assert grad.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("link", ["sigmoid", "logsigmoid"])
@pytest.mark.parametrize(
    "lengths",
    [[(1, 1)], [(3, 7), (1, 2), (40, 5)], [(1023, 1025), (1024, 1), (2500, 3)], [(2, 3)] * 300],
    ids=["one token each", "ragged", "around a block of 1,024", "many pairs"],
)
def test_against_autograd(backend, link, lengths):
    logps, chosen, rejected = ragged(lengths, scale=2.0, gap=3)
    out, grad = run(logps, chosen, rejected, backend, link=link, alpha=4.0, beta=0.7)
    losses, expected = truth(logps, chosen, rejected, None, alpha=4.0, beta=0.7, link=link)
    torch.testing.assert_close(out.losses.detach().cpu().double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-9)


def test_a_padded_batch_with_a_mask(backend):
    """[2P, T] as Liger lays it out: masked tokens neither count nor get a gradient, whatever they hold."""
    P, T = 5, 9
    logps = -torch.rand(2 * P, T)
    mask = torch.rand(2 * P, T) < 0.6
    mask[:, 4] = True
    logps[~mask] = 0.0
    chosen, rejected = torch.arange(P + 1) * T, P * T + torch.arange(P + 1) * T
    out, grad = run(logps.flatten(), chosen, rejected, backend, mask.flatten())
    losses, expected = truth(logps.flatten(), chosen, rejected, mask.flatten())
    torch.testing.assert_close(out.losses.detach().cpu().double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-8)
    assert (grad[~mask.flatten()] == 0).all()


def test_long_responses(backend):
    logps, chosen, rejected = ragged([(32_000, 31_999)], scale=0.2)
    out, grad = run(logps, chosen, rejected, backend)
    losses, expected = truth(logps, chosen, rejected, None)
    torch.testing.assert_close(out.losses.detach().cpu().double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("link", ["sigmoid", "logsigmoid"])
def test_extremes_stay_finite_and_right(backend, link):
    """Mean log-prob -50, certain tokens, a tie, and a contrast so settled that w is 1e-13."""
    for chosen_lp, rejected_lp in [(-50.0, -50.0), (-50.0, 0.0), (0.0, -50.0), (-1e-4, -30.0), (-0.7, -0.7)]:
        logps = torch.tensor([chosen_lp] * 3 + [rejected_lp] * 2)
        offsets = torch.tensor([0, 3]), torch.tensor([3, 5])
        out, grad = run(logps, *offsets, backend, link=link)
        losses, expected = truth(logps, *offsets, None, link=link)
        torch.testing.assert_close(out.losses.detach().cpu().double(), losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-30)


def test_settled_coefficients_are_not_flushed(backend):
    """G+ = 1, G- = 0.3: w = 7.6e-10. The released code's fp16 holds neither w nor alpha w G / T; fp32 holds both."""
    T = 300
    logps = torch.cat([torch.zeros(T), torch.full((T,), math.log(0.3))])
    _, grad = run(logps, torch.tensor([0, T]), torch.tensor([T, 2 * T]), backend, beta=0.0)
    s = 1 / (1 + math.exp(30 * 0.7))  # sigmoid(-x), exact where 1 - sigmoid(x) is rounded
    exact = 30 * s * (1 - s) * 0.3 / T
    assert exact == pytest.approx(2.27e-11, rel=0.01)
    assert grad[-1].item() == pytest.approx(exact, rel=1e-4)
    assert torch.tensor(exact).half().item() == 0.0
    assert (1 - torch.sigmoid(torch.tensor(21.0, dtype=torch.float16))).item() == 0.0


def test_empty_responses(backend):
    logps, chosen, rejected = ragged([(2, 3), (0, 4), (5, 1)])
    if backend == "triton":
        out, grad = run(logps, chosen, rejected, backend)
        assert out.num_empty.item() == 1 and out.losses[1] == 0
        assert (grad[int(rejected[1]) : int(rejected[2])] == 0).all()
        kept, _ = run(logps, chosen[:2], rejected[:2], backend)
        torch.testing.assert_close(out.losses[0], kept.losses[0])
        return
    with pytest.raises(ValueError, match="chosen response of pair 1 has no tokens"):
        run(logps, chosen, rejected, backend)
    logps, chosen, rejected = ragged([(2, 3), (1, 4), (5, 1)])
    mask = torch.ones(logps.shape[0], dtype=torch.bool)
    mask[int(rejected[2]) :] = False
    with pytest.raises(ValueError, match="rejected response of pair 2 has no tokens"):
        run(logps, chosen, rejected, backend, mask)


def test_each_pairs_gradient_is_its_own(backend):
    logps, chosen, rejected = ragged([(3, 2), (4, 5), (1, 1)])
    lp = logps.to(device_of(backend)).requires_grad_()
    out = synpo_pair_loss(lp, chosen.to(lp.device), rejected.to(lp.device), backend=backend)
    (out.losses * torch.tensor([1.0, 0.0, -2.0], device=lp.device)).sum().backward()
    _, expected = truth(logps, chosen, rejected, None)
    factor = torch.tensor([1.0] * 3 + [0.0] * 4 + [-2.0] + [1.0] * 2 + [0.0] * 5 + [-2.0])
    torch.testing.assert_close(lp.grad.cpu().double(), expected * factor, rtol=1e-4, atol=1e-9)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=8),
    scale=st.sampled_from([0.01, 1.0, 20.0]),
    alpha=st.sampled_from([0.5, 30.0]),
)
def test_backends_agree(lengths, scale, alpha):
    logps, chosen, rejected = ragged(lengths, scale)
    expected, expected_grad = run(logps, chosen, rejected, "reference", alpha=alpha)
    for backend in ["triton"] + (["native"] if native_library.is_available() else []):
        out, grad = run(logps, chosen, rejected, backend, alpha=alpha)
        torch.testing.assert_close(out.losses.cpu(), expected.losses.cpu(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-9)


def test_sixteen_bit_inputs_are_computed_in_fp32(backend):
    logps, chosen, rejected = ragged([(50, 60)])
    for dtype in (torch.float16, torch.bfloat16):
        out, grad = run(logps.to(dtype), chosen, rejected, backend)
        losses, _ = truth(logps.to(dtype).float(), chosen, rejected, None)
        assert out.losses.dtype == torch.float32 and grad.dtype == dtype
        torch.testing.assert_close(out.losses.detach().cpu().double(), losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": torch.zeros(2, 2)}, r"1-D floating tensor, got torch.float32 \[2, 2\]"),
        ({"chosen_offsets": torch.tensor([0, 5])}, r"chosen_offsets = \[0, 5\] must rise within \[0, 4\]"),
        ({"chosen_offsets": torch.tensor([2, 0])}, r"chosen_offsets = \[2, 0\]"),
        ({"rejected_offsets": torch.tensor([2, 3, 4])}, r"2 entries but rejected_offsets 3"),
        ({"rejected_offsets": torch.tensor([2.0, 4.0])}, r"rejected_offsets must be int64"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask must be bool \[4\]"),
        ({"rejected_offsets": torch.tensor([1, 3])}, r"chosen tokens \[0, 2\) and rejected tokens \[1, 3\) overlap"),
        ({"logps": torch.zeros(4).double(), "backend": "native"}, r"native.*float64"),
        ({"link": "tanh"}, r"link must be one of sigmoid, logsigmoid, got 'tanh'"),
        ({"alpha": 0.0}, r"alpha=0.0"),
        ({"beta": float("nan")}, r"beta=nan"),
        ({"backend": "cpp"}, r"reference, native, triton or None, got 'cpp'"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "logps": torch.zeros(4), "chosen_offsets": torch.tensor([0, 2]), "rejected_offsets": torch.tensor([2, 4])
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        synpo_pair_loss(**{**arguments, **change})


def test_fp64_and_second_derivatives():
    logps, chosen, rejected = ragged([(3, 2), (1, 4)])
    lp = logps.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: synpo_pair_loss(x, chosen, rejected, alpha=2.0).losses, (lp,))
    out = synpo_pair_loss(logps.requires_grad_(), chosen, rejected)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(out.losses.sum(), logps, create_graph=True)
