"""Contestants that need only PyTorch: the bare GEMMs (the floor), eager, torch.compile and F.linear_cross_entropy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import Step, Unavailable
from benchmarks.head.problem import IGNORE_INDEX, Inputs
from benchmarks.head.providers.base import differentiated, on_valid_rows


def _token_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Token log-probs: [N, D], [V, D], [N] -> [N], with logits in the inputs' dtype and softmax in fp32."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def gemm_floor(inputs: Inputs) -> Step:
    """The GEMMs that every contestant needs, on valid rows gathered beforehand, into buffers allocated beforehand."""
    hidden, weight = inputs.hidden.detach()[inputs.valid], inputs.weight.detach()
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if inputs.mode == "train" else None
    grad_weight = torch.empty_like(weight) if grad_hidden is not None and inputs.head == "trainable" else None

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden)
        if grad_weight is not None:
            torch.mm(logits.T, hidden, out=grad_weight)

    num_gemms = 1 + (grad_hidden is not None) + (grad_weight is not None)
    return Step(run, f"{num_gemms} bare GEMM{'s' if num_gemms > 1 else ''} on valid rows, outputs reused", exact=False)


def eager_all_rows(inputs: Inputs) -> Step:
    def forward() -> Tensor:
        mask = inputs.labels != IGNORE_INDEX
        labels = inputs.labels.masked_fill(~mask, 0)
        return _token_log_probs(inputs.hidden, inputs.weight, labels).masked_fill(~mask, 0.0)

    return differentiated(forward, inputs, "logits of all rows, fp32 log_softmax, gather, mask")


def eager_valid_rows(inputs: Inputs) -> Step:
    forward = on_valid_rows(lambda hidden, labels: _token_log_probs(hidden, inputs.weight, labels), inputs)
    return differentiated(forward, inputs, "hidden[mask] first, then fp32 log_softmax and gather")


def torch_compile(inputs: Inputs, *, mode: str | None = None) -> Step:
    """The compiled head. It uses F.cross_entropy, which the compiler fuses better than log_softmax and gather."""

    @torch.compile(dynamic=False, mode=mode)
    def token_log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
        return -F.cross_entropy((hidden @ inputs.weight.T).float(), labels, reduction="none")

    forward = on_valid_rows(token_log_probs, inputs)
    how = "dynamic=False" if mode is None else f"dynamic=False, mode={mode!r}"
    return differentiated(forward, inputs, f"hidden[mask] first, then fp32 F.cross_entropy, compiled with {how}")


def torch_compile_max_autotune(inputs: Inputs) -> Step:
    """The compiled head with its matrix products tuned, too.

    Without CUDA graphs: a graph keeps its buffers between calls, where the peak memory of a call does not show them, and each
    call writes over the results of the one before.
    """
    return torch_compile(inputs, mode="max-autotune-no-cudagraphs")


def torch_linear_ce(inputs: Inputs) -> Step:
    """torch's own linear cross entropy as it is without options: it stores the logits of all rows that it is given."""
    return _linear_cross_entropy(inputs, None, "options=None")


def torch_linear_ce_chunked(inputs: Inputs) -> list[Step]:
    """torch's linear cross entropy in chunks of rows; per token, its backward recomputes the logits.

    Its own choice of options was tuned on GPUs. On a CPU that choice takes chunks of 16 rows here and multiplies bf16 inputs in
    fp32, many times slower than the settings below, which multiply and sum in the dtype of the inputs.
    """
    _need_linear_cross_entropy()
    from torch.nn import LinearCrossEntropyOptions

    num_rows = len(inputs.valid)
    settings: dict[str, dict[str, Any]] = {}
    if inputs.hidden.device.type == "cuda":
        settings["LinearCrossEntropyOptions()"] = {}
        for size in (1024, 4096):
            settings[f"chunks of {size} rows, acc_policy='auto'"] = {"batch_chunk_size": size, "chunking_method": None}
    else:
        for size in sorted({min(256, num_rows), num_rows}):
            settings[f"chunks of {size} rows, acc_policy='compact', acc_dtype of the inputs"] = {
                "batch_chunk_size": size,
                "chunking_method": None,
                "acc_policy": "compact",
            }
    return [
        _linear_cross_entropy(inputs, LinearCrossEntropyOptions(**options), name) for name, options in settings.items()
    ]


def _linear_cross_entropy(inputs: Inputs, options: Any, setting: str) -> Step:
    _need_linear_cross_entropy()

    def token_log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, inputs.weight, labels, reduction="none", options=options)

    forward = on_valid_rows(token_log_probs, inputs)
    return differentiated(forward, inputs, f"reduction='none', {setting}, given valid rows only")


def _need_linear_cross_entropy() -> None:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy; torch 2.13 has")
