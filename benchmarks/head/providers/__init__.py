"""The contestants of kernels.py by name. `DEFAULT` has those that run on each kind of device if none is named."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.head.providers import liger, ours, peers, torch_only
from benchmarks.head.providers.base import Computes, Provider

__all__ = ["DEFAULT", "FLOOR", "OURS", "PROVIDERS", "Provider", "computes"]

PROVIDERS: dict[str, Provider] = {
    "gemm-floor": torch_only.gemm_floor,
    "eager-all-rows": torch_only.eager_all_rows,
    "eager-valid-rows": torch_only.eager_valid_rows,
    "torch-compile": torch_only.torch_compile,
    "torch-compile-max-autotune": torch_only.torch_compile_max_autotune,
    "torch-linear-ce": torch_only.torch_linear_ce,
    "torch-linear-ce-chunked": torch_only.torch_linear_ce_chunked,
    "liger": liger.liger,
    "liger-wide": liger.liger_wide,
    "liger-scaled": liger.liger_scaled,
    "liger-preference": liger.liger_preference,
    "cut-cross-entropy": peers.cut_cross_entropy,
    "cut-cross-entropy-exact": peers.cut_cross_entropy_exact,
    "trl-fused-head": peers.trl_fused_head,
    "quack": peers.quack,
    "synpo-chunked": ours.synpo_chunked,
    "synpo-native": ours.synpo_native,
    "synpo-triton": ours.synpo_triton,
    "synpo-reference": ours.synpo_reference,
}

FLOOR = "gemm-floor"
OURS = ("synpo-chunked", "synpo-native", "synpo-triton", "synpo-reference")
_CPU = tuple(name for name in PROVIDERS if name != "synpo-reference")
# On a GPU, Liger is represented by its kernels, not by its slower preference class.
DEFAULT = {"cpu": _CPU, "cuda": tuple(name for name in _CPU if name not in ("liger-preference", "synpo-native"))}

_COMPILED = Computes("given", "per token", "all", "2 / 3", "exact", "fp32, in one product")
_RECOMPUTED = Computes("given", "per token", "a chunk of rows", "3 / 4", "exact", "fp32 or the head's dtype")
_CCE = Computes("valid", "per token", "none", "3 / 4", "small ones skipped", "the hidden states' dtype")
_OURS = Computes(
    "valid", "per token", "none; trainable: exponentials up to a bound", "2 / 3, or 4 above the bound", "exact", "fp32"
)
_BY_NAME: dict[str, Computes] = {
    "gemm-floor": Computes("valid", "nothing to check", "all", "2 / 3", "-", "fp32, in one product"),
    "eager-all-rows": replace(_COMPILED, rows="all"),
    "eager-valid-rows": replace(_COMPILED, rows="valid"),
    "torch-compile": _COMPILED,
    "torch-compile-max-autotune": _COMPILED,
    "torch-linear-ce": _COMPILED,
    "torch-linear-ce-chunked": replace(_RECOMPUTED, sums="fp32"),
    "liger": _RECOMPUTED,
    "liger-wide": _RECOMPUTED,
    "liger-scaled": replace(_RECOMPUTED, products="4 / 4", sums="the head's dtype"),
    "liger-preference": Computes(
        "all", "a sum or mean per sequence", "a chunk of pairs", "2 / 3", "exact", "the head's dtype"
    ),
    "cut-cross-entropy": _CCE,
    "cut-cross-entropy-exact": replace(_CCE, gradients="exact"),
    "trl-fused-head": Computes("valid", "per token", "a tile", "3 / 4", "exact", "fp32"),
    "quack": Computes(
        "given", "a scalar; per token from inside", "a chunk of rows / all", "2 / 3", "exact", "fp32, in one product"
    ),
    "synpo-chunked": replace(_OURS, logits="a chunk of rows; trainable: exponentials up to a bound"),
    "synpo-native": _OURS,
    "synpo-triton": _OURS,
    "synpo-reference": replace(_COMPILED, rows="valid"),
}
# Contestants that compute otherwise on a CPU.
_ON_CPU = {
    "torch-linear-ce-chunked": replace(_RECOMPUTED, sums="the head's dtype"),
    "cut-cross-entropy": replace(_COMPILED, rows="valid"),
    "trl-fused-head": replace(_BY_NAME["trl-fused-head"], rows="given"),
}


def computes(name: str, device: str) -> Computes:
    """The work of a contestant on a kind of device, cpu or cuda."""
    return _ON_CPU[name] if device == "cpu" and name in _ON_CPU else _BY_NAME[name]
