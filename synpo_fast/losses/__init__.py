"""Preference losses as pure functions of token log-probs. LOSSES (registry.py) lists them; `preference_loss` computes
one by name.

Each loss takes `PairLogprobs` (some take a second one for the reference) and returns a `LossOutput`. README.md has a table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from synpo_fast.losses.cpo import cpo
from synpo_fast.losses.cpo_simpo import cpo_simpo
from synpo_fast.losses.dpo import dpo
from synpo_fast.losses.kto import apo_zero_unpaired, kl_reference_point, kto
from synpo_fast.losses.nll import AuxiliaryNLL, nll
from synpo_fast.losses.orpo import orpo
from synpo_fast.losses.pair import LossOutput, PairLogprobs
from synpo_fast.losses.registry import LOSSES
from synpo_fast.losses.simpo import simpo
from synpo_fast.losses.spec import LossSpec
from synpo_fast.losses.synpo import synpo, synpo_token_coefficients
from synpo_fast.losses.synpo_ref import synpo_ref
from synpo_fast.losses.weighted_sum import spec_of
from synpo_fast.losses.wpo import wpo_weights

__all__ = [
    "LOSSES",
    "AuxiliaryNLL",
    "LossOutput",
    "LossSpec",
    "PairLogprobs",
    "apo_zero_unpaired",
    "check_options",
    "cpo",
    "cpo_simpo",
    "dpo",
    "kl_reference_point",
    "kto",
    "nll",
    "orpo",
    "preference_loss",
    "simpo",
    "spec_of",
    "synpo",
    "synpo_ref",
    "synpo_token_coefficients",
    "wpo_weights",
]


def preference_loss(
    name: str,
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    auxiliary: AuxiliaryNLL | None = None,
    pair_weights: Tensor | None = None,
    **options: Any,
) -> LossOutput:
    """Computes the loss called `name` on a batch of pairs, plus the auxiliary NLL if one is given.

    name: a key of LOSSES, or a weighted sum of several, separated by commas, with the option loss_weights (see weighted_sum.py).
    pair_weights [P]: factors of the preference terms, without grad, such as `wpo_weights`. NLLs are not multiplied.

    A pair with policy.preference False ("sft") has no preference term. Its loss is its NLL: the loss's own (orpo, cpo, sft in
    a sum) and the auxiliary one, with their targets and weights. If there is neither, it is the token mean of the NLL on its
    chosen response, with weight 1.

    Adds the metric nll_loss/ground_truth if the auxiliary target is the ground truth, and loss/NAME for each member of a sum.
    Raises ValueError on an unknown name or option, on a reference that is missing or not needed, and on unpaired rows unless the
    loss reads each response by itself (kto, apo_zero_unpaired).
    """
    spec = spec_of(name)
    unknown = sorted(set(options) - set(spec.options))
    if unknown:
        raise ValueError(f"loss {name!r} has no option {', '.join(unknown)}; it has {', '.join(spec.options)}")
    if reference is not None and not spec.needs_reference:
        raise ValueError(f"loss {name!r} takes no reference, but one was given")
    if policy.unpaired is not None and not spec.unpaired:
        single = ", ".join(each for each, entry in LOSSES.items() if entry.unpaired)
        raise ValueError(
            f"loss {name!r} compares two responses, but a row has one; these losses read single ones: {single}"
        )
    if pair_weights is not None:
        policy = replace(policy, weights=pair_weights)
    output = spec.compute(policy, reference, options)

    losses, metrics = output.losses, dict(output.metrics)
    if auxiliary is not None:
        nll_P = nll(policy, target=auxiliary.target, reduce=auxiliary.reduce)
        losses = losses + auxiliary.weight * nll_P
        if auxiliary.target == "ground_truth":
            truth_nll = nll(policy, target="ground_truth", reduce="batch_token_mean")
            metrics["nll_loss/ground_truth"] = truth_nll.detach().mean()
    elif policy.preference is not None and not spec.has_nll:
        losses = losses + torch.where(policy.preference, 0.0, nll(policy))
    return replace(output, losses=losses, metrics=metrics)


def check_options(name: str, *, auxiliary: AuxiliaryNLL | None = None, **options: Any) -> None:
    """Runs the loss on a few tokens. Raises ValueError for options that it refuses or that overflow in fp32."""
    logps = torch.tensor([-0.5, -1.5, -3.0], requires_grad=True)
    responses = [(logps[:2], logps[1:]), (logps[1:], logps[:2]), (logps[:2], logps[:2])]
    kl = torch.tensor(0.1) if spec_of(name).needs_kl else None
    policy = PairLogprobs.from_pairs(responses, ground_truth=[logps] * len(responses), kl=kl)
    reference = None
    if spec_of(name).reads_reference(options):
        reference = PairLogprobs.from_pairs([(y.detach() - 0.1, z.detach() + 0.1) for y, z in responses])
    loss = preference_loss(name, policy, reference, auxiliary=auxiliary, **options).losses.mean()
    loss.backward()
    if not torch.isfinite(loss) or logps.grad is None or not torch.isfinite(logps.grad).all():
        given = options if auxiliary is None else {**options, "auxiliary weight": auxiliary.weight}
        values = ", ".join(f"{option}={value!r}" for option, value in given.items())
        raise ValueError(f"the loss or its gradient is not finite with {values}: a value is too large or too small")
