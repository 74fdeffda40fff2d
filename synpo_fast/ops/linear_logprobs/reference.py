"""Backend "reference": the definition in plain torch, with materialised logits. Every other backend is tested against it.

Computes in fp64 for fp64 inputs and in fp32 otherwise; inputs are upcast before the product. Autograd can differentiate it any
number of times.
"""

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs.problem import Problem, valid_rows


def linear_logprobs_reference(problem: Problem) -> Tensor:
    dtype = torch.promote_types(problem.hidden.dtype, torch.float32)
    valid = valid_rows(problem)
    raw = valid.gather_hidden(problem).to(dtype) @ problem.weight.to(dtype).t()
    if problem.bias is not None:
        raw = raw + problem.bias.to(dtype)
    logps = torch.log_softmax(problem.logits(raw), dim=-1).gather(1, valid.labels[:, None]).squeeze(1)
    return valid.spread(logps, problem.labels.shape[0])
