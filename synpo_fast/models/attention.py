"""Attention over packed rows: three variants with one result, registered with transformers. Model code is unchanged.

    mask      a dense [L, L] mask for sdpa (bool) and eager (additive): works with any model; memory and work quadratic in the row
    segments  plain torch, segment by segment: a prefix attends causally, a branch to its prefix and itself; linear memory
    varlen    flash attention over sequences whose query and key lengths differ; the keys of a branch are its prefix's and its
              own, gathered by index; the causal mask is aligned to the bottom right

`segments` runs on a CPU. It also serves as the readable definition of what `varlen` computes on a GPU. The layout reaches
the attention functions as the keyword argument `packed` of the language model's forward.
"""

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synpo_fast.errors import UserError
from synpo_fast.models.layout import RowLayout

SEGMENTS, VARLEN = "synpo_fast_segments", "synpo_fast_varlen"
IMPLEMENTATIONS = ("sdpa", "eager", SEGMENTS, VARLEN)
# Model types whose layers do not pass keyword arguments on to their attention, so `packed` would not arrive.
IGNORE_KEYWORDS = frozenset({"stablelm"})
# Keyword arguments that layers pass to every attention function. The first two are used; the others can be ignored here,
# because the layout decides what each row attends to.
HARMLESS = frozenset({"scaling", "dropout", "position_ids", "cache_position"})
FIRST_CAPABILITY = (8, 0)  # the lowest compute capability that flash attention runs on, both torch's and flash-attn's


def choose(wanted: str, device: torch.device, dtype: torch.dtype, config: Any = None) -> tuple[str, str]:
    """Chooses the language model's attention. Returns its name and a sentence with the reason.

    device and dtype are those of the weights; config is the model's (None: do not check what the model supports).
    Raises ValueError for an unknown name, for flash attention (varlen) that cannot run there, and for an attention that the
    model cannot use.
    """
    if wanted not in ("auto", *IMPLEMENTATIONS):
        raise UserError(f"attn_implementation must be auto or one of {', '.join(IMPLEMENTATIONS)}, got {wanted!r}")
    obstacle = flash_obstacle(device, dtype)
    if wanted == VARLEN and obstacle:
        raise UserError(f"attn_implementation={VARLEN!r} {obstacle}; take auto, or {SEGMENTS}")
    usable, reason = (IMPLEMENTATIONS, "") if config is None else _usable(config)
    if wanted not in ("auto", *usable):
        raise UserError(f"attn_implementation={wanted!r} cannot be used: {reason}; take auto, or {' or '.join(usable)}")
    if wanted == "auto" and reason:
        return usable[0], f"{usable[0]} with a dense mask, because {reason}"
    if wanted in ("sdpa", "eager"):
        return wanted, f"{wanted} with a dense mask, as asked for"
    if wanted == SEGMENTS or obstacle:
        return SEGMENTS, f"{SEGMENTS}, " + (f"because {VARLEN} {obstacle}" if wanted == "auto" else "as asked for")
    return VARLEN, f"{VARLEN}, by {varlen_package()}, " + ("as asked for" if wanted == VARLEN else "the fastest here")


def _usable(config: Any) -> tuple[tuple[str, ...], str]:
    """Returns the implementations that reproduce the model's own result, and why the others do not ("": all of them do).

    auto takes the first one.
    """
    text = config.get_text_config()
    if caps_scores(config):
        return ("eager",), (
            f"{text.model_type} caps the scores of its attention at {text.attn_logit_softcapping:g} "
            "(attn_logit_softcapping), which only eager supports"
        )
    if text.model_type in IGNORE_KEYWORDS:
        return ("sdpa", "eager"), f"the layers of {text.model_type} do not pass the row's layout on to their attention"
    return IMPLEMENTATIONS, ""


def caps_scores(config: Any) -> bool:
    """True if the language model caps its attention scores."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def scale_and_dropout(options: dict[str, Any], *, harmless: frozenset[str]) -> tuple[float | None, float]:
    """Reads scale and dropout from the keyword arguments that a layer passes to its attention.

    Raises ValueError if another argument is set, such as a window or a cap: ignoring it would change the result.
    """
    unknown = [
        name for name, value in options.items() if name not in harmless and value is not None and value is not False
    ]
    if unknown:
        asked = ", ".join(f"{name}={options[name]!r}" for name in unknown)
        raise ValueError(
            f"this attention does not support {asked[:200]}, which the model asks for: take attn_implementation=eager"
        )
    return options.get("scaling"), options.get("dropout") or 0.0


def flash_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why flash attention cannot run here, or None if it can. The text continues a sentence."""
    if device.type != "cuda":
        return f"needs a CUDA device, got {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"supports bfloat16 and float16 only, got {str(dtype).removeprefix('torch.')} (bf16=true trains in bfloat16)"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        needed, found = (".".join(map(str, each)) for each in (FIRST_CAPABILITY, capability))
        return f"needs a GPU of compute capability {needed} or above, got {found}"
    return None


def varlen_package() -> str:
    """Returns the package whose kernel `varlen` runs: flash-attn if it is installed, else torch."""
    return "torch" if importlib.util.find_spec("flash_attn") is None else "flash-attn"


@dataclass(frozen=True, eq=False)
class PackedRow:
    """A row's layout in the form that the attention functions need. It is built once per row and used by every layer."""

    layout: RowLayout
    query_ends: Tensor  # [S + 1] int32, cumulative query lengths
    key_ends: Tensor  # [S + 1] int32, cumulative key lengths
    key_index: Tensor  # [sum of key lengths] int64: the position of each key in the packed row
    max_query: int
    max_key: int


def pack_row(layout: RowLayout) -> PackedRow:
    """Computes the indices for varlen attention, on the host: each segment is a sequence with its prefix's and its own keys."""
    segments = layout.segments
    query_lengths = [segment.length for segment in segments]
    key_lengths = [segment.prefix_length + segment.length for segment in segments]
    index = [
        torch.cat(
            [
                torch.arange(segment.prefix_start, segment.prefix_start + segment.prefix_length),
                torch.arange(segment.start, segment.end),
            ]
        )
        for segment in segments
    ]
    return PackedRow(
        layout, _ends(query_lengths), _ends(key_lengths), torch.cat(index), max(query_lengths), max(key_lengths)
    )


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def dense_mask(layout: RowLayout, device: torch.device | str = "cpu") -> Tensor:
    """Returns a bool mask [L, L], True if the position of the first index may attend to that of the second."""
    mask = torch.zeros(layout.length, layout.length, dtype=torch.bool, device=device)
    for segment in layout.segments:
        rows = slice(segment.start, segment.end)
        mask[rows, segment.prefix_start : segment.prefix_start + segment.prefix_length] = True
        mask[rows, rows] = torch.ones(segment.length, segment.length, dtype=torch.bool, device=device).tril()
    return mask


def attention_mask(packed: PackedRow, implementation: str, dtype: torch.dtype) -> Tensor:
    """Returns the mask for the language model. It has four dimensions, because transformers passes such a mask on unchanged.

    eager needs an additive mask: it would add a bool mask to the scores and be silently wrong.
    """
    device = packed.key_index.device
    if implementation in (SEGMENTS, VARLEN):
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    allowed = dense_mask(packed.layout, device)[None, None]
    if implementation == "sdpa":
        return allowed
    if implementation == "eager":
        return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)
    raise UserError(
        f"packed rows cannot be run with attn_implementation={implementation!r}; "
        f"use one of sdpa, eager, {SEGMENTS}, {VARLEN}"
    )


def segments_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, packed: PackedRow, **options: Any
) -> tuple[Tensor, None]:
    """Attention with one sdpa call per segment: query [1, H, L, E], key and value [1, H_kv, L, E] -> [1, L, H, E]."""
    scale, dropout = scale_and_dropout(options, harmless=HARMLESS)
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for segment in packed.layout.segments:
        rows = slice(segment.start, segment.end)
        q, k, v = query[:, :, rows], key[:, :, rows], value[:, :, rows]
        mask = None
        if segment.prefix_length:
            prefix = slice(segment.prefix_start, segment.prefix_start + segment.prefix_length)
            k, v = torch.cat([key[:, :, prefix], k], 2), torch.cat([value[:, :, prefix], v], 2)
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(segment.prefix_length)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2), None


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, packed: PackedRow, **options: Any
) -> tuple[Tensor, None]:
    """Flash attention with the result of segments_attention: no mask, memory linear in the row. GPU only."""
    scale, dropout = scale_and_dropout(options, harmless=HARMLESS)
    run = _varlen_kernel()
    q = query[0].transpose(0, 1)  # [L, H, E]
    k, v = (tensor[0].transpose(0, 1).index_select(0, packed.key_index) for tensor in (key, value))
    out = run(q, k, v, packed, query.shape[-1] ** -0.5 if scale is None else scale, dropout)
    return out[None], None


@functools.cache
def _varlen_kernel() -> Any:
    """Returns flash-attn's varlen function if it is installed, else torch's own."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        def run_torch(q: Tensor, k: Tensor, v: Tensor, packed: PackedRow, scale: float, dropout: float) -> Tensor:
            if dropout:
                raise ValueError(
                    f"torch's varlen attention has no dropout, got {dropout}; install flash-attn or set it to 0"
                )
            k, v = (_repeat_heads(tensor, q.shape[1]) for tensor in (k, v))
            out: Any = varlen_attn(
                q, k, v, packed.query_ends, packed.key_ends, packed.max_query, packed.max_key,
                scale=scale, window_size=(-1, 0),
            )  # fmt: skip
            return out

        return run_torch

    def run_flash(q: Tensor, k: Tensor, v: Tensor, packed: PackedRow, scale: float, dropout: float) -> Tensor:
        return flash_attn_varlen_func(
            q, k, v, packed.query_ends, packed.key_ends, packed.max_query, packed.max_key,
            dropout_p=dropout, softmax_scale=scale, causal=True,
        )  # fmt: skip

    return run_flash


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


@functools.cache
def register() -> None:
    """Registers `segments` and `varlen` with transformers. Called when a policy is loaded."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENTS, segments_attention)
    AttentionInterface.register(VARLEN, varlen_attention)
