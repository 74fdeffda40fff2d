"""Fast, reference-free preference training of video-language models.

Importing this package loads nothing: each name is resolved when it is first used, so that a command can print its first line
before torch is loaded. The losses and the fused op need only torch; score_pairs needs transformers.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from synpo_fast.fused import (
        FusedLinearCrossEntropyLoss,
        FusedLinearDPOLoss,
        FusedLinearKTOLoss,
        FusedLinearPreferenceLoss,
        FusedLinearSimPOLoss,
        FusedLinearSynPOLoss,
    )
    from synpo_fast.losses import LOSSES
    from synpo_fast.ops.linear_logprobs import fused_linear_logprobs, fused_linear_outputs
    from synpo_fast.scoring import score_pairs

__version__ = "0.3.0"

_MODULES = {
    "FusedLinearCrossEntropyLoss": "synpo_fast.fused",
    "FusedLinearDPOLoss": "synpo_fast.fused",
    "FusedLinearKTOLoss": "synpo_fast.fused",
    "FusedLinearPreferenceLoss": "synpo_fast.fused",
    "FusedLinearSimPOLoss": "synpo_fast.fused",
    "FusedLinearSynPOLoss": "synpo_fast.fused",
    "LOSSES": "synpo_fast.losses",
    "fused_linear_logprobs": "synpo_fast.ops.linear_logprobs",
    "fused_linear_outputs": "synpo_fast.ops.linear_logprobs",
    "score_pairs": "synpo_fast.scoring",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'synpo_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "LOSSES",
    "FusedLinearCrossEntropyLoss",
    "FusedLinearDPOLoss",
    "FusedLinearKTOLoss",
    "FusedLinearPreferenceLoss",
    "FusedLinearSimPOLoss",
    "FusedLinearSynPOLoss",
    "__version__",
    "fused_linear_logprobs",
    "fused_linear_outputs",
    "score_pairs",
]
