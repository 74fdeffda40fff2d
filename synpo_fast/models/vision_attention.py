"""Attention inside a vision tower whose frames and windows share one row. It needs few calls; transformers makes one per window.

Qwen2.5-VL, Qwen3-VL and VideoLLaMA3 put all frames of a micro-batch into one row of patches, cut into segments that attend only
to themselves. A segment is a frame or, in most of Qwen2.5-VL's layers, a window of 8 x 8 patches. transformers calls sdpa once
per segment and reads the lengths from the device in every layer, unless the implementation's name contains "flash": then the
function gets the whole row and the ends of its segments. Two functions are registered under such names:

    varlen    flash attention over all segments in one call (flash-attn if it is installed, else torch's own): GPU, 16-bit
    segments  one sdpa call per distinct segment length: any device and dtype; the readable definition of what `varlen` computes

On a CPU, the speed of `segments` is 0.6 to 1.1 times that of one call per window (two cores, Qwen2.5-VL's shapes), so sdpa
remains the default there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synpo_fast.errors import UserError
from synpo_fast.models.attention import SEGMENTS, VARLEN, flash_obstacle, scale_and_dropout
from synpo_fast.models.families.registry import Family

FLASH_ATTENTION_2 = "flash_attention_2"
CHOICES = ("auto", "sdpa", "eager", SEGMENTS, VARLEN, FLASH_ATTENTION_2)
# The names registered with transformers. Because they contain "flash", transformers passes whole rows.
REGISTERED = {SEGMENTS: "synpo_fast_vision_segments_as_flash", VARLEN: "synpo_fast_vision_varlen_as_flash"}
# Keyword arguments that layers may pass. Key lengths equal query lengths, so they are not needed; max_length_q and cuts are
# each used by one of the two functions only.
HARMLESS = frozenset({"scaling", "dropout", "cu_seq_lens_k", "max_length_q", "max_length_k", "cuts", "position_ids"})
LARGEST_HEAD = 256  # the largest head size of flash attention, which also requires a multiple of 8


@dataclass(frozen=True, eq=False)
class Segments:
    """The cut of a row of L patches into S segments.

    ends int32 [S + 1]: cumulative segment lengths; the tower's layers receive this same tensor object.
    by_length int64 [L]: a permutation that puts the patches of the shortest segments first; back int64 [L]: its inverse.
    counts: (length, number of segments with it), the shortest length first. These are host integers, so nothing is read from the
        device.
    """

    ends: Tensor
    by_length: Tensor
    back: Tensor
    counts: tuple[tuple[int, int], ...]

    @property
    def longest(self) -> int:
        return self.counts[-1][0]


def segments_of(ends: Tensor) -> Segments:
    """Makes Segments from cumulative lengths [S + 1], on the host."""
    lengths = ends.diff()
    by_length = torch.repeat_interleave(lengths, lengths).argsort(stable=True)
    different, counts = lengths.unique(return_counts=True)
    pairs = tuple(zip(different.tolist(), counts.tolist(), strict=True))
    return Segments(ends.to(torch.int32), by_length, by_length.argsort(), pairs)


def set_vision_attention(
    family: Family, model: nn.Module, wanted: str, *, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Sets the attention of the vision tower to `wanted`, one of CHOICES, and returns the one chosen; None without a tower.

    Raises ValueError for an unknown name, and for an attention that the family, the device or the dtype does not support.
    """
    if wanted not in CHOICES:
        raise UserError(f"vision_attn_implementation must be one of {', '.join(CHOICES)}, got {wanted!r}")
    modules = family.vision_modules(model)
    if not modules:
        return None
    config: Any = modules[0].config
    chosen = _automatic(family, config, dtype, device) if wanted == "auto" else wanted
    _check(chosen, family, dtype, device)
    _register()
    config._attn_implementation = REGISTERED.get(chosen, chosen)
    return chosen


def takes_segments(config: Any) -> bool:
    """True if the tower's layers call one of the two functions in this module."""
    return config._attn_implementation in REGISTERED.values()


def is_flash(config: Any) -> bool:
    """True if transformers passes whole rows and segment ends (on the device) to the tower's attention, not single segments."""
    return "flash" in (config._attn_implementation or "")


def _automatic(family: Family, config: Any, dtype: torch.dtype, device: torch.device) -> str:
    if device.type != "cuda" or not family.packs_frames:
        return "sdpa"
    heads = getattr(config, "num_heads", None) or config.num_attention_heads
    size = config.hidden_size // heads
    fits = flash_obstacle(device, dtype) is None and size % 8 == 0 and size <= LARGEST_HEAD
    return VARLEN if fits else SEGMENTS


def _check(chosen: str, family: Family, dtype: torch.dtype, device: torch.device) -> None:
    if chosen in REGISTERED and not family.packs_frames:
        raise UserError(
            f"vision_attn_implementation={chosen!r} is for towers that pack frames into one row; the tower of {family.name} "
            "takes each frame whole, all in one call: leave it at auto"
        )
    if chosen not in (VARLEN, FLASH_ATTENTION_2):
        return
    if obstacle := flash_obstacle(device, dtype):
        raise UserError(f"vision_attn_implementation={chosen!r} {obstacle}: leave it at auto")
    if chosen == FLASH_ATTENTION_2 and _flash_attn() is None:
        raise UserError(
            f"vision_attn_implementation={chosen!r} needs flash-attn, which is not installed: leave it at auto, which "
            f"uses torch's own flash attention ({VARLEN})"
        )


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(REGISTERED[SEGMENTS], segments_attention)
    AttentionInterface.register(REGISTERED[VARLEN], varlen_attention)


def segments_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *,
    cu_seq_lens_q: Tensor, cuts: Sequence[Segments], **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention with one sdpa call per distinct segment length: query, key, value [1, H, L, E] -> [1, L, H, E].

    `cuts` is an argument of the tower's call: every cut that it uses. The one for this layer has cu_seq_lens_q as its ends.
    """
    scaling, dropout = scale_and_dropout(options, harmless=HARMLESS)
    cut = next(cut for cut in cuts if cut.ends is cu_seq_lens_q)
    sizes = [length * count for length, count in cut.counts]
    rows = [tensor[0] for tensor in (query, key, value)]  # [H, L, E]
    if len(cut.counts) > 1:
        rows = [tensor.index_select(1, cut.by_length) for tensor in rows]
    outputs = []
    for (length, count), *parts in zip(cut.counts, *(tensor.split(sizes, 1) for tensor in rows), strict=True):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)
        output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    if len(outputs) == 1:
        return outputs[0][None], None
    return torch.cat(outputs).index_select(0, cut.back)[None], None


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *,
    cu_seq_lens_q: Tensor, max_length_q: int, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention with the result of segments_attention, in one call of flash attention, which takes the segments' ends."""
    scaling, dropout = scale_and_dropout(options, harmless=HARMLESS)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [L, H, E]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _kernel()(q, k, v, cu_seq_lens_q, max_length_q, scale, dropout)[None], None


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, float], Tensor]


@functools.cache
def _kernel() -> Kernel:
    """Returns flash-attn's varlen function if it is installed, else torch's: q, k, v [L, H, E], ends, longest, scale, dropout."""
    flash = _flash_attn()
    if flash is None:
        return _run_torch

    def run_flash(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, dropout: float) -> Tensor:
        return flash(q, k, v, ends, ends, longest, longest, dropout_p=dropout, softmax_scale=scale, causal=False)

    return run_flash


def _run_torch(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, dropout: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError(f"torch's varlen attention has no dropout, got {dropout}; install flash-attn or set it to 0")
    out: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale)
    return out


@functools.cache
def _flash_attn() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func
