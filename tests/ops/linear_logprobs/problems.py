"""Inputs for the tests of fused_linear_logprobs, their fp64 truth, and the results of eager torch.

The truth is computed apart from the package: cross entropy of materialised fp64 logits, differentiated by autograd.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from synpo_fast import fused_linear_logprobs
from synpo_fast.ops import native_library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND_DTYPES = [
    ("reference", torch.float32),
    ("chunked", torch.float32),
    ("chunked", torch.bfloat16),
    ("chunked", torch.float16),
    ("native", torch.float32),
    ("native", torch.bfloat16),
    ("native", torch.float16),
    ("triton", torch.float32),
    ("triton", torch.bfloat16),
    ("triton", torch.float16),
]
NAMES = [f"{backend}-{str(dtype).removeprefix('torch.')}" for backend, dtype in BACKEND_DTYPES]


def device_of(backend: str, dtype: torch.dtype) -> str:
    """The device this backend is tested on, or a skip that says why it is not."""
    if backend == "native":
        if (reason := native_library.reason_unavailable()) is not None:
            pytest.skip(f"no native library: {reason}")
        return "cpu"
    if backend == "triton" and DEVICE == "cpu":
        pytest.importorskip("triton", reason="triton is not installed")
        if dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter computes bfloat16 products wrongly")
    return DEVICE


def poison(tensor: Tensor) -> Tensor:
    """Fills memory that torch.empty gave with NaN. Bytes that are cut into buffers become NaN in every floating dtype."""
    if tensor.dtype == torch.uint8:
        return tensor.fill_(255)
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


@dataclass
class Case:
    """Tensors in fp64 on the CPU, and the options of the op."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor  # the gradient that comes back to each log-prob
    bias: Tensor | None = None
    rows: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def rounded(self, dtype: torch.dtype) -> "Case":
        """The case rounded to a dtype, so that truth and candidates start from the same numbers."""
        bias = None if self.bias is None else self.bias.to(dtype).double()
        return Case(
            self.hidden.to(dtype).double(), self.weight.to(dtype).double(), self.labels,
            self.upstream, bias, self.rows, self.options,
        )  # fmt: skip


def make_case(
    num_labels: int,
    dim: int,
    vocabulary: int,
    *,
    num_hidden: int | None = None,
    ignored: float = 0.0,
    bias: bool = False,
    spread: float = 3.0,
    seed: int = 0,
    ignore_index: int = -100,
    **options: Any,
) -> Case:
    """`spread` is the standard deviation of the logits; `num_hidden` turns on `rows`, with repeats."""
    g = torch.Generator().manual_seed(seed)
    num_rows = num_labels if num_hidden is None else num_hidden
    hidden = torch.randn(num_rows, dim, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, dim, generator=g, dtype=torch.float64) * (spread / dim**0.5)
    labels = torch.randint(vocabulary, (num_labels,), generator=g)
    labels[torch.rand(num_labels, generator=g) < ignored] = ignore_index
    return Case(
        hidden,
        weight,
        labels,
        upstream=torch.randn(num_labels, generator=g, dtype=torch.float64),
        bias=torch.randn(vocabulary, generator=g, dtype=torch.float64) if bias else None,
        rows=None if num_hidden is None else torch.randint(num_rows, (num_labels,), generator=g),
        options={"ignore_index": ignore_index, **options},
    )


@dataclass
class Outcome:
    logps: Tensor
    grads: dict[str, Tensor]


def _leaves(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    return {
        name: tensor.to(device, dtype, copy=True).requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None
    }


def _collect(logps: Tensor, leaves: dict[str, Tensor], upstream: Tensor) -> Outcome:
    (logps * upstream.to(logps)).sum().backward()
    grads = {name: leaf.grad.double().cpu() for name, leaf in leaves.items() if leaf.grad is not None}
    return Outcome(logps.detach().double().cpu(), grads)


def run_fused(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    device = device_of(backend, dtype)
    leaves = _leaves(case, dtype, device)
    rows = None if case.rows is None else case.rows.to(device)
    logps = fused_linear_logprobs(
        leaves["hidden"], leaves["weight"], case.labels.to(device),
        bias=leaves.get("bias"), rows=rows, backend=backend, **case.options,
    )  # fmt: skip
    return _collect(logps, leaves, case.upstream)


def run_eager(case: Case, dtype: torch.dtype) -> Outcome:
    """Logits in `dtype`, softmax in fp32 (fp64 for fp64): what a trainer without a fused op does."""
    leaves = _leaves(case, dtype, "cpu")
    hidden = leaves["hidden"] if case.rows is None else leaves["hidden"][case.rows]
    options = case.options
    logits = F.linear(hidden, leaves["weight"], leaves.get("bias"))
    logits = logits.to(torch.promote_types(dtype, torch.float32)) * options.get("logit_scale", 1.0)
    if options.get("softcap") is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    logps = -F.cross_entropy(logits, case.labels, ignore_index=options["ignore_index"], reduction="none")
    return _collect(logps, leaves, case.upstream)


def error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||, and inf for anything that is not finite where the truth is."""
    if truth.numel() == 0:
        return 0.0 if found.shape == truth.shape else float("inf")
    if not torch.isfinite(found).all():
        return float("inf")
    return ((found - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def allowed(eager_error: float, dtype: torch.dtype) -> float:
    """The allowed error: 1.25 times that of eager in the same dtype, plus one rounding of the result."""
    return 1.25 * eager_error + {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]


def assert_as_good_as_eager(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    case = case.rounded(dtype)
    truth, eager, fused = run_eager(case, torch.float64), run_eager(case, dtype), run_fused(case, backend, dtype)
    assert fused.logps.shape == truth.logps.shape
    assert (fused.logps <= 0).all(), f"a log-prob above 0: {fused.logps.max()}"
    pairs = {"logps": (fused.logps, eager.logps, truth.logps)}
    for name in truth.grads:
        pairs[f"grad {name}"] = (fused.grads[name], eager.grads[name], truth.grads[name])
    for name, (found, peer, true) in pairs.items():
        ours, theirs = error(found, true), error(peer, true)
        assert ours <= allowed(theirs, dtype), f"{name}: error {ours:.3g}, eager {theirs:.3g} in {dtype}"
    return fused
