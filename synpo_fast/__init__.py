"""Fast, reference-free preference training of video-language models.

Importing this package needs torch alone: what needs more is imported when it is first asked for.
"""

from synpo_fast.fused import (
    FusedLinearDPOLoss,
    FusedLinearPreferenceLoss,
    FusedLinearSimPOLoss,
    FusedLinearSynPOLoss,
)
from synpo_fast.losses import LOSSES
from synpo_fast.ops.linear_logprobs import fused_linear_logprobs

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "FusedLinearDPOLoss",
    "FusedLinearPreferenceLoss",
    "FusedLinearSimPOLoss",
    "FusedLinearSynPOLoss",
    "__version__",
    "fused_linear_logprobs",
]
