"""LOSSES: one entry per loss, by name. The order is that of the tables and of `--help`."""

from __future__ import annotations

from synpo_fast.losses.cpo import VARIANTS as CPO_VARIANTS
from synpo_fast.losses.cpo import cpo
from synpo_fast.losses.cpo_simpo import cpo_simpo
from synpo_fast.losses.dpo import VARIANTS as DPO_VARIANTS
from synpo_fast.losses.dpo import dpo
from synpo_fast.losses.kto import apo_zero_unpaired, kto
from synpo_fast.losses.nll import REDUCES
from synpo_fast.losses.orpo import orpo
from synpo_fast.losses.simpo import simpo
from synpo_fast.losses.spec import LossSpec
from synpo_fast.losses.synpo import LINKS, synpo
from synpo_fast.losses.synpo_ref import synpo_ref

LOSSES: dict[str, LossSpec] = {
    "synpo": LossSpec(
        function=synpo,
        reads="mean",
        reward="G",
        reward_unit="probability",
        formula="-link(alpha*(G+ - G-)) - beta*A+",
        choices={"link": LINKS},
    ),
    "dpo": LossSpec(
        function=dpo,
        needs_reference=True,
        reads="sum",
        reward="beta*r",
        reward_unit="beta·nats over the reference",
        formula="-logsigmoid(beta*(r+ - r-))",
        choices={"variant": DPO_VARIANTS},
    ),
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
    "kto": LossSpec(
        function=kto,
        needs_reference=True,
        reads="sum",
        reward="beta*r",
        reward_unit="beta·nats over the reference",
        formula="w+*(1 - sigmoid(beta*(r+ - z0))), w-*(1 - sigmoid(beta*(z0 - r-)))",
        unpaired=True,
        needs_kl=True,
    ),
    "apo_zero_unpaired": LossSpec(
        function=apo_zero_unpaired,
        needs_reference=True,
        reads="sum",
        reward="beta*r",
        reward_unit="beta·nats over the reference",
        formula="w+*(1 - sigmoid(beta*r+)), w-*sigmoid(beta*r-)",
        unpaired=True,
    ),
}
