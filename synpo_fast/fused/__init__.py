"""Losses on hidden states and a head as modules with Liger's signatures: op and loss in one, without storing the logits."""

from synpo_fast.fused.by_name import FusedLinearDPOLoss, FusedLinearSimPOLoss, FusedLinearSynPOLoss
from synpo_fast.fused.cross_entropy import CrossEntropyOutput, FusedLinearCrossEntropyLoss
from synpo_fast.fused.kto import FusedLinearKTOLoss
from synpo_fast.fused.preference import FusedLinearPreferenceLoss

__all__ = [
    "CrossEntropyOutput",
    "FusedLinearCrossEntropyLoss",
    "FusedLinearDPOLoss",
    "FusedLinearKTOLoss",
    "FusedLinearPreferenceLoss",
    "FusedLinearSimPOLoss",
    "FusedLinearSynPOLoss",
]
