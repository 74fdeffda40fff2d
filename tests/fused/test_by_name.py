"""FusedLinearDPOLoss and FusedLinearSimPOLoss: against Liger's classes, and where they differ from them."""

import math

import pytest
import torch

from synpo_fast import FusedLinearDPOLoss, FusedLinearPreferenceLoss, FusedLinearSimPOLoss
from tests.fused.test_preference import P, batch, eager, grads_of
from tests.ops.linear_logprobs.problems import error


@pytest.mark.parametrize("compute_nll_loss", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("average_log_prob", [False, True])
def test_swapping_ligers_import(compute_nll_loss, trainable, average_log_prob):
    """Our class takes Liger's constructor arguments and call, and returns the same nine results and gradients."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    settings = {
        "ignore_index": -100,
        "beta": 0.2,
        "alpha": 0.6,
        "compute_nll_loss": compute_nll_loss,
        "compiled": False,
    }
    weight, hidden, target, bias = batch(bias=True)
    ref = {"ref_input": hidden.detach() * 1.1, "ref_weight": weight.detach() * 0.9, "ref_bias": bias.detach() * 0.5}
    for theirs, ours, arguments in [
        (liger.LigerFusedLinearSimPOLoss, FusedLinearSimPOLoss, {}),
        (liger.LigerFusedLinearDPOLoss, FusedLinearDPOLoss, ref),
    ]:
        results = []
        extra = {"average_log_prob": average_log_prob} if arguments else {}
        for module in (theirs(**settings, **extra), ours(**settings, **extra)):
            leaves = [hidden.detach().requires_grad_()] + [t.detach().requires_grad_(trainable) for t in (weight, bias)]
            loss, outputs = module(leaves[1], leaves[0], target, leaves[2], **arguments)
            loss.backward()
            results.append([loss.detach(), *(o.detach() for o in outputs), *(leaf.grad for leaf in leaves)])
        for index, (liger_value, our_value) in enumerate(zip(*results, strict=True)):
            if liger_value is None:
                continue  # frozen
            torch.testing.assert_close(
                our_value, liger_value.to(our_value), rtol=2e-4, atol=2e-5, msg=lambda m, i=index: f"{i}: {m}"
            )


LIGERS_TYPES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip


@pytest.mark.parametrize("loss_type", LIGERS_TYPES)
@pytest.mark.parametrize("use_ref_model", [True, False])
def test_every_loss_type_of_ligers(loss_type, use_ref_model):
    """Also where all targets of a response are ignored: its log-prob is 0, and its pair counts."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    settings = {"loss_type": loss_type, "beta": 0.3, "use_ref_model": use_ref_model, "compiled": False}
    settings |= {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
    settings |= {"discopop_tau": 0.4} if loss_type == "discopop" else {}
    weight, hidden, target, bias = batch(bias=True)
    target[1], target[P + 2] = -100, -100
    ref = {"ref_input": hidden.detach() * 1.1, "ref_weight": weight.detach() * 0.9, "ref_bias": bias.detach() * 0.5}
    results = []
    for module in (liger.LigerFusedLinearDPOLoss(**settings), FusedLinearDPOLoss(**settings)):
        leaves = [leaf.detach().requires_grad_() for leaf in (hidden, weight, bias)]
        loss, outputs = module(leaves[1], leaves[0], target, leaves[2], **(ref if use_ref_model else {}))
        loss.backward()
        results.append([loss.detach(), *(each.detach() for each in outputs), *(leaf.grad for leaf in leaves)])
    for index, (liger_value, our_value) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(
            our_value, liger_value.to(our_value), rtol=2e-5, atol=2e-6, msg=lambda m, i=index: f"{i}: {m}"
        )


@pytest.mark.parametrize("use_ref_model", [True, False])
@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_aot(loss_type, use_ref_model):
    if loss_type == "aot" and not use_ref_model:
        with pytest.raises(ValueError, match="'aot' compares with a reference: use_ref_model=False is not possible"):
            FusedLinearDPOLoss(loss_type=loss_type, use_ref_model=use_ref_model)
        return
    weight, hidden, target, _ = batch()
    module = FusedLinearDPOLoss(loss_type=loss_type, beta=0.3, use_ref_model=use_ref_model)
    reference = (weight.detach() * 0.9, hidden.detach() * 1.1) if use_ref_model else None
    options = {"beta": 0.3} if use_ref_model else {"beta": 0.3, "reference_free": True}
    expected = eager(loss_type, options, weight, hidden, target, reference=reference).losses.mean()
    given = {} if reference is None else {"ref_weight": reference[0], "ref_input": reference[1]}
    loss, _ = module(weight, hidden, target, **given)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for found, true in zip(grads_of(loss, hidden, weight), grads_of(expected, hidden, weight), strict=True):
        assert error(found, true) < 1e-5


def test_aot_without_its_reference_is_refused():
    with pytest.raises(ValueError, match=r"'aot' needs ref_input and ref_weight$"):
        FusedLinearDPOLoss(loss_type="aot")(*batch()[:3])


def test_a_reference_without_use_ref_model_is_ignored():
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    weight, hidden, target, bias = batch(bias=True)
    reference = {"ref_input": hidden.detach() * 1.1, "ref_weight": weight.detach() * 0.9, "ref_bias": bias.detach()}
    theirs = liger.LigerFusedLinearDPOLoss(use_ref_model=False, compiled=False)
    module = FusedLinearDPOLoss(use_ref_model=False)
    loss, _ = module(weight, hidden, target, bias, **reference)
    torch.testing.assert_close(loss, theirs(weight, hidden, target, bias, **reference)[0], rtol=2e-5, atol=2e-6)
    assert torch.equal(loss, module(weight, hidden, target, bias)[0])
    with pytest.raises(ValueError, match="uses no reference"):
        FusedLinearPreferenceLoss("dpo", reference_free=True)(weight, hidden, target, bias, **reference)


def test_the_nll_of_a_batch_without_targets():
    """The documented difference: Liger divides by 0 tokens. It also ignores options that a type does not have."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    weight, hidden, target, _ = batch()
    settings = {"compute_nll_loss": True, "use_ref_model": False}
    nothing = torch.full_like(target, -100)
    assert liger.LigerFusedLinearDPOLoss(compiled=False, **settings)(weight, hidden, nothing)[0].isnan()
    loss, _ = FusedLinearDPOLoss(**settings)(weight, hidden, nothing)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    liger.LigerFusedLinearDPOLoss(loss_type="hinge", label_smoothing=0.1, discopop_tau=0.2)


def test_a_type_without_an_option_refuses_it():
    with pytest.raises(ValueError, match="'hinge' has no label_smoothing"):
        FusedLinearDPOLoss(loss_type="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="'sigmoid' has no discopop_tau"):
        FusedLinearDPOLoss(discopop_tau=0.2)
