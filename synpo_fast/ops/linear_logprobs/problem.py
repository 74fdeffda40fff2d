"""The input of every backend of `fused_linear_logprobs`: checked and flattened to two dimensions."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@dataclass(frozen=True)
class Problem:
    """Checked arguments: hidden [M, D], weight [V, D], labels [N], bias [V], rows [N] into hidden (None: row n is hidden n)."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    rows: Tensor | None
    logit_scale: float
    softcap: float | None
    ignore_index: int

    def logits(self, raw: Tensor) -> Tensor:
        """f(raw): scale, then softcap."""
        logits = raw * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative df/draw, computed from the logit alone."""
        if self.softcap is None:
            return self.logit_scale
        return self.logit_scale * (1 - (logits / self.softcap) ** 2)


@dataclass(frozen=True)
class Wanted:
    """The results that a forward computes in addition to the log-probs.

    direction: d lp / d hidden of each valid row.
    keep_rows: keep the exponentials of up to this many valid rows, with which the head's gradient needs no second pass over the
        logits. It may be more than 0 without the direction, where only the head trains.
    bounded: True if keep_rows is all that a memory bound allows, so that leaving rows out is worth a warning.
    stats: the columns of STATS.
    logsumexp_grad: a gradient may come back through logsumexp.
    """

    direction: bool
    keep_rows: int = 0
    bounded: bool = False
    stats: bool = False
    logsumexp_grad: bool = False


STATS = ("logsumexp", "entropy", "is_top1", "log_sum_sq_probs")


@dataclass(frozen=True)
class Computed:
    """The results of a forward, without autograd. N labels, of which the n valid ones come first in "compacted" tensors.

    logps: [N], in label order, 0 where ignored.
    normalisers: [n, 2] or [N, 2], compacted: (a, b) with softmax = exp(z - a) / b.
    direction: [n, D] or [N, D], compacted, [0, D] if not wanted; its dtype is direction_dtype's.
    exponentials: [k, V] or wider, of the first k compacted rows. E = exp(z - a), times z' with a softcap. The target's entry is
        replaced by -(b - e_target) z', without the factor logit_scale that the others lack, so that -c / b * E (times
        logit_scale without a softcap) is the gradient of c * lp with respect to every raw logit.
    stats: [N, 4] fp32 in label order, 0 where ignored: see STATS; [0, 4] if not wanted.
    """

    logps: Tensor
    normalisers: Tensor
    direction: Tensor
    exponentials: Tensor
    stats: Tensor


def direction_dtype(dtype: torch.dtype, logsumexp_grad: bool) -> torch.dtype:
    """Dtype of the direction for inputs of `dtype`: fp32 where 16 bits would lose its small values, otherwise the same.

    In fp16, 1 - p of a confident token is below the smallest number until the loss scale multiplies it. The gradient through
    logsumexp subtracts the direction from a row of W, which is much larger than the difference.
    """
    return torch.float32 if dtype == torch.float16 or (logsumexp_grad and dtype == torch.bfloat16) else dtype


@dataclass(frozen=True)
class ValidRows:
    """The n positions whose label is not ignored, in order. Host-driven backends compute only these."""

    positions: Tensor | None  # [n] into the labels; None: all of them
    sources: Tensor | None  # [n] into hidden's rows; None: row n is hidden n
    labels: Tensor  # [n]

    def gather_hidden(self, problem: Problem) -> Tensor:
        """Picks the hidden rows of the valid positions, [M, D] -> [n, D]. Copies only if needed."""
        return problem.hidden if self.sources is None else problem.hidden.index_select(0, self.sources)

    def scatter_hidden(self, grads: Tensor, problem: Problem) -> Tensor:
        """Scatters gradients back, [n, D] -> [M, D]. Gradients of a row that was picked more than once add up."""
        if self.sources is None:
            return grads
        return grads.new_zeros(problem.hidden.shape).index_add_(0, self.sources, grads)

    def gather(self, values: Tensor) -> Tensor:
        """Picks the valid positions, [N] -> [n]."""
        return values if self.positions is None else values.index_select(0, self.positions)

    def spread(self, values: Tensor, num_labels: int) -> Tensor:
        """Scatters values back, [n, ...] -> [N, ...], with 0 where the label is ignored."""
        if self.positions is None:
            return values
        return values.new_zeros(num_labels, *values.shape[1:]).index_copy_(0, self.positions, values)


def valid_rows(problem: Problem) -> ValidRows:
    """Finds the positions that are not ignored and checks the indices. The host reads them: free on a CPU, a sync on a GPU."""
    labels = problem.labels
    positions: Tensor | None = None
    kept = labels != problem.ignore_index
    if not bool(kept.all()):
        positions = kept.nonzero().squeeze(1)
        labels = labels.index_select(0, positions)
    sources = positions
    if problem.rows is not None:
        sources = problem.rows if positions is None else problem.rows.index_select(0, positions)
        _check_range("rows", sources, positions, problem.hidden.shape[0], "the rows of hidden")
    _check_range(
        "labels",
        labels,
        positions,
        problem.weight.shape[0],
        f"the vocabulary, and not ignore_index={problem.ignore_index}",
    )
    return ValidRows(positions, sources, labels)


def _check_range(name: str, values: Tensor, positions: Tensor | None, size: int, what: str) -> None:
    if values.numel() == 0:
        return
    low, high = (int(bound) for bound in values.aminmax())
    if low >= 0 and high < size:
        return
    index = int(((values < 0) | (values >= size)).nonzero()[0])
    position = index if positions is None else int(positions[index])
    raise ValueError(f"{name}[{position}] = {int(values[index])} is outside [0, {size}), {what}")


def make_problem(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    rows: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> Problem:
    """Checks everything that can be checked without reading tensor values, and flattens the tensors."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels), ("bias", bias), ("rows", rows)):
        if tensor is None and name in ("bias", "rows"):
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if is_traceable_wrapper_subclass(tensor):
            raise ValueError(_way_out_of_wrapper(name, tensor))
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}")
    _check_shapes(hidden, weight, labels, bias, rows)
    _check_dtypes(hidden, weight, labels, bias, rows)
    check_numbers(logit_scale, softcap, ignore_index)
    return Problem(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        labels=labels.reshape(-1).long().contiguous(),
        bias=None if bias is None else bias.contiguous(),
        rows=None if rows is None else rows.reshape(-1).long().contiguous(),
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        ignore_index=ignore_index,
    )


def _way_out_of_wrapper(name: str, tensor: Tensor) -> str:
    """The message for a tensor that wraps others (DTensor, torchao's quantised ones): the kernels would read a null pointer."""
    kind = type(getattr(tensor, "data", tensor)).__name__
    if hasattr(tensor, "full_tensor"):
        return (
            f"{name} is a {kind}, sharded over processes: gather it inside the forward of the module that holds it "
            f"({name}.full_tensor()), or read it inside the forward of the model that FSDP or DeepSpeed wraps, where it is whole"
        )
    way_out = f"{name}.wait()" if hasattr(tensor, "wait") else f"{name}.dequantize()"
    return f"{name} is a {kind}, which has no memory of its own: pass a plain tensor, such as {way_out}"


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor | None) -> None:
    if hidden.dim() < 1 or weight.dim() != 2:
        raise ValueError(
            f"hidden must be [..., D] and weight [V, D], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has D={hidden.shape[-1]} features but weight [V, D] is {list(weight.shape)}")
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight [V, D] must not be empty, got {list(weight.shape)}")
    if rows is None and labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have the leading shape of hidden, {list(hidden.shape[:-1])}, got {list(labels.shape)}; "
            "pass rows to pick hidden rows yourself"
        )
    if rows is not None and rows.shape != labels.shape:
        raise ValueError(f"rows must have one index per label, {list(labels.shape)}, got {list(rows.shape)}")
    if rows is not None and rows.numel() and hidden.numel() == 0:
        raise ValueError(f"rows picks {rows.numel()} rows but hidden {list(hidden.shape)} has none")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got {list(bias.shape)}")


def _check_dtypes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor | None) -> None:
    if hidden.dtype not in (*FLOAT_DTYPES, torch.float64):
        raise ValueError(f"hidden must be float32, bfloat16, float16 or float64, got {hidden.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but hidden is {hidden.dtype}; cast one, or use torch.autocast")
    for name, tensor in (("labels", labels), ("rows", rows)):
        if tensor is not None and tensor.dtype not in LABEL_DTYPES:
            raise ValueError(f"{name} must hold integers, got {tensor.dtype}")


def check_numbers(logit_scale: float, softcap: float | None, ignore_index: int) -> None:
    """Raises ValueError for numbers that are not finite and non-zero in fp32, the type in which the kernels take them."""
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if value is None and name == "softcap":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if value != value or not abs(value) <= largest:
            raise ValueError(f"{name} must be finite in float32, got {value}")
        if abs(value) < smallest:
            raise ValueError(f"{name} must not be 0 in float32, got {value}: every logit would be the same")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int) or not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be a 64-bit integer, got {ignore_index!r}")
