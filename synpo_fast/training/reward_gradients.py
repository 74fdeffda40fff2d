"""Gradient norms of the chosen and the rejected rewards, as SynPO's authors plot them.

    g+ = || d mean(r+) / d theta || / number of trained parameters,      g- likewise

The mean is over all pairs of a step on all ranks. r is the loss's reward, as in the metrics rewards/...: G(y) for SynPO,
beta * r(y) for DPO (synpo_fast/losses/rewards.py). The norms show which response drives the update: under DPO g- comes to
dominate, under SynPO it does not. They cost one more forward and two backwards of the given micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from synpo_fast.data.encoded import EncodedPair
from synpo_fast.losses.rewards import rewards_of
from synpo_fast.losses.segments import segment_mean
from synpo_fast.pair_logprobs import pair_logprobs
from synpo_fast.training.pair_module import PairModule

Numbers = dict[str, float]


def reward_gradient_norms(module: PairModule, micro_batches: Sequence[Sequence[EncodedPair]]) -> Numbers:
    """Returns the norms and mean log-probs under diagnostics/ names; {} if no rank has a preference pair.

    All ranks call it, each with its own micro-batches (possibly none). The step's accumulated gradients stay unchanged.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() for parameter in parameters)
    device = parameters[0].device
    totals = {name: torch.zeros(size, device=device) for name in ("chosen", "rejected")}
    sums = {name: torch.zeros((), device=device, dtype=torch.float64) for name in ("pairs", "chosen", "rejected")}
    for pairs in micro_batches:
        compared = [pair for pair in pairs if pair.preference]
        if not compared:
            continue
        rewards, logps = _rewards(module, compared)
        for name, values in zip(totals, rewards, strict=True):
            last = name == "rejected"
            gradients = torch.autograd.grad(values.sum(), parameters, retain_graph=not last, allow_unused=True)
            totals[name] += _flat(gradients, parameters)
        sums["pairs"] += sum(pair.num_pairs for pair in compared)
        for name, value in logps.items():
            sums[name] += value
    counted = torch.stack(list(sums.values()))
    dist.all_reduce(counted)
    for total in totals.values():
        dist.all_reduce(total)
    norms = torch.stack([total.norm() for total in totals.values()])
    pairs_seen, *rest, chosen_norm, rejected_norm = torch.cat(
        [counted, norms.double()]
    ).tolist()  # the only read from the device
    if not pairs_seen:
        return {}
    chosen, rejected = (norm / pairs_seen / size for norm in (chosen_norm, rejected_norm))
    means = dict(zip(("logps_mean/chosen", "logps_mean/rejected"), rest, strict=True))
    return {
        "diagnostics/grad_norm_chosen": chosen,
        "diagnostics/grad_norm_rejected": rejected,
        **{f"diagnostics/{name}": value / pairs_seen for name, value in means.items()},
    }


def _rewards(module: PairModule, pairs: Sequence[EncodedPair]) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    samples = [pair.sample for pair in pairs]
    policy = pair_logprobs(pairs, module.policy(samples, share_prefix=module.share_prefix))
    with torch.no_grad():
        chosen = segment_mean(policy.chosen, policy.chosen_offsets).sum().double()
        rejected = segment_mean(policy.rejected, policy.rejected_offsets).sum().double()
    reference = None if module.reference is None else pair_logprobs(pairs, module.reference_logps(samples))
    rewards = rewards_of(module.loss_type, policy, reference, module.options)
    return rewards, {"chosen": chosen, "rejected": rejected}


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    parts = [
        torch.zeros(parameter.numel(), device=parameter.device) if gradient is None else gradient.flatten().float()
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
    return torch.cat(parts)
