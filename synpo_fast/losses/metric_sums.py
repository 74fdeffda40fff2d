"""Metrics of pair batches under TRL's names, as sums that can be added over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from synpo_fast.losses import LossOutput
from synpo_fast.losses.weighted_sum import LOSS_METRIC

# For each metric, the count that it is a mean over. A member of a sum of losses has the metric loss/NAME, over the pairs.
WEIGHTS = {
    "rewards/chosen": "preference_pairs",
    "rewards/rejected": "preference_pairs",
    "rewards/accuracies": "preference_pairs",
    "rewards/margins": "preference_pairs",
    "logps/chosen": "preference_pairs",
    "logps/rejected": "preference_pairs",
    "kl": "preference_pairs",
    "nll_loss": "chosen_tokens",
    "logits/chosen": "chosen_tokens",
    "logits/rejected": "rejected_tokens",
    "mean_token_accuracy": "chosen_tokens",
    "entropy": "response_tokens",
}
LOGIT_METRICS = ("logits/chosen", "logits/rejected")  # only where the caller computes mean logits
# The counts of a loss that reads single responses with a label (kto). Its margin is a difference of two means.
_LABELLED = {
    "rewards/chosen": "desirable_responses",
    "rewards/rejected": "undesirable_responses",
    "logps/chosen": "desirable_responses",
    "logps/rejected": "undesirable_responses",
}


def weight_of(name: str) -> str | None:
    """The count that a metric is a mean over; None for a metric that is not shown."""
    return "pairs" if name.startswith(LOSS_METRIC) else WEIGHTS.get(name)


@torch.no_grad()
def metric_sums(output: LossOutput, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns each metric times its weight, and the weights, as fp32 scalars on one device. The host does not read them.

    output: what the loss returned. outputs: the batch's numbers beside the loss: chosen_tokens and rejected_tokens; with them
    chosen_logits and rejected_logits (mean logits) where the caller has logits, top1_tokens (how many chosen tokens are the
    model's first choice) and entropies (summed over all response tokens). A metric counts only if `weight_of` names its weight.
    """
    sums = {
        "pairs": output.losses.new_full((), output.losses.shape[0]),
        "preference_pairs": output.metrics["preference_pairs"],
        "empty_pairs": output.metrics["empty_pairs"],
        "chosen_tokens": outputs["chosen_tokens"].sum(),
        "rejected_tokens": outputs["rejected_tokens"].sum(),
    }
    sums |= {name: output.metrics[name] for name in _LABELLED.values() if name in output.metrics}
    for name, weight in _weights(output.metrics).items():
        sums[name] = output.metrics[name] * sums[weight]
    if "chosen_logits" in outputs:
        sums["logits/chosen"] = (outputs["chosen_logits"] * outputs["chosen_tokens"]).sum()
        sums["logits/rejected"] = (outputs["rejected_logits"] * outputs["rejected_tokens"]).sum()
    if "entropies" in outputs:
        sums["mean_token_accuracy"] = outputs["top1_tokens"].sum()
        sums["entropy"] = outputs["entropies"].sum()
        sums["response_tokens"] = sums["chosen_tokens"] + sums["rejected_tokens"]
    return {name: value.float() for name, value in sums.items()}


def metric_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics from added sums. Leaves out metrics with nothing to average (rewards if no pair was compared), and
    empty_pairs if it is 0."""
    weights = _weights(sums)
    means = {name: sums[name] / sums[weight] for name, weight in weights.items() if sums[weight] > 0}
    if "desirable_responses" in sums and {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    if sums["empty_pairs"] > 0:
        means["empty_pairs"] = sums["empty_pairs"]
    return means


def _weights(names: Collection[str]) -> dict[str, str]:
    """The count that each of these metrics is a mean over."""
    weights = {name: weight for name in names if (weight := weight_of(name)) is not None}
    if "desirable_responses" in names:
        weights = {name: _LABELLED.get(name, weight) for name, weight in weights.items() if name != "rewards/margins"}
    return weights
