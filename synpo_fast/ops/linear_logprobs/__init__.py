"""Token log-probs of a linear head, computed without storing the logits; see linear_logprobs.py."""

from synpo_fast.ops.linear_logprobs.backends import BACKENDS, choose_backend
from synpo_fast.ops.linear_logprobs.linear_logprobs import (
    TokenOutputs,
    default_keep_bytes,
    fused_linear_logprobs,
    fused_linear_outputs,
    kept_bytes_per_row,
)
from synpo_fast.ops.linear_logprobs.mean_row import mean_row

__all__ = [
    "BACKENDS",
    "TokenOutputs",
    "choose_backend",
    "default_keep_bytes",
    "fused_linear_logprobs",
    "fused_linear_outputs",
    "kept_bytes_per_row",
    "mean_row",
]
