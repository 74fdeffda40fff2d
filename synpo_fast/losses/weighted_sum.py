"""Weighted sums of losses, such as MPO (arXiv 2411.10442): 0.8 * dpo + 0.2 * bco_pair + 1.0 * sft.

    L = sum_i w_i * L_i

A sum is named by its members, separated by commas ("dpo,bco_pair,sft"), and its weights are the option loss_weights, 1 each by
default; both as in TRL. A member is a key of LOSSES, "sft" (the NLL of the chosen response), or "sigmoid", TRL's name of dpo.

An option goes to every member that has it. Rewards, log-probs and their units are those of the first member other than sft.
The metric loss/NAME is the mean of a member's loss, without its weight. TRL ignores label_smoothing in "sigmoid"; here it
reaches dpo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

from torch import Tensor

from synpo_fast.losses.checks import check_number
from synpo_fast.losses.nll import REDUCES, nll
from synpo_fast.losses.pair import LossOutput, PairLogprobs
from synpo_fast.losses.registry import LOSSES
from synpo_fast.losses.spec import LossSpec, Options

SFT = "sft"  # the name of the NLL of the chosen response: alone in the trainer, or as a member of a sum
OTHER_NAMES = {"sigmoid": "dpo"}
LOSS_METRIC = "loss/"  # before a member's name


def canonical_name(name: str) -> str:
    """The name with our names of the members and without spaces. Unknown names stay as they are."""
    return ",".join(OTHER_NAMES.get(member.strip(), member.strip()) for member in name.split(","))


def members_of(name: str) -> tuple[str, ...]:
    """The members of a sum, or the one loss. Raises ValueError on an unknown, an empty or a repeated name."""
    members = tuple(canonical_name(name).split(","))
    known = (*LOSSES, SFT) if len(members) > 1 else LOSSES
    for member in members:
        if member not in known:
            raise ValueError(f"unknown loss {member!r}, expected one of {', '.join(known)}")
        if members.count(member) > 1:
            also = next(
                (f" ({other} is another name of {ours})" for other, ours in OTHER_NAMES.items() if ours == member), ""
            )
            raise ValueError(f"loss {name!r} names {member} more than once{also}: give it one weight in loss_weights")
    return members


@lru_cache(maxsize=32)
def spec_of(name: str) -> LossSpec:
    """The description of a loss or of a sum. Raises ValueError as `members_of` does."""
    members = members_of(name)
    if len(members) == 1:
        return LOSSES[members[0]]
    specs = [LOSSES[member] for member in members if member != SFT]
    if len({spec.unpaired for spec in specs}) > 1:
        single = [member for member in members if member != SFT and LOSSES[member].unpaired]
        raise ValueError(
            f"loss {name!r} mixes losses of single responses ({', '.join(single)}) with losses that compare two"
        )
    choices: dict[str, tuple[str, ...]] = {}
    for spec in specs:
        for option, words in spec.choices.items():
            choices[option] = tuple(dict.fromkeys((*choices.get(option, ()), *words)))
    if SFT in members:
        choices["nll_reduce"] = REDUCES
    return SumSpec(
        function=partial(weighted_sum, members),
        reads=specs[0].reads,
        reward=specs[0].reward,
        reward_unit=specs[0].reward_unit,
        formula=" + ".join(f"w{i}*{member}" for i, member in enumerate(members, start=1)),
        needs_reference=any(spec.needs_reference for spec in specs),
        has_nll=SFT in members or any(spec.has_nll for spec in specs),
        choices=choices,
        sorts_batch=any(spec.sorts_batch for spec in specs),
        unpaired=all(spec.unpaired for spec in specs),
        needs_kl=any(spec.needs_kl for spec in specs),
        members=members,
    )


@dataclass(frozen=True)
class SumSpec(LossSpec):
    """A weighted sum of losses. Its options are those of its members, with the first member's default, and loss_weights."""

    members: tuple[str, ...] = ()

    @cached_property
    def options(self) -> Options:
        found: Options = {}
        for member in self.members:
            own = LOSSES[member].options if member != SFT else {"nll_reduce": "batch_token_mean"}
            found = {**own, **found}
        return {**found, "loss_weights": (1.0,) * len(self.members)}

    def reads_reference(self, options: Options) -> bool:
        return any(LOSSES[member].reads_reference(_own(member, options)) for member in self.members if member != SFT)


def weighted_sum(
    members: Sequence[str],
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    loss_weights: Sequence[float] | None = None,
    **options: Any,
) -> LossOutput:
    """The weighted sum per pair. members: as `members_of` returns them. The reference goes to the members that read one.

    Raises ValueError on weights that do not fit the members, on a divergence that a member with a reference does not have, on a
    reference that no member reads, and as the members do.
    """
    weights = checked_weights(members, loss_weights)
    _check_divergence(members, options)
    if reference is not None and not any(m != SFT and LOSSES[m].reads_reference(_own(m, options)) for m in members):
        raise ValueError(f"no loss of {','.join(members)} reads a reference with these options, but one was given")
    first: LossOutput | None = None
    total: Tensor | None = None
    metrics: dict[str, Tensor] = {}
    for member, weight in zip(members, weights, strict=True):
        if member == SFT:
            losses = nll(policy, reduce=options.get("nll_reduce", "batch_token_mean"))
        else:
            own, spec = _own(member, options), LOSSES[member]
            output = spec.compute(policy, reference if spec.reads_reference(own) else None, own)
            first, losses = first or output, output.losses
        metrics[LOSS_METRIC + member] = losses.detach().mean()
        total = weight * losses if total is None else total + weight * losses
    assert first is not None and total is not None, members
    return replace(first, losses=total, metrics={**first.metrics, **metrics})


def checked_weights(members: Sequence[str], loss_weights: Sequence[float] | None) -> tuple[float, ...]:
    """The weight of each member. Raises ValueError unless there is one for each, none negative and not all 0."""
    if loss_weights is None:
        return (1.0,) * len(members)
    if isinstance(loss_weights, str) or len(loss_weights) != len(members):
        raise ValueError(
            f"loss_weights is {loss_weights!r}, expected {len(members)} numbers, one for each of {', '.join(members)}"
        )
    for weight in loss_weights:
        check_number("a number of loss_weights", weight, at_least=0.0)
    if not any(loss_weights):
        raise ValueError("loss_weights are all 0")
    return tuple(loss_weights)


def _own(member: str, options: Options) -> Options:
    """The options that this member has."""
    return {name: value for name, value in options.items() if name in LOSSES[member].options}


def _check_divergence(members: Sequence[str], options: Options) -> None:
    given = options.get("f_divergence", "reverse_kl")
    without = [m for m in members if m != SFT and LOSSES[m].needs_reference and "f_divergence" not in LOSSES[m].options]
    if given != "reverse_kl" and without:
        raise ValueError(f"f_divergence is {given!r}, but {', '.join(without)} has no form with another divergence")
