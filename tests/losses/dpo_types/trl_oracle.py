"""TRL's DPOTrainer as an oracle: its loss and gradients for given log-probs.

TRL has no pure entry: DPOTrainer._compute_loss runs on a stand-in for the trainer, with a "model" and a "reference model" that
return given log-probs.
"""

from collections import defaultdict
from types import SimpleNamespace

import torch

from synpo_fast.losses import PairLogprobs, preference_loss

from .. import truth

PROMPT = 2
KEEP_ALL = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def padded(pairs, dtype=torch.float64):
    """log-probs [2P, L-1] as TRL's model gives them, 0 outside the completion, and completion_mask [2P, L]."""
    responses = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    width = PROMPT + max(map(len, responses))
    logps = torch.zeros(len(responses), width - 1, dtype=dtype)
    mask = torch.zeros(len(responses), width, dtype=torch.int64)
    for row, response in enumerate(responses):
        logps[row, PROMPT - 1 : PROMPT - 1 + len(response)] = torch.tensor(response, dtype=dtype)
        mask[row, PROMPT : PROMPT + len(response)] = 1
    return logps, mask


def trl_dpo(pairs, reference, loss_types, *, dtype=torch.float64, log_sum_sq_probs=None, discopop_tau=0.05, **settings):
    """TRL's loss, its gradient with respect to the log-probs, and its metrics. settings: attributes of the trainer."""
    from trl.trainer.dpo_trainer import DPOTrainer

    logps, mask = padded(pairs, dtype)
    logps.requires_grad_()
    ones = torch.ones_like(logps)
    squares = None if log_sum_sq_probs is None else padded(log_sum_sq_probs, dtype)[0]

    def model(**inputs):
        return SimpleNamespace(
            log_probs=logps * mask[:, 1:],
            entropy=ones,
            mean_logits=ones,
            is_top1=ones.bool(),
            log_sum_sq_probs=squares,
        )

    in_training = torch.nn.Identity()
    in_training.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=in_training,
        ref_model=lambda **inputs: SimpleNamespace(log_probs=padded(reference, dtype)[0]),
        accelerator=KEEP_ALL,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=discopop_tau),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_types=loss_types,
        use_weighting=squares is not None,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    defaults = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "loss_weights": [1.0] * len(loss_types),
    }
    for name, value in (defaults | settings).items():
        setattr(trainer, name, value)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    return loss.detach(), logps.grad, {key: value[0] for key, value in trainer._metrics["train"].items()}


def our_dpo(name, pairs, reference, *, dtype=torch.float64, pair_weights=None, **options):
    """The same three from preference_loss."""
    logps, mask = padded(pairs, dtype)
    logps.requires_grad_()
    policy = PairLogprobs.from_padded(logps, mask[:, 1:].bool())
    output = preference_loss(name, policy, truth.as_logprobs(reference, dtype), pair_weights=pair_weights, **options)
    loss = output.losses.mean()
    loss.backward()
    return loss.detach(), logps.grad, {key: value.item() for key, value in output.metrics.items()}
