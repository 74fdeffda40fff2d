"""The losses shared with TRL, computed by TRL's own code on the same log-probs.

dpo_types/trl_oracle.py calls DPOTrainer; CPOTrainer.cpo_loss and ORPOTrainer.odds_ratio_loss need only a few attributes. DPO's
loss types, sums of losses and WPO are in dpo_types/test_trl_types.py.
"""

from types import SimpleNamespace

import pytest
import torch

from synpo_fast.losses import preference_loss

from . import truth
from .dpo_types.trl_oracle import KEEP_ALL, our_dpo, trl_dpo

pytest.importorskip("trl", minversion="1.16", reason="TRL is the oracle here and is not installed")

LENGTHS = [(3, 5), (1, 1), (6, 2)]


@pytest.mark.parametrize(("variant", "beta"), [("sigmoid", 0.1), ("hinge", 0.3), ("ipo", 0.1), ("ipo", 0.7)])
def test_dpo(variant, beta):
    pairs, reference = truth.ragged_pairs(LENGTHS), truth.ragged_pairs(LENGTHS, seed=1)
    their_loss, their_grad, their_metrics = trl_dpo(pairs, reference, [variant], beta=beta)
    our_loss, our_grad, our_metrics = our_dpo("dpo", pairs, reference, variant=variant, beta=beta)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-12, atol=1e-15)
    shared = {key for key in our_metrics if key.startswith(("rewards/", "logps/"))}
    assert len(shared) == 6
    assert {key: our_metrics[key] for key in shared} == pytest.approx({key: their_metrics[key] for key in shared})


def test_label_smoothing():
    # TRL 1.16 smooths in "aot", which sorts log-ratios over the batch: with one pair it is conservative DPO.
    pairs, reference = truth.ragged_pairs([(4, 3)]), truth.ragged_pairs([(4, 3)], seed=1)
    their_loss, their_grad, _ = trl_dpo(pairs, reference, ["aot"], label_smoothing=0.2)
    our_loss, our_grad, _ = our_dpo("dpo", pairs, reference, label_smoothing=0.2)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "options", "loss_type"),
    [
        ("cpo", {"beta": 0.2}, "sigmoid"),
        ("cpo", {"beta": 0.2, "label_smoothing": 0.1}, "sigmoid"),
        ("cpo", {"beta": 0.2, "variant": "hinge"}, "hinge"),
        ("simpo", {"beta": 2.0, "gamma": 0.7, "label_smoothing": 0.1}, "simpo"),
    ],
)
def test_cpo_and_simpo(name, options, loss_type):
    from trl.experimental.cpo import CPOTrainer

    policy = truth.as_logprobs(truth.ragged_pairs(LENGTHS))
    output = preference_loss(name, policy, **options, **({"nll_weight": 0.0} if name == "cpo" else {}))
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        loss_type=loss_type,
        simpo_gamma=options.get("gamma", 0.0),
        accelerator=KEEP_ALL,
    )
    losses, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, output.chosen_logps, output.rejected_logps)
    torch.testing.assert_close(output.losses, losses, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(output.chosen_rewards, chosen_rewards)
    torch.testing.assert_close(output.rejected_rewards, rejected_rewards)


def test_orpo():
    from trl.experimental.orpo import ORPOTrainer

    policy = truth.as_logprobs(truth.ragged_pairs(LENGTHS))
    output = preference_loss("orpo", policy, beta=0.3)
    trainer = SimpleNamespace(beta=0.3, accelerator=KEEP_ALL)
    ratio, chosen_rewards, rejected_rewards, _, _ = ORPOTrainer.odds_ratio_loss(
        trainer, output.chosen_logps, output.rejected_logps
    )
    # TRL's NLL covers the prompt too; ours is compared in test_liger.py. TRL computes the odds in fp32.
    nll = output.metrics["nll_loss"]
    torch.testing.assert_close(output.losses.mean().float(), (nll - ratio.mean()).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(output.chosen_rewards.float(), chosen_rewards)
    torch.testing.assert_close(output.rejected_rewards.float(), rejected_rewards)
