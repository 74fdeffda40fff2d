"""The losses shared with Liger: its fused classes against ours on log-probs computed eagerly in fp64.

Liger rounds logits to fp32 whatever its inputs, so the bar is fp32's.
"""

import pytest
import torch

from synpo_fast.losses import AuxiliaryNLL, PairLogprobs, preference_loss

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is the oracle here and is not installed")

P, T, D, V = 3, 7, 16, 50
IGNORE = -100
BATCH_NLL = AuxiliaryNLL("chosen", 1.0, "batch_token_mean")

CASES = {
    "dpo": ("LigerFusedLinearDPOLoss", {"beta": 0.3}, "dpo", {"beta": 0.3}, None),
    "dpo hinge": (
        "LigerFusedLinearDPOLoss",
        {"beta": 0.3, "loss_type": "hinge"},
        "dpo",
        {"beta": 0.3, "variant": "hinge"},
        None,
    ),
    "dpo reference free": (
        "LigerFusedLinearDPOLoss",
        {"beta": 0.2, "use_ref_model": False},
        "dpo",
        {"beta": 0.2, "reference_free": True},
        None,
    ),
    "dpo with nll": ("LigerFusedLinearDPOLoss", {"compute_nll_loss": True}, "dpo", {}, BATCH_NLL),
    "simpo": ("LigerFusedLinearSimPOLoss", {"beta": 2.0, "compute_nll_loss": False}, "simpo", {}, None),
    "simpo with nll": (
        "LigerFusedLinearSimPOLoss",
        {"beta": 2.0, "gamma": 1.2, "label_smoothing": 0.1},
        "simpo",
        {"gamma": 1.2, "label_smoothing": 0.1},
        BATCH_NLL,
    ),
    "cpo_simpo": (
        "LigerFusedLinearSimPOLoss",
        {"beta": 2.0, "gamma": 1.2, "alpha": 0.3, "compute_nll_loss": True},
        "cpo_simpo",
        {"gamma": 1.2, "nll_weight": 0.3},
        None,
    ),
    "orpo": ("LigerFusedLinearORPOLoss", {"beta": 0.4}, "orpo", {"beta": 0.4}, None),
    "cpo": (
        "LigerFusedLinearCPOLoss",
        {"beta": 0.2, "alpha": 0.7, "label_smoothing": 0.1},
        "cpo",
        {"beta": 0.2, "nll_weight": 0.7, "label_smoothing": 0.1},
        None,
    ),
}


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    target = torch.randint(V, (2 * P, T))
    for row, length in enumerate([7, 3, 1, 2, 7, 4]):  # padding on either side, as a prompt and a short answer leave it
        target[row, : T - length if row % 2 else 0] = IGNORE
        target[row, T if row % 2 else length :] = IGNORE
    return draw(2 * P, T, D), draw(V, D) * 0.3, target, draw(2 * P, T, D), draw(V, D) * 0.3


def eager(hidden, weight, target) -> PairLogprobs:
    log_softmax = (hidden @ weight.t()).log_softmax(-1)
    logps = log_softmax.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return PairLogprobs.from_padded(logps, target != IGNORE)


@pytest.mark.parametrize("case", CASES)
def test_liger(case, tensors):
    class_name, liger_options, name, options, auxiliary = CASES[case]
    hidden, weight, target, ref_hidden, ref_weight = tensors

    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    module = getattr(chunked_loss, class_name)(compiled=False, ignore_index=IGNORE, **liger_options)
    uses_reference = name == "dpo" and not options.get("reference_free", False)
    references = {"ref_input": ref_hidden, "ref_weight": ref_weight} if uses_reference else {}
    their_loss, aux = module(theirs[1], theirs[0], target, **references)
    their_loss.backward()

    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    reference = eager(ref_hidden, ref_weight, target) if uses_reference else None
    output = preference_loss(name, eager(*ours, target), reference, auxiliary=auxiliary, **options)
    output.losses.mean().backward()

    def close(got, expected):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-6)

    close(output.losses.mean(), their_loss)
    close(ours[0].grad, theirs[0].grad)
    close(ours[1].grad, theirs[1].grad)
    chosen_logps, rejected_logps, _, _, nll, chosen_rewards, rejected_rewards = aux[:7]
    close(output.chosen_logps, chosen_logps)
    close(output.rejected_logps, rejected_logps)
    close(output.chosen_rewards, chosen_rewards)
    close(output.rejected_rewards, rejected_rewards)
    if auxiliary is not None or name in ("orpo", "cpo", "cpo_simpo"):
        close(output.metrics["nll_loss"], nll)
