"""The contestants of kernels.py by name. `DEFAULT` has those that run on each kind of device if none is named."""

from __future__ import annotations

from benchmarks.head.providers import ours, peers, torch_only
from benchmarks.head.providers.base import Provider

__all__ = ["BASELINE", "DEFAULT", "FLOOR", "OURS", "PROVIDERS", "Provider"]

PROVIDERS: dict[str, Provider] = {
    "gemm-floor": torch_only.gemm_floor,
    "eager-all-rows": torch_only.eager_all_rows,
    "eager-valid-rows": torch_only.eager_valid_rows,
    "torch-compile": torch_only.torch_compile,
    "liger": peers.liger,
    "liger-wide": peers.liger_wide,
    "liger-preference": peers.liger_preference,
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
BASELINE = "eager-valid-rows"
OURS = ("synpo-chunked", "synpo-native", "synpo-triton", "synpo-reference")
_CPU = tuple(name for name in PROVIDERS if name != "synpo-reference")
# On a GPU, Liger is represented by its kernels, not by its slower chunked class.
DEFAULT = {"cpu": _CPU, "cuda": tuple(name for name in _CPU if name not in ("liger-preference", "synpo-native"))}
