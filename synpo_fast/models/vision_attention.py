"""Attention inside a vision tower whose frames and windows lie in one row, in few calls where transformers makes one a window.

Qwen2.5-VL, Qwen3-VL and VideoLLaMA3 put all frames of a micro-batch into one row of patches, cut into segments that attend to
themselves alone: a frame, or in most of Qwen2.5-VL's layers a window of 8 x 8 patches. transformers runs sdpa once a segment
and reads the lengths from the device in every layer, unless the implementation's name holds "flash": then the function gets the
whole row and the ends of its segments. Two functions are registered under such names:

    varlen    flash attention over all segments in one call (flash-attn if it is installed, else torch's own): GPU, 16-bit
    segments  sdpa, one call for each different length: any device and dtype, and the plain statement of what `varlen` computes

On a CPU `segments` is no faster than one call a window (0.6 to 1.1 times on two cores at Qwen2.5-VL's shapes), so sdpa stays.
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
# What transformers knows them by: "flash" in the name is what makes it hand over whole rows.
REGISTERED = {SEGMENTS: "synpo_fast_vision_segments_as_flash", VARLEN: "synpo_fast_vision_varlen_as_flash"}
# Of what layers hand over besides: the keys are the queries, and what both functions take is not in both signatures.
HARMLESS = frozenset({"scaling", "dropout", "cu_seq_lens_k", "max_length_q", "max_length_k", "cuts", "position_ids"})
LARGEST_HEAD = 256  # of flash attention, which also wants a multiple of 8


@dataclass(frozen=True, eq=False)
class Segments:
    """How a row of L patches is cut.

    ends int32 [S + 1]: where segments begin and end; a tower's layers are handed this very tensor.
    by_length int64 [L]: the row's patches, those of the shortest segments first; back int64 [L]: its inverse.
    counts: (length, how many segments have it), the shortest first. Host numbers: nothing is read from the device.
    """

    ends: Tensor
    by_length: Tensor
    back: Tensor
    counts: tuple[tuple[int, int], ...]

    @property
    def longest(self) -> int:
        return self.counts[-1][0]


def segments_of(ends: Tensor) -> Segments:
    """From cumulative lengths, on the host."""
    lengths = ends.diff()
    by_length = torch.repeat_interleave(lengths, lengths).argsort(stable=True)
    different, counts = lengths.unique(return_counts=True)
    pairs = tuple(zip(different.tolist(), counts.tolist(), strict=True))
    return Segments(ends.to(torch.int32), by_length, by_length.argsort(), pairs)


def set_vision_attention(
    family: Family, model: nn.Module, wanted: str, *, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Makes the tower of `model` use `wanted`, one of CHOICES, and returns what that is; None for a model without a tower.

    Raises ValueError for an unknown name and for what the family, the device or the dtype cannot do.
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
    """Whether the tower's layers call one of the two functions here."""
    return config._attn_implementation in REGISTERED.values()


def is_flash(config: Any) -> bool:
    """Whether transformers hands the tower's attention the ends of segments, on the device, in place of single segments."""
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
            f"vision_attn_implementation={chosen!r} is for towers that pack frames into one row, and {family.name}'s takes "
            "each frame whole, all in one call: leave it at auto"
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
    """query, key, value [1, H, L, E] -> [1, L, H, E]. `cuts` comes with the tower's call: all ways in which it cuts its row."""
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
    """The same in one call of flash attention, which finds the segments by their ends."""
    scaling, dropout = scale_and_dropout(options, harmless=HARMLESS)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [L, H, E]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _kernel()(q, k, v, cu_seq_lens_q, max_length_q, scale, dropout)[None], None


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, float], Tensor]


@functools.cache
def _kernel() -> Kernel:
    """flash-attn's varlen function if it is installed, else torch's own: q, k, v [L, H, E], ends, longest, scale, dropout."""
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
