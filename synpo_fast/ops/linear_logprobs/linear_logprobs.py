"""fused_linear_logprobs: hidden states x LM head -> token log-probs, differentiable, without storing the logits.

    lp_n = log softmax( f(hidden[rows_n] @ weight.T + bias) )[labels_n],   f(x) = softcap * tanh(x * logit_scale / softcap)

d lp_n / d hidden does not depend on the loss: for z = f(x) it is (1 - p_n) z'_n W[y_n] - sum over v != y_n of p_nv z'_nv W[v].
So the forward pass computes that direction along with the log-prob (4*N*D*V in total), and the backward of any loss over token
log-probs is one multiplication per row. The gradient to the head is one more product if the forward kept the exponentials of
the logits (6*N*D*V), which it does for as many rows as `keep_bytes` allows; the logits of the other rows are computed again.

`fused_linear_outputs` returns with the log-probs what users read off logits: logsumexp, entropy, accuracy, the sum of squared
probabilities. A gradient c' that arrives at logsumexp adds c' p z' to that of the logits. This is c' z' onehot - c' (onehot - p)
z': one row of W per token, and the backward of a log-prob with the coefficient -c'.

README.md in this folder counts the operations and bytes of each backend.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs.autocast import autocast_inputs, without_autocast
from synpo_fast.ops.linear_logprobs.autograd import LinearLogprobs
from synpo_fast.ops.linear_logprobs.backends import choose_backend
from synpo_fast.ops.linear_logprobs.mean_row import MeanRow
from synpo_fast.ops.linear_logprobs.problem import Problem, Wanted, make_problem
from synpo_fast.ops.linear_logprobs.reference import linear_logprobs_reference
from synpo_fast.ops.linear_logprobs.traced import is_traced

KEEP_BYTES = {"cpu": 2**30, "cuda": 2 * 2**30}


@dataclass(frozen=True, eq=False)
class TokenOutputs:
    """Values of each label's position, shaped like the labels, 0 where ignored. The first two carry gradients.

    logps: log-prob of the label. logsumexp: log of the sum of exp(logit) over the vocabulary. entropy: in nats.
    is_top1: True if no other logit exceeds the label's. log_sum_sq_probs: log of the sum of squared probabilities.
    mean_logits: mean logit over the vocabulary, with gradients; None unless requested.
    """

    logps: Tensor
    logsumexp: Tensor
    entropy: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor | None = None

    def detach(self) -> "TokenOutputs":
        """The same values without their graph."""
        mean_logits = None if self.mean_logits is None else self.mean_logits.detach()
        return replace(self, logps=self.logps.detach(), logsumexp=self.logsumexp.detach(), mean_logits=mean_logits)

    def split(self, lengths: list[int]) -> "list[TokenOutputs]":
        """Cuts 1-D outputs into parts of these lengths."""
        values = [getattr(self, field.name) for field in fields(self)]
        columns = [[None] * len(lengths) if each is None else each.split(lengths) for each in values]
        return [TokenOutputs(*parts) for parts in zip(*columns, strict=True)]


def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    keep_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each label under a linear head, as fp32 (fp64 for fp64 inputs) shaped like `labels`.

    Args:
        hidden: [..., D] hidden states in fp32, bf16 or fp16 (fp64: backends "reference" and "chunked").
        weight: [V, D], the head; same dtype and device as hidden.
        labels: [...] integers, already shifted: labels[i] is what hidden[i] predicts. Entries equal to ignore_index
            give 0 and cost nothing.
        bias: [V], optional.
        rows: one index per label into the flattened hidden rows; an index may repeat and its gradients add up. Without
            it labels and hidden have the same leading shape.
        logit_scale, softcap: logits are multiplied by logit_scale, then softcap * tanh(logits / softcap).
        keep_bytes: if the head trains, memory for exponentials of the logits, kept until the backward. They take V numbers
            per valid label, in hidden's dtype (fp16: fp32 on a CPU, none on a GPU). The logits of other labels are computed
            twice. None: 2 GiB on a GPU, 1 GiB on a CPU.
        backend: "reference", "chunked", "native" (CPU) or "triton" (GPU); None picks triton for CUDA tensors (but chunked
            for fp32 unless torch allows tf32), native for CPU tensors, and chunked where those are not available.

    hidden, weight and bias receive gradients if they require them. If none does, only half the work is done.

    Raises ValueError for shapes, dtypes, devices, numbers or indices that do not fit, and for a backend that cannot run here.
    On a GPU the backend triton gives a label or row out of range the log-prob NaN, because a check would need a device sync;
    the others check, and raise.
    """
    problem, chosen = _prepare(hidden, weight, labels, bias, rows, logit_scale, softcap, ignore_index, backend)
    return _run(problem, chosen, keep_bytes)[0].view(labels.shape)


def fused_linear_outputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    keep_bytes: int | None = None,
    logsumexp_grad: bool = True,
    with_mean_logits: bool = False,
    backend: str | None = None,
) -> TokenOutputs:
    """Log-probs and what else a trainer reads off logits, from the same pass: see TokenOutputs.

    Arguments and errors are those of fused_linear_logprobs. The results are fp32 (fp64 for fp64 inputs), is_top1 is bool. Equal
    largest logits all count as the top. A gradient through logsumexp costs N*D operations more.

    logsumexp_grad: False detaches logsumexp, which saves memory: the head's weight need not be kept for the backward, and the
        direction may have hidden's dtype.
    with_mean_logits: also return the mean logit of each position, which label smoothing needs. It is hidden x the mean row of
        the weight, so a softcap is refused.
    """
    problem, chosen = _prepare(hidden, weight, labels, bias, rows, logit_scale, softcap, ignore_index, backend)
    logps, logsumexp, others = _run(problem, chosen, keep_bytes, stats=True, logsumexp_grad=logsumexp_grad)
    entropy, is_top1, log_sum_sq_probs = (column.view(labels.shape) for column in others.unbind(1))
    mean_logits = _mean_logits(problem).view(labels.shape) if with_mean_logits else None
    return TokenOutputs(
        logps.view(labels.shape), logsumexp.view(labels.shape), entropy, is_top1 > 0, log_sum_sq_probs, mean_logits
    )


def _mean_logits(problem: Problem) -> Tensor:
    """Mean logit over the vocabulary of each label's position, [N], 0 where ignored, with autograd."""
    if problem.softcap is not None:
        raise ValueError(
            f"mean logits are not available with a softcap ({problem.softcap}): they are not linear in hidden"
        )
    dtype = torch.promote_types(problem.hidden.dtype, torch.float32)
    counted = problem.labels != problem.ignore_index
    hidden = problem.hidden
    if problem.rows is not None:
        hidden = hidden.index_select(0, torch.where(counted, problem.rows, 0).clamp(0, max(0, hidden.shape[0] - 1)))
    with without_autocast(hidden):
        means = hidden.to(dtype) @ MeanRow.apply(problem.weight)
        if problem.bias is not None:
            means = means + problem.bias.to(dtype).mean()
    return torch.where(counted, means * problem.logit_scale, 0.0)


def _prepare(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor | None, logit_scale: float,
    softcap: float | None, ignore_index: int, backend: str | None,
) -> tuple[Problem, str]:  # fmt: skip
    """Checks the arguments, casts them as autocast wants, and chooses the backend."""
    if hasattr(torch._C, "_are_functorch_transforms_active") and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fused_linear_logprobs does not support torch.func transforms (grad, vmap, jvp); use torch.autograd, "
            "or materialise the logits"
        )
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    problem = make_problem(
        hidden, weight, labels,
        bias=bias, rows=rows, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
    )  # fmt: skip
    # A compiled graph stores the requested backend; the operator inside it chooses when it runs.
    return problem, (backend or "auto") if torch.compiler.is_compiling() else choose_backend(problem.hidden, backend)


def _run(
    problem: Problem, backend: str, keep_bytes: int | None, stats: bool = False, logsumexp_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probs [N], logsumexp [N] and the other columns of STATS [N, 3] (the last two zeros or empty without stats)."""
    if keep_bytes is not None and (isinstance(keep_bytes, bool) or not isinstance(keep_bytes, int) or keep_bytes < 0):
        raise ValueError(f"keep_bytes must be a number of bytes, got {keep_bytes!r}")
    with without_autocast(problem.hidden):
        if backend == "reference":
            logps, logsumexp, others = linear_logprobs_reference(problem, stats)
            return logps, logsumexp if logsumexp_grad else logsumexp.detach(), others
        grad = torch.is_grad_enabled()
        head = problem.weight.requires_grad or (problem.bias is not None and problem.bias.requires_grad)
        keep_rows, bounded = _rows_to_keep(problem, keep_bytes, backend) if grad and head else (0, False)
        wanted = Wanted(
            direction=grad and problem.hidden.requires_grad,
            keep_rows=keep_rows,
            bounded=bounded,
            stats=stats,
            logsumexp_grad=grad and logsumexp_grad,
        )
        return LinearLogprobs.apply(
            problem.hidden, problem.weight, problem.bias, problem.labels, problem.rows,
            problem.logit_scale, problem.softcap, problem.ignore_index, wanted, backend,
        )  # fmt: skip


def _rows_to_keep(problem: Problem, keep_bytes: int | None, backend: str) -> tuple[int, bool]:
    """The number of rows whose exponentials are kept, and whether it is all that the bound allows."""
    hidden, num_labels = problem.hidden, problem.labels.shape[0]
    # fp16 cannot hold both the exponentials beside a confident target and the target's entry, which can reach V. The native
    # backend keeps fp32 for fp16 inputs.
    if hidden.dtype == torch.float16 and backend != "native":
        return 0, False
    if hidden.dtype == torch.float16 and is_traced(hidden):
        return 0, False  # the dtype that the backend keeps must be known before one is chosen
    allowed = default_keep_bytes(hidden.device) if keep_bytes is None else keep_bytes
    rows = min(num_labels, allowed // kept_bytes_per_row(hidden.dtype, hidden.device, problem.weight.shape[0]))
    return rows, rows < num_labels and keep_bytes != 0


def kept_bytes_per_row(dtype: torch.dtype, device: torch.device, vocabulary: int) -> int:
    """Memory of one label's exponentials, for inputs of a dtype."""
    return vocabulary * (4 if device.type == "cpu" and dtype == torch.float16 else dtype.itemsize)


def default_keep_bytes(device: torch.device) -> int:
    """Memory that one call may take for exponentials if keep_bytes is None."""
    return KEEP_BYTES["cpu" if device.type == "cpu" else "cuda"]
