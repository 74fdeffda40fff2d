"""Token log-probs of a linear head, computed without storing the logits; see linear_logprobs.py."""

from synpo_fast.ops.linear_logprobs.backends import BACKENDS, choose_backend
from synpo_fast.ops.linear_logprobs.linear_logprobs import (
    TokenOutputs,
    default_keep_bytes,
    fused_linear_logprobs,
    fused_linear_outputs,
)

__all__ = [
    "BACKENDS",
    "TokenOutputs",
    "choose_backend",
    "default_keep_bytes",
    "fused_linear_logprobs",
    "fused_linear_outputs",
]
