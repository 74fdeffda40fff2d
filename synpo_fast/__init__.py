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


def __getattr__(name: str) -> object:
    """score_pairs is resolved when asked for: it lives above transformers."""
    if name == "score_pairs":
        from synpo_fast.models import score_pairs

        return score_pairs
    raise AttributeError(f"module 'synpo_fast' has no attribute {name!r}")


__all__ = [
    "LOSSES",
    "FusedLinearDPOLoss",
    "FusedLinearPreferenceLoss",
    "FusedLinearSimPOLoss",
    "FusedLinearSynPOLoss",
    "__version__",
    "fused_linear_logprobs",
    "score_pairs",
]
