"""Units of a loss's metrics: the loss itself, its rewards and its log-probs.

All losses use the same metric names (rewards/chosen, logps/chosen, ...). But SynPO's reward is a probability and DPO's is a
scaled log-ratio, and some losses use means of log-probs while others use sums. Code that compares two losses checks here if their
metrics have the same unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from synpo_fast.losses.weighted_sum import SFT, SumSpec, checked_weights, spec_of

LOGPS_UNITS = {"mean": "nats per token", "sum": "nats per response"}  # by what the loss reads
Options = Mapping[str, Any]


def loss_unit(name: str, options: Options | None = None, *, auxiliary_nll: float = 0.0) -> str:
    """The unit of the loss: nats per token for an NLL, else the loss's name with its form if not the default, and added terms.

    A sum is named by its members and their weights.
    """
    if name == SFT:
        return LOGPS_UNITS["mean"]
    spec, given = spec_of(name), options or {}
    own = name
    if isinstance(spec, SumSpec):
        weights = checked_weights(spec.members, given.get("loss_weights"))
        own = " + ".join(f"{weight:g} {member}" for member, weight in zip(spec.members, weights, strict=True))
    # An option that takes words chooses the loss's form, except nll_reduce, which keeps the unit of its NLL.
    forms = [
        str(given[key])
        for key in spec.choices
        if key != "nll_reduce" and given.get(key) not in (None, spec.options[key])
    ]
    added = [f"+ {auxiliary_nll:g} NLL"] if auxiliary_nll else []
    return " ".join([own, *forms, "loss", *added])


def reward_unit(name: str, options: Options | None = None) -> str:
    """The unit of rewards/chosen, rewards/rejected and rewards/margins. If the reward is multiplied by beta, the unit includes
    beta, because the same log-probs give other rewards with another beta."""
    spec = spec_of(name)
    unit = spec.reward_unit
    if spec.needs_reference and not spec.reads_reference(dict(options or {})):
        unit = f"beta·{LOGPS_UNITS[spec.reads]}"
    if not unit.startswith("beta"):
        return unit
    beta = (options or {}).get("beta")
    return f"{unit}, beta={spec.options['beta'] if beta is None else beta:g}"


def logps_unit(name: str) -> str:
    """The unit of logps/chosen and logps/rejected."""
    return LOGPS_UNITS[spec_of(name).reads]


def describe_units(name: str, options: Options | None = None) -> str:
    """One line for the user that describes this loss's rewards and log-probs."""
    if name == SFT:
        return f"loss in {LOGPS_UNITS['mean']}"
    spec = spec_of(name)
    return f"rewards are {spec.reward} ({reward_unit(name, options)}), log-probs {spec.reads}s ({logps_unit(name)})"
