"""Units of a loss's metrics: the loss itself, its rewards and its log-probs.

All losses use the same metric names (rewards/chosen, logps/chosen, ...). But SynPO's reward is a probability and DPO's is a
scaled log-ratio, and some losses use means of log-probs while others use sums. Code that compares two losses checks here if their
metrics have the same unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from synpo_fast.losses import LOSSES

LOGPS_UNITS = {"mean": "nats per token", "sum": "nats per response"}  # by what the loss reads
SFT = "sft"  # the trainer's name for the NLL of the chosen response alone
Options = Mapping[str, Any]


def loss_unit(name: str, options: Options | None = None, *, auxiliary_nll: float = 0.0) -> str:
    """The unit of the loss: nats per token for an NLL, else the loss's name with its form if not the default, and added terms."""
    if name == SFT:
        return LOGPS_UNITS["mean"]
    spec, given = _spec(name), options or {}
    # An option that takes words chooses the loss's form, except nll_reduce, which keeps the unit of its NLL.
    forms = [
        str(given[key])
        for key in spec.choices
        if key != "nll_reduce" and given.get(key) not in (None, spec.options[key])
    ]
    added = [f"+ {auxiliary_nll:g} NLL"] if auxiliary_nll else []
    return " ".join([name, *forms, "loss", *added])


def reward_unit(name: str, options: Options | None = None) -> str:
    """The unit of rewards/chosen, rewards/rejected and rewards/margins. If the reward is multiplied by beta, the unit includes
    beta, because the same log-probs give other rewards with another beta."""
    spec = _spec(name)
    unit = spec.reward_unit
    if spec.needs_reference and not spec.reads_reference(options or {}):
        unit = f"beta·{LOGPS_UNITS[spec.reads]}"
    if not unit.startswith("beta"):
        return unit
    beta = (options or {}).get("beta")
    return f"{unit}, beta={spec.options['beta'] if beta is None else beta:g}"


def logps_unit(name: str) -> str:
    """The unit of logps/chosen and logps/rejected."""
    return LOGPS_UNITS[_spec(name).reads]


def describe_units(name: str, options: Options | None = None) -> str:
    """One line for the user that describes this loss's rewards and log-probs."""
    if name == SFT:
        return f"loss in {LOGPS_UNITS['mean']}"
    spec = _spec(name)
    return f"rewards are {spec.reward} ({reward_unit(name, options)}), log-probs {spec.reads}s ({logps_unit(name)})"


def _spec(name: str) -> Any:
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}, expected one of {', '.join(LOSSES)}")
    return LOSSES[name]
