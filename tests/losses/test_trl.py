"""The losses shared with TRL, computed by TRL's own code on the same log-probs.

dpo_types/trl_oracle.py calls DPOTrainer; CPOTrainer.cpo_loss and ORPOTrainer.odds_ratio_loss need only a few attributes. DPO's
loss types, sums of losses and WPO are in dpo_types/test_trl_types.py.
"""

from types import SimpleNamespace

import pytest
import torch

from synpo_fast.losses import PairLogprobs, preference_loss

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


def test_cpo_simpo():
    """The whole loss and its gradient with respect to the logits, by TRL's loop over a batch with prompts and padding."""
    from trl.experimental.cpo import CPOTrainer

    torch.manual_seed(0)
    lengths, prompt, vocabulary, ignored = [3, 1, 6, 5, 1, 2], 2, 11, -100
    labels = torch.full((6, prompt + max(lengths)), ignored)
    for row, length in zip(labels, lengths, strict=True):
        row[prompt : prompt + length] = torch.randint(vocabulary, (length,))
    logits = torch.randn(*labels.shape, vocabulary, dtype=torch.float64, requires_grad=True)
    trainer = SimpleNamespace(
        is_encoder_decoder=False,
        aux_loss_enabled=False,
        pad_token_id=0,
        alpha=0.0,
        beta=1.5,
        label_smoothing=0.1,
        loss_type="simpo",
        simpo_gamma=0.7,
        cpo_alpha=0.3,
        accelerator=KEEP_ALL,
        get_batch_logps=CPOTrainer.get_batch_logps,
        cpo_loss=lambda *logps: CPOTrainer.cpo_loss(trainer, *logps),
        concatenated_inputs=lambda *_, **__: {
            "concatenated_input_ids": labels,
            "concatenated_attention_mask": None,
            "concatenated_labels": labels,
        },
        concatenated_forward=lambda *given: CPOTrainer.concatenated_forward(trainer, *given),
    )

    def model(*_, **__):
        return SimpleNamespace(logits=logits)

    their_loss, their_metrics = CPOTrainer.get_batch_loss_metrics(trainer, model, {"chosen_labels": labels[:3]})
    (their_grad,) = torch.autograd.grad(their_loss, logits)

    targets = labels[:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    policy = PairLogprobs.from_padded(logps, targets != ignored)
    output = preference_loss("cpo_simpo", policy, beta=1.5, gamma=0.7, label_smoothing=0.1, nll_weight=0.3)
    (our_grad,) = torch.autograd.grad(output.losses.mean(), logits)
    torch.testing.assert_close(output.losses.mean(), their_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-10, atol=1e-15)
    shared = {key for key in output.metrics if key.startswith(("rewards/", "logps/"))} | {"nll_loss"}
    assert {key: output.metrics[key].item() for key in shared} == pytest.approx({k: their_metrics[k] for k in shared})


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
