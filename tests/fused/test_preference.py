"""The fused losses: compared with eager autograd and with Liger's classes, their counted work, and their errors on misuse."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from synpo_fast import (
    FusedLinearDPOLoss,
    FusedLinearPreferenceLoss,
    FusedLinearSimPOLoss,
    FusedLinearSynPOLoss,
)
from synpo_fast.losses import AuxiliaryNLL, PairLogprobs, preference_loss
from synpo_fast.ops import native_library
from synpo_fast.ops.linear_logprobs import choose_backend
from tests.ops.linear_logprobs.problems import device_of, error

P, T, D, V = 3, 11, 16, 60
LOSSES = {
    "synpo": (FusedLinearSynPOLoss, {"alpha": 4.0}, {"alpha": 4.0}),
    "dpo": (FusedLinearDPOLoss, {"beta": 0.3}, {"beta": 0.3}),
    "simpo": (FusedLinearSimPOLoss, {"compute_nll_loss": False, "beta": 0.7}, {"beta": 0.7, "gamma": 0.5}),
    "orpo": (lambda **k: FusedLinearPreferenceLoss("orpo", **k), {"beta": 0.2}, {"beta": 0.2}),
    "cpo": (lambda **k: FusedLinearPreferenceLoss("cpo", **k), {"beta": 0.2}, {"beta": 0.2}),
}  # fmt: skip


def batch(dtype=torch.float32, device="cpu", bias=False, seed=0, pairs=P, valid=0.6):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * pairs, T, D, generator=g).to(device, dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=g) * 0.5).to(device, dtype).requires_grad_()
    target = torch.randint(V, (2 * pairs, T), generator=g)
    target[torch.rand(2 * pairs, T, generator=g) > valid] = -100
    target[:, 3] = 5  # no response is empty
    row = torch.randn(V, generator=g).to(device, dtype).requires_grad_() if bias else None
    return weight, hidden, target.to(device), row


def eager(name, options, weight, hidden, target, bias=None, reference=None, auxiliary=None):
    """The loss of materialised fp64 logits."""
    logps = eager_logps(weight, hidden, target, bias)
    mask = target != -100
    policy = PairLogprobs.from_padded(logps, mask)
    ref = None if reference is None else PairLogprobs.from_padded(eager_logps(*reference, target).detach(), mask)
    return preference_loss(name, policy, ref, auxiliary=auxiliary, **options)


def eager_logps(weight, hidden, target, bias=None):
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    logps = torch.log_softmax(logits, -1).gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(target != -100, logps, 0.0)


def grads_of(loss, *leaves):
    return [g.double().cpu() for g in torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])]


@pytest.fixture(params=["chunked", "native", "triton"])
def backend(request):
    device_of(request.param, torch.float32)
    return request.param


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("head", ["frozen", "all kept", "some kept", "none kept"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_against_eager(backend, name, head, bias):
    device = device_of(backend, torch.float32)
    build, ours, theirs = LOSSES[name]
    weight, hidden, target, row = batch(device=device, bias=bias)
    keep_bytes = {"some kept": V * 4 * 2 * T, "none kept": 0}.get(head)
    module = build(backend=backend, keep_bytes=keep_bytes, **ours)
    reference = None
    if name == "dpo":
        reference = (weight.detach() + 0.1, hidden.detach() * 0.9)
    ref_arguments = {} if reference is None else {"ref_weight": reference[0], "ref_input": reference[1]}
    leaves = [hidden, weight, row]
    if head == "frozen":
        weight.requires_grad_(False)
        if row is not None:
            row.requires_grad_(False)
        leaves = [hidden]
    expected = eager(name, theirs, weight, hidden, target, row, reference)
    loss, outputs = module(weight, hidden, target, row, **ref_arguments)
    torch.testing.assert_close(loss.double(), expected.losses.mean(), rtol=1e-5, atol=1e-6)
    for found, true in zip(grads_of(loss, *leaves), grads_of(expected.losses.mean(), *leaves), strict=True):
        assert error(found, true) < 2e-5
    chosen, rejected, _, _, nll, chosen_rewards, rejected_rewards = outputs
    shown_nll = torch.zeros(()) if module.like_liger else expected.metrics["nll_loss"]
    for found, true in [
        (chosen, expected.chosen_logps), (rejected, expected.rejected_logps), (nll, shown_nll),
        (chosen_rewards, expected.chosen_rewards), (rejected_rewards, expected.rejected_rewards),
    ]:  # fmt: skip
        assert not found.requires_grad
        torch.testing.assert_close(found.double(), true.double(), rtol=1e-4, atol=1e-5)
    assert set(module.last_output.metrics) == set(expected.metrics)
    for metric, true in expected.metrics.items():
        torch.testing.assert_close(module.last_output.metrics[metric].double(), true.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_heads_beside_eager(backend, dtype):
    """Trainable head, some exponentials kept: no worse than eager in the same dtype, against fp64."""
    device = device_of(backend, dtype)
    weight, hidden, target, _ = batch(dtype, device)
    truth = grads_of(eager("synpo", {}, weight, hidden, target).losses.mean(), hidden, weight)
    low = weight.detach().requires_grad_(), hidden.detach().requires_grad_()
    logits = F.linear(low[1], low[0]).float()
    logps = torch.where(
        target != -100, torch.log_softmax(logits, -1).gather(-1, target.clamp(min=0)[..., None]).squeeze(-1), 0.0
    )
    peer = preference_loss("synpo", PairLogprobs.from_padded(logps, target != -100)).losses.mean()
    peers = grads_of(peer, low[1], low[0])
    module = FusedLinearSynPOLoss(backend=backend, keep_bytes=V * 4 * 2 * T)
    loss, _ = module(weight, hidden, target)
    for found, other, true in zip(grads_of(loss, hidden, weight), peers, truth, strict=True):
        assert error(found, true) <= 1.25 * error(other, true) + 5e-3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sigmoid", {"beta": 0.3}),
        ("dpo,bco_pair,sft", {"beta": 0.3, "loss_weights": (0.8, 0.2, 1.0)}),
        ("sigmoid, simpo", {"loss_weights": (0.5, 2.0)}),
    ],
)
def test_names_of_sums(name, options):
    weight, hidden, target, _ = batch()
    reference = weight.detach() * 0.9, hidden.detach() * 1.1
    expected = eager(name, options, weight, hidden, target, reference=reference).losses.mean()
    module = FusedLinearPreferenceLoss(name, **options)
    loss, _ = module(weight, hidden, target, ref_weight=reference[0], ref_input=reference[1])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for found, true in zip(grads_of(loss, hidden, weight), grads_of(expected, hidden, weight), strict=True):
        assert error(found, true) < 1e-5
    assert copy.deepcopy(module).loss == module.loss and "softcap=None" in repr(module)


@pytest.mark.parametrize("name", ["cpo", "orpo", "synpo"])
def test_like_liger_keeps_what_needs_tokens(name):
    """The NLL and the arithmetic mean of a loss come from its tokens, not from one sum or mean per response."""
    weight, hidden, target, _ = batch()
    expected = eager(name, {}, weight, hidden, target).losses.mean()
    loss, outputs = FusedLinearPreferenceLoss(name, like_liger=True)(weight, hidden, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert (outputs[4] != 0) == (name != "synpo")


def test_what_the_model_would_have_said():
    """last_tokens: entropy and top-1 of every target, as in materialised logits."""
    weight, hidden, target, _ = batch()
    module = FusedLinearSynPOLoss()
    module(weight, hidden, target)
    log_softmax = F.linear(hidden.detach(), weight.detach()).log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    mask = target != -100
    torch.testing.assert_close(module.last_tokens.entropy, torch.where(mask, entropy, 0.0))
    assert torch.equal(module.last_tokens.is_top1, (log_softmax.argmax(-1) == target) & mask)
    assert not any(each.requires_grad for each in vars(module.last_tokens).values() if each is not None)


def flops(module, weight, hidden, target):
    choose_backend(hidden, module.backend)
    with FlopCounterMode(display=False) as counter:
        module(weight, hidden, target)[0].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_flops(backend):
    """4NDV with a frozen head, 6NDV with a trainable one, 8NDV where no exponentials fit."""
    if backend == "native" and not native_library.is_available():
        pytest.skip(str(native_library.reason_unavailable()))
    weight, hidden, target, _ = batch()
    valid = int((target != -100).sum())
    unit = valid * D * V
    means = 4 * D  # the two logit means: a dot product each
    for products, head, keep_bytes in [(4, weight.detach(), None), (6, weight, None), (8, weight, 0)]:
        module = FusedLinearSynPOLoss(backend=backend, keep_bytes=keep_bytes)
        assert 0 <= flops(module, head, hidden, target) - products * unit <= means, (products, keep_bytes)


def test_no_gradient_is_computed_under_no_grad():
    weight, hidden, target, _ = batch()
    module = FusedLinearSynPOLoss(backend="chunked")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss, _ = module(weight, hidden, target)
    assert not loss.requires_grad
    assert counter.get_total_flops() <= 2 * int((target != -100).sum()) * D * V + 8 * D


def test_the_loss_can_be_scaled_and_joined(backend):
    """A loss scaler multiplies before backward, a trainer adds other terms: what comes in must be passed on."""
    device = device_of(backend, torch.float32)
    weight, hidden, target, _ = batch(device=device)
    module = FusedLinearSynPOLoss(backend=backend)
    plain = grads_of(module(weight, hidden, target)[0], hidden, weight)
    scaled = grads_of(module(weight, hidden, target)[0] * 1024.0 + weight.sum(), hidden, weight)
    torch.testing.assert_close(scaled[0], plain[0] * 1024)
    torch.testing.assert_close(scaled[1], plain[1] * 1024 + 1)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_inside_a_compiled_model(trainable):
    """Graph breaks are allowed, but the result must be the same."""
    torch.compiler.reset()
    weight, hidden, target, _ = batch()
    weight.requires_grad_(trainable)
    module = FusedLinearSynPOLoss()

    def run(weight, hidden, target):
        return module(weight, torch.tanh(hidden) * 2, target)[0] * 3

    leaves = [hidden, weight] if trainable else [hidden]
    plain = grads_of(run(weight, hidden, target), *leaves)
    compiled = grads_of(torch.compile(run, backend="aot_eager")(weight, hidden, target), *leaves)
    for found, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_loss_can_be_differentiated_again_but_not_twice():
    weight, hidden, target, _ = batch()
    loss, _ = FusedLinearSynPOLoss(backend="chunked")(weight, hidden, target)
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, [hidden, weight]), strict=True):
        assert torch.equal(one, two)
    loss, _ = FusedLinearSynPOLoss(backend="chunked")(weight, hidden, target)
    with pytest.raises(RuntimeError, match="create_graph=True asks for more"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_autocast(backend):
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("autocast casts to bfloat16, which the interpreter computes wrongly")
    device = device_of(backend, torch.float32)
    weight, hidden, target, _ = batch(device=device)
    module = FusedLinearSynPOLoss(backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss, _ = module(weight, hidden, target)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    low = module(weight.detach().bfloat16(), hidden.detach().bfloat16(), target)[0]
    torch.testing.assert_close(loss.detach(), low)


def test_logit_means_follow_a_changing_head():
    """The mean row of W is kept while W stays the same, and no longer."""
    weight, hidden, target, bias = batch(bias=True)
    module = FusedLinearSynPOLoss()
    for step in range(3):
        with torch.no_grad():
            found = module(weight, hidden, target, bias)[1][2:4]
            logits = F.linear(hidden, weight, bias)
            expected = logits[:P].mean(), logits[P:].mean()
            torch.testing.assert_close(torch.stack(found), torch.stack(expected))
            if step:
                weight.mul_(2.0)
    torch.testing.assert_close(
        module(weight.detach().clone(), hidden, target, bias)[1][2], F.linear(hidden, weight, bias)[:P].mean()
    )
    copy.deepcopy(module)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_fp16_gradients_survive_until_the_loss_scale(backend, trainable):
    """Gradients of 1e-9, as late in training, are 0 in fp16: they must not be cast to fp16 before the loss scale is applied."""
    device = device_of(backend, torch.float16)
    weight, hidden, target, _ = batch(torch.float16, device, pairs=1)
    scale, options = 2.0**24, {"alpha": 1e-6, "beta": 1e-9}

    def loss_of(weight, hidden):
        return FusedLinearSynPOLoss(backend=backend, **options)(weight, hidden, target)[0] * scale

    leaves = [hidden, weight] if trainable else [hidden]
    weight.requires_grad_(trainable)
    found = grads_of(loss_of(weight, hidden), *leaves)
    expected = grads_of(eager("synpo", options, weight, hidden, target).losses.mean() * scale, *leaves)
    for grad, true in zip(found, expected, strict=True):
        assert true.abs().max() / scale < 6e-8, "without the scale the largest gradient must be 0 in fp16"
        assert error(grad, true) < 2e-2


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_scale_softcap_and_many_tiles(trainable):
    """A vocabulary of several of the native backend's tiles, logits that overtake each other from tile to tile."""
    for backend in ["chunked"] + (["native"] if native_library.is_available() else []):
        for options in ({"logit_scale": 1.7}, {"logit_scale": 0.5, "softcap": 9.0}):
            g = torch.Generator().manual_seed(3)
            hidden = torch.randn(4, 300, D, generator=g).requires_grad_()
            weight = (torch.randn(9001, D, generator=g) * torch.linspace(0.1, 3.0, 9001)[:, None]).requires_grad_(
                trainable
            )
            target = torch.randint(9001, (4, 300), generator=g)
            logits = options["logit_scale"] * F.linear(hidden.double(), weight.double())
            if "softcap" in options:
                logits = options["softcap"] * torch.tanh(logits / options["softcap"])
            logps = torch.log_softmax(logits, -1).gather(-1, target[..., None]).squeeze(-1)
            policy = PairLogprobs.from_padded(logps, target != -100)
            expected = preference_loss("simpo", policy, beta=0.1).losses.mean()
            module = FusedLinearSimPOLoss(compute_nll_loss=False, backend=backend, **options)
            loss, _ = module(weight, hidden, target)
            leaves = [hidden, weight] if trainable else [hidden]
            torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
            for found, true in zip(grads_of(loss, *leaves), grads_of(expected, *leaves), strict=True):
                assert error(found, true) < 1e-4, (backend, options)


def test_auxiliary_nll_with_some_exponentials_kept():
    """batch_token_mean divides by the tokens of all pairs."""
    weight, hidden, target, _ = batch(pairs=4)
    auxiliary = AuxiliaryNLL(weight=0.5, reduce="batch_token_mean")
    module = FusedLinearPreferenceLoss("simpo", auxiliary=auxiliary, keep_bytes=V * 4 * 2 * T, backend="chunked")
    expected = eager("simpo", {}, weight, hidden, target, auxiliary=auxiliary).losses.mean()
    loss, _ = module(weight, hidden, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for found, true in zip(grads_of(loss, hidden, weight), grads_of(expected, hidden, weight), strict=True):
        assert error(found, true) < 1e-5


def test_identical_responses_cancel():
    """Chosen = rejected: the contrast has no gradient, and DPO against itself as reference is ln 2."""
    weight, hidden, target, _ = batch(pairs=1)
    hidden = hidden[:1].repeat(2, 1, 1).detach().requires_grad_()
    target = target[:1].repeat(2, 1)
    loss, _ = FusedLinearSynPOLoss(beta=0.0)(weight, hidden, target)
    assert loss.item() == pytest.approx(-0.5)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.abs().max() < 1e-6
    loss, _ = FusedLinearDPOLoss()(weight, hidden, target, ref_input=hidden.detach(), ref_weight=weight.detach())
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FusedLinearPreferenceLoss("dop"), r"unknown loss 'dop', expected one of synpo"),
        (lambda: FusedLinearPreferenceLoss("kto"), r"use FusedLinearKTOLoss"),
        (lambda: FusedLinearPreferenceLoss("sft"), r"use FusedLinearCrossEntropyLoss"),
        (lambda: FusedLinearPreferenceLoss("dpo,dop"), r"unknown loss 'dop'"),
        (lambda: FusedLinearPreferenceLoss("dpo,sft", average_log_prob=True), r"its NLL is part of the loss"),
        (lambda: FusedLinearPreferenceLoss("dpo,ipo", average_log_prob=True), r"already uses means"),
        (lambda: FusedLinearPreferenceLoss("synpo", gamma=1.0), r"loss 'synpo' has no option gamma"),
        (lambda: FusedLinearPreferenceLoss(auxiliary=AuxiliaryNLL("ground_truth")), r"auxiliary target 'ground_truth'"),
        (lambda: FusedLinearSynPOLoss(alpha=-1.0), r"alpha.*-1"),
        (lambda: FusedLinearSynPOLoss(link="tanh"), r"link.*'tanh'"),
        (lambda: FusedLinearDPOLoss(loss_type="bogus"), r"'bogus'"),
        (lambda: FusedLinearSynPOLoss(softcap=-3.0), r"softcap must be positive, got -3.0"),
        (lambda: FusedLinearSynPOLoss(backend="nope"), r"backend must be one of .*'nope'"),
        (lambda: FusedLinearDPOLoss(average_log_prob=True, loss_type="ipo"), r"already uses means"),
        (lambda: FusedLinearSimPOLoss(average_log_prob=True), r"already uses means"),
        (lambda: FusedLinearSynPOLoss(keep_bytes=-1), r"keep_bytes must not be negative, got -1"),
        (lambda: FusedLinearDPOLoss()(*batch()[:3]), r"'dpo' needs ref_input and ref_weight"),
        (lambda: FusedLinearSynPOLoss()(*batch()[:3], ref_input=batch()[1]), r"uses no reference"),
        (lambda: FusedLinearSynPOLoss()(batch()[0], batch()[1][:3], batch()[2][:3]), r"\[2B, T, D\].*\[3, 11, 16\]"),
        (lambda: FusedLinearSynPOLoss()(batch()[0], batch()[1], batch()[2][:, 1:]), r"\[6, 11\] like _input, got \[6, 10\]"),
        (lambda: FusedLinearSynPOLoss()(batch()[0], batch()[1], torch.full((6, T), -100)), r"pair 0"),
    ],
)  # fmt: skip
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
