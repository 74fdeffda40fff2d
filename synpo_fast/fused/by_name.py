"""SynPO, DPO and SimPO on hidden states and a head: FusedLinearPreferenceLoss with the arguments of one loss.

Those of DPO and SimPO are Liger's.
"""

from typing import Any

from synpo_fast.fused.preference import FusedLinearPreferenceLoss
from synpo_fast.losses import LOSSES, AuxiliaryNLL

DPO_TYPES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
    "ipo", "sigmoid_norm", "aot", "aot_unpaired",
)  # fmt: skip


class FusedLinearSynPOLoss(FusedLinearPreferenceLoss):
    """SynPO (arXiv 2506.00835) on hidden states and a head: -link(alpha (G+ - G-)) - beta A+.

    G is the geometric mean of a response's token probabilities, A the arithmetic mean; + is chosen, - rejected.

    Args:
        alpha: steepness of the contrast.
        beta: weight of the language term A+.
        link: "sigmoid" (the authors' code) or "logsigmoid".
        ignore_index: target entries that do not count (prompt, padding).
        settings: those of FusedLinearPreferenceLoss, such as softcap.

    Called with (lin_weight, _input, target, bias=None) it returns what FusedLinearPreferenceLoss returns.
    """

    def __init__(
        self, alpha: float = 30.0, beta: float = 0.2, link: str = "sigmoid", ignore_index: int = -100, **settings: Any
    ) -> None:
        super().__init__("synpo", ignore_index=ignore_index, alpha=alpha, beta=beta, link=link, **settings)


class FusedLinearDPOLoss(FusedLinearPreferenceLoss):
    """DPO and its relatives, with the arguments of LigerFusedLinearDPOLoss.

    loss_type: Liger's ten types (sigmoid, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, discopop),
    and ipo, sigmoid_norm, aot and aot_unpaired of TRL. nll_loss and a response whose targets are all ignored are treated as in
    Liger (like_liger); with average_log_prob Liger's loss is NaN for such a response, here its log-prob is 0.

    Args:
        beta: scale of the log-ratios to the reference.
        alpha: weight of the NLL on the chosen response, with compute_nll_loss.
        use_ref_model: with False the reference log-probs are 0, and a reference that is given is ignored. aot refuses False.
        average_log_prob: use means over tokens instead of sums.
        label_smoothing: for the types that have one. With "sigmoid" it gives conservative DPO; Liger ignores it there.
        discopop_tau: temperature of discopop. Other types refuse it, and those without smoothing refuse label_smoothing;
            Liger ignores both.
        compiled, chunk_size: tune Liger's implementation and have no effect here.
        settings: those of FusedLinearPreferenceLoss.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        **settings: Any,
    ) -> None:
        name = {"sigmoid": "dpo"}.get(loss_type, loss_type)
        if loss_type not in DPO_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(DPO_TYPES)}, got {loss_type!r}")
        optional = {"label_smoothing": (label_smoothing, 0.0), "discopop_tau": (discopop_tau, 0.05)}
        for option, (value, default) in optional.items():
            if option in LOSSES[name].options:
                settings[option] = value
            elif value != default:
                raise ValueError(f"loss_type {loss_type!r} has no {option}: leave it at {default}, got {value}")
        if "reference_free" in LOSSES[name].options:
            settings["reference_free"] = not use_ref_model
        elif not use_ref_model:
            raise ValueError(f"loss_type {loss_type!r} compares with a reference: use_ref_model=False is not possible")
        super().__init__(
            name,
            ignore_index=ignore_index,
            auxiliary=_chosen_nll(alpha) if compute_nll_loss else None,
            average_log_prob=average_log_prob,
            beta=beta,
            like_liger=True,
            **settings,
        )


class FusedLinearSimPOLoss(FusedLinearPreferenceLoss):
    """SimPO with the arguments of LigerFusedLinearSimPOLoss, including its default beta of 0.1.

    Args:
        beta, gamma: scale of the mean log-probs, and the target margin for the scaled difference.
        alpha: weight of the NLL on the chosen response, with compute_nll_loss.
        compiled, chunk_size: tune Liger's implementation and have no effect here.
        settings: those of FusedLinearPreferenceLoss.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(
            "simpo",
            ignore_index=ignore_index,
            auxiliary=_chosen_nll(alpha) if compute_nll_loss else None,
            beta=beta,
            gamma=gamma,
            label_smoothing=label_smoothing,
            like_liger=True,
            **settings,
        )


def _chosen_nll(weight: float) -> AuxiliaryNLL:
    """Liger's NLL term: the mean over all chosen tokens of the batch."""
    return AuxiliaryNLL(target="chosen", weight=weight, reduce="batch_token_mean")
