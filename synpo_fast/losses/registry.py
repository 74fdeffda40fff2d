"""LOSSES: one entry per loss, by name. The order is that of the tables and of `--help`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from synpo_fast.losses.cpo import VARIANTS as CPO_VARIANTS
from synpo_fast.losses.cpo import cpo
from synpo_fast.losses.cpo_simpo import cpo_simpo
from synpo_fast.losses.dpo import VARIANTS as DPO_VARIANTS
from synpo_fast.losses.dpo import dpo
from synpo_fast.losses.dpo_types.aot import aot, aot_unpaired
from synpo_fast.losses.dpo_types.difference import discopop, exo_pair, hinge, ipo, robust, sigmoid_norm
from synpo_fast.losses.dpo_types.f_divergence import DIVERGENCES
from synpo_fast.losses.dpo_types.per_response import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from synpo_fast.losses.kto import apo_zero_unpaired, kto
from synpo_fast.losses.nll import REDUCES
from synpo_fast.losses.orpo import orpo
from synpo_fast.losses.pair import LossOutput
from synpo_fast.losses.simpo import simpo
from synpo_fast.losses.spec import LossSpec
from synpo_fast.losses.synpo import LINKS, synpo
from synpo_fast.losses.synpo_ref import synpo_ref


def _dpo_type(
    function: Callable[..., LossOutput], formula: str, *, sorts_batch: bool = False, **choices: tuple[str, ...]
) -> LossSpec:
    """The entry of a loss of log-ratios to a reference, whose reward is DPO's."""
    return LossSpec(
        function=function,
        reads="sum",
        reward="beta*r",
        reward_unit="beta·nats over the reference",
        formula=formula,
        needs_reference=True,
        choices=choices,
        sorts_batch=sorts_batch,
    )


LOSSES: dict[str, LossSpec] = {
    "synpo": LossSpec(
        function=synpo,
        reads="mean",
        reward="G",
        reward_unit="probability",
        formula="-link(alpha*(G+ - G-)) - beta*A+",
        choices={"link": LINKS},
    ),
    "dpo": _dpo_type(dpo, "-logsigmoid(beta*(r+ - r-))", variant=DPO_VARIANTS, f_divergence=DIVERGENCES),
    "simpo": LossSpec(
        function=simpo,
        reads="mean",
        reward="beta*m",
        reward_unit="beta·nats per token",
        formula="-logsigmoid(beta*(m+ - m-) - gamma)",
    ),
    "orpo": LossSpec(
        function=orpo,
        reads="mean",
        reward="beta*m",
        reward_unit="beta·nats per token",
        has_nll=True,
        formula="NLL+ - beta*logsigmoid(log(odds+/odds-))",
        choices={"nll_reduce": REDUCES},
    ),
    "cpo": LossSpec(
        function=cpo,
        reads="sum",
        reward="beta*S",
        reward_unit="beta·nats per response",
        has_nll=True,
        formula="-logsigmoid(beta*(S+ - S-)) + nll_weight*NLL+",
        choices={"variant": CPO_VARIANTS, "nll_reduce": REDUCES},
    ),
    "hinge": _dpo_type(hinge, "max(0, 1 - beta*(r+ - r-))", f_divergence=DIVERGENCES),
    "ipo": _dpo_type(ipo, "(r+/T+ - r-/T- - 1/(2*beta))^2", f_divergence=DIVERGENCES),
    "sigmoid_norm": _dpo_type(sigmoid_norm, "-logsigmoid(beta*(r+/T+ - r-/T-))", f_divergence=DIVERGENCES),
    "robust": _dpo_type(
        robust,
        "((eps-1)*logsigmoid(beta*(r+ - r-)) + eps*logsigmoid(-beta*(r+ - r-))) / (1-2*eps)",
        f_divergence=DIVERGENCES,
    ),
    "exo_pair": _dpo_type(exo_pair, "KL(sigmoid(beta*(r+ - r-)), to 1-eps)", f_divergence=DIVERGENCES),
    "discopop": _dpo_type(
        discopop, "-logsigmoid(z)*(1-m) + exp(-z)*m, z = beta*(r+ - r-), m = sigmoid(z/tau)", f_divergence=DIVERGENCES
    ),
    "nca_pair": _dpo_type(nca_pair, "-logsigmoid(beta*r+) - logsigmoid(-beta*r+)/2 - logsigmoid(-beta*r-)/2"),
    "bco_pair": _dpo_type(bco_pair, "-logsigmoid(beta*r+) - logsigmoid(-beta*r-)"),
    "sppo_hard": _dpo_type(sppo_hard, "(r+ - 1/(2*beta))^2 + (r- + 1/(2*beta))^2"),
    "apo_zero": _dpo_type(apo_zero, "sigmoid(-beta*r+) + sigmoid(beta*r-)"),
    "apo_down": _dpo_type(apo_down, "sigmoid(beta*r+) + sigmoid(-beta*(r+ - r-))"),
    "aot": _dpo_type(aot, "-logsigmoid(beta*(sort(S+ - S-) - sort(ref S+ - ref S-)))", sorts_batch=True),
    "aot_unpaired": _dpo_type(aot_unpaired, "-logsigmoid(beta*(sort(r+) - sort(r-)))", sorts_batch=True),
    "cpo_simpo": LossSpec(
        function=cpo_simpo,
        reads="mean",
        reward="beta*m",
        reward_unit="beta·nats per token",
        has_nll=True,
        formula="-logsigmoid(beta*(m+ - m-) - gamma) + nll_weight*NLL+",
        choices={"nll_reduce": REDUCES},
    ),
    "synpo_ref": LossSpec(
        function=synpo_ref,
        needs_reference=True,
        reads="mean",
        reward="G - Gref",
        reward_unit="probability over the reference",
        formula="-link(alpha*((G+ - Gref+) - (G- - Gref-))) - beta*A+",
        choices={"link": LINKS},
    ),
    "kto": replace(
        _dpo_type(kto, "w+*(1 - sigmoid(beta*(r+ - z0))), w-*(1 - sigmoid(beta*(z0 - r-)))"),
        unpaired=True,
        needs_kl=True,
    ),
    "apo_zero_unpaired": replace(
        _dpo_type(apo_zero_unpaired, "w+*(1 - sigmoid(beta*r+)), w-*sigmoid(beta*r-)"), unpaired=True
    ),
}
