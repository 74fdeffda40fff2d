"""Token log-probs of a linear head, computed without storing the logits; see linear_logprobs.py."""

from synpo_fast.ops.linear_logprobs.linear_logprobs import BACKENDS, choose_backend, fused_linear_logprobs

__all__ = ["BACKENDS", "choose_backend", "fused_linear_logprobs"]
