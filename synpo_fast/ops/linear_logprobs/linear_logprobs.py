"""fused_linear_logprobs: hidden states x LM head -> token log-probs, differentiable, without storing the logits.

    lp_n = log softmax( f(hidden[rows_n] @ weight.T + bias) )[labels_n],   f(x) = softcap * tanh(x * logit_scale / softcap)

d lp_n / d hidden does not depend on the loss: for z = f(x) it is (1 - p_n) z'_n W[y_n] - sum over v != y_n of p_nv z'_nv W[v].
So the forward pass computes that direction along with the log-prob (4*N*D*V in total), and the backward of any loss over token
log-probs is one multiplication per row. Gradients to the head need the coefficients of the loss, so the backward recomputes the
logits for them.

README.md in this folder counts the operations and bytes of each backend.
"""

import contextlib
import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs import chunked, host, native
from synpo_fast.ops.linear_logprobs.problem import Problem, make_problem
from synpo_fast.ops.linear_logprobs.reference import linear_logprobs_reference

BACKENDS = ("reference", "chunked", "native", "triton")


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
        backend: "reference", "chunked", "native" (CPU) or "triton" (GPU); None picks triton for CUDA tensors (but chunked
            for fp32 unless torch allows tf32), native for CPU tensors, and chunked where those are not available.

    hidden, weight and bias receive gradients if they require them. If none does, only half the work is done.

    Raises ValueError for shapes, dtypes, devices, numbers or indices that do not fit, and for a backend that cannot run here.
    On a GPU, checking for labels or rows out of range would need a device sync; instead, their log-prob is NaN.
    """
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
    chosen = (backend or "auto") if torch.compiler.is_compiling() else choose_backend(problem.hidden, backend)
    with without_autocast(problem.hidden):
        if chosen == "reference":
            logps = linear_logprobs_reference(problem)
        else:
            want_direction = torch.is_grad_enabled() and problem.hidden.requires_grad
            logps = _LinearLogprobs.apply(
                problem.hidden, weight, problem.bias, problem.labels, problem.rows,
                problem.logit_scale, problem.softcap, ignore_index, want_direction, chosen,
            )  # fmt: skip
    return logps.view(labels.shape)


def _autocast_is_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(tensor: Tensor) -> Any:
    """A context in which autocast is off: the op chooses its own precisions, so a surrounding autocast must not apply."""
    if _autocast_is_on(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def autocast_inputs(hidden: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """Casts the arguments as autocast casts those of a linear layer; returns them unchanged where autocast is off."""
    if not isinstance(hidden, Tensor) or not _autocast_is_on(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return _cast(hidden, dtype), _cast(weight, dtype), _cast(bias, dtype)


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor


def choose_backend(hidden: Tensor, wanted: str | None) -> str:
    """The backend that will run. Raises ValueError with the reason if the wanted one cannot."""
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {wanted!r}")
    if wanted in ("reference", "chunked"):
        return wanted
    device = hidden.device.type
    if wanted is None and device not in ("cpu", "cuda"):
        return "chunked"
    candidate = wanted or ("triton" if device == "cuda" else "native")
    if wanted is None and candidate == "triton" and _belongs_to_cublas(hidden.dtype):
        return "chunked"
    reason = _why_impossible(candidate, hidden.device, hidden.dtype)
    if reason is None:
        return candidate
    if wanted is not None:
        raise ValueError(f"backend={wanted!r} cannot be used here: {reason}")
    if hidden.dtype != torch.float64:
        _warn_once(f"fused_linear_logprobs uses backend='chunked', not {candidate!r}: {reason}")
    return "chunked"


def _belongs_to_cublas(dtype: torch.dtype) -> bool:
    """True for full fp32. It has no matrix instructions, and Triton's tiles of fused multiply-adds spill registers."""
    from synpo_fast.ops.linear_logprobs import triton_support

    return dtype == torch.float32 and not triton_support.tf32_allowed()


def _why_impossible(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend == "native":
        return native.reason_unusable(device.type, dtype)
    from synpo_fast.ops.linear_logprobs import triton_support

    return triton_support.reason_unusable(device.type, dtype) or triton_support.reason_too_old(device)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _module(backend: str) -> Any:
    if backend == "triton":
        from synpo_fast.ops.linear_logprobs import triton_launch

        return triton_launch
    return {"chunked": chunked, "native": native}[backend]


def forward(problem: Problem, want_direction: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probs [N], normalisers [n, 2] or [N, 2] and direction [n, D] or [N, D] (or [0, D]), without autograd."""
    if backend == "triton":
        return _module(backend).linear_logprobs_forward(problem, want_direction)
    return host.forward(_module(backend), problem, want_direction)


def backward(
    problem: Problem,
    grad_logps: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, bool, bool],
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if backend == "triton":
        return _module(backend).linear_logprobs_backward(problem, grad_logps, *saved, needs)
    return host.backward(_module(backend), problem, grad_logps, *saved, needs)


class _LinearLogprobs(torch.autograd.Function):
    """Autograd of the op. Saves the direction [n, D] for hidden's gradient and, for the head's, the normalisers (a, b) [n, 2]:
    softmax = exp(z - a) / b."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, want_direction, backend):
        problem = Problem(hidden, weight, labels, bias, rows, logit_scale, softcap, ignore_index)
        if _is_traced(hidden):
            logps, normalisers, direction = _traced_forward(
                hidden, weight, labels, bias, rows, logit_scale, softcap, ignore_index, want_direction, backend
            )
        else:
            logps, normalisers, direction = forward(problem, want_direction, backend)
        if any(ctx.needs_input_grad[1:3]):
            ctx.save_for_backward(hidden, weight, labels, bias, rows, logps, normalisers, direction)
        elif ctx.needs_input_grad[0]:
            # With a frozen head the backward needs only the direction, so only shapes of hidden, weight and log-probs are kept.
            shapes = [_shape_only(tensor) for tensor in (hidden, weight, logps)]
            ctx.save_for_backward(shapes[0], shapes[1], labels, None, rows, shapes[2], normalisers, direction)
        ctx.options = (logit_scale, softcap, ignore_index, backend)
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fused_linear_logprobs can be differentiated once, and create_graph=True asks for more; "
                "use backend='reference' for higher derivatives"
            )
        hidden, weight, labels, bias, rows, logps, normalisers, direction = ctx.saved_tensors
        *numbers, backend = ctx.options
        needs = tuple(ctx.needs_input_grad[:3])
        with without_autocast(hidden):
            if _is_traced(hidden):
                grads = _traced_backward(
                    grad_logps,
                    hidden,
                    weight,
                    labels,
                    bias,
                    rows,
                    logps,
                    normalisers,
                    direction,
                    *numbers,
                    *needs,
                    backend,
                )
                grads = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
            else:
                problem = Problem(hidden, weight, labels, bias, rows, *numbers)
                grads = backward(problem, grad_logps, (logps, normalisers, direction), needs, backend)
        return *grads, None, None, None, None, None, None, None


def _shape_only(tensor: Tensor) -> Tensor:
    """A tensor with the same shape, dtype and device that takes the memory of one element."""
    return tensor.new_zeros(()).expand(tensor.shape)


def _is_traced(hidden: Tensor) -> bool:
    """True under torch.compile and for tensors without values: the work is then one opaque operator with known output shapes."""
    if torch.compiler.is_compiling() or hidden.device.type == "meta":
        return True
    return type(hidden).__name__ == "FakeTensor"


def _padded(values: Tensor, num_rows: int) -> Tensor:
    """Pads [n, ...] to [num_rows, ...]: the output shapes of a traced operator must not depend on the labels' values."""
    if values.shape[0] == num_rows:
        return values
    return torch.cat([values, values.new_zeros(num_rows - values.shape[0], *values.shape[1:])])


def _choose_at_run_time(hidden: Tensor, requested: str) -> str:
    return choose_backend(hidden, None if requested == "auto" else requested)


@torch.library.custom_op("synpo_fast::linear_logprobs_forward", mutates_args=())
def _traced_forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor | None,
    logit_scale: float, softcap: float | None, ignore_index: int, want_direction: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = Problem(hidden, weight, labels, bias, rows, logit_scale, softcap, ignore_index)
    logps, normalisers, direction = forward(problem, want_direction, _choose_at_run_time(hidden, backend))
    num_labels = labels.shape[0]
    return logps, _padded(normalisers, num_labels), _padded(direction, num_labels if want_direction else 0)


@_traced_forward.register_fake
def _(hidden, weight, labels, bias, rows, logit_scale, softcap, ignore_index, want_direction, backend):
    logps = hidden.new_empty(labels.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    direction = hidden.new_empty(labels.shape[0] if want_direction else 0, hidden.shape[1])
    return logps, logps.new_empty(labels.shape[0], 2), direction


@torch.library.custom_op("synpo_fast::linear_logprobs_backward", mutates_args=())
def _traced_backward(
    grad_logps: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor | None,
    logps: Tensor, normalisers: Tensor, direction: Tensor, logit_scale: float, softcap: float | None, ignore_index: int,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = Problem(hidden, weight, labels, bias, rows, logit_scale, softcap, ignore_index)
    needs = (needs_hidden, needs_weight, needs_bias)
    grads = backward(problem, grad_logps, (logps, normalisers, direction), needs, _choose_at_run_time(hidden, backend))
    gh, gw, gb = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return gh, gw, gb


@_traced_backward.register_fake
def _(
    grad_logps, hidden, weight, labels, bias, rows, logps, normalisers, direction, logit_scale, softcap, ignore_index,
    needs_hidden, needs_weight, needs_bias, backend,
):  # fmt: skip
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0]) if needs_bias else hidden.new_empty(0),
    )
