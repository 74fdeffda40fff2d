"""Backend "reference": the definition in plain torch, with materialised logits. Every other backend is tested against it.

Computes in fp64 for fp64 inputs and in fp32 otherwise; inputs are upcast before the product. Autograd can differentiate it any
number of times.
"""

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs.problem import Problem, valid_rows


def linear_logprobs_reference(problem: Problem, want_stats: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probs [N] and logsumexp [N], both with autograd, and the other columns of STATS [N, 3] (or zeros)."""
    dtype = torch.promote_types(problem.hidden.dtype, torch.float32)
    valid = valid_rows(problem)
    raw = valid.gather_hidden(problem).to(dtype) @ problem.weight.to(dtype).t()
    if problem.bias is not None:
        raw = raw + problem.bias.to(dtype)
    logits, labels = problem.logits(raw), valid.labels[:, None]
    log_softmax = torch.log_softmax(logits, dim=-1)
    num_labels = problem.labels.shape[0]
    logps = valid.spread(log_softmax.gather(1, labels).squeeze(1), num_labels)
    if not want_stats:
        return logps, torch.zeros_like(logps), logps.new_zeros(num_labels, 3)
    with torch.no_grad():
        probs = log_softmax.exp()
        entropy = torch.special.entr(probs).sum(1)
        is_top1 = (logits.gather(1, labels).squeeze(1) >= logits.amax(1)).to(dtype) if labels.numel() else entropy
        others = torch.stack([entropy, is_top1, torch.logsumexp(2 * log_softmax, 1)], 1)
    return logps, valid.spread(torch.logsumexp(logits, 1), num_labels), valid.spread(others, num_labels)
