"""synpo_pair_loss: segment sums, SynPO's loss of each pair and its gradient to every token, in one pass.

    m(y) = mean_t lp_t     G(y) = exp(m(y))     A(y) = mean_t exp(lp_t)     x = alpha (G(y+) - G(y-))
    L    = -sigmoid(x) - beta A(y+)          or, link="logsigmoid",   L = -log sigmoid(x) - beta A(y+)

    dL/dlp_t (chosen)   = -(alpha w G(y+) + beta exp(lp_t)) / T+        w = sigmoid(x) sigmoid(-x), or sigmoid(-x)
    dL/dlp_t (rejected) =   alpha w G(y-) / T-

Eager operations need about thirty small kernels and a few synchronisations for this. Here it is one launch (Triton) or one
parallel loop (C++). A plain torch reference is the definition that both are tested against. The coefficients are kept in fp32:
late in training w is 1e-10 or less, which fp16 cannot represent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from synpo_fast.ops import native_library
from synpo_fast.ops.pair_loss.reference import synpo_pair_loss_reference

LINKS = ("sigmoid", "logsigmoid")
BACKENDS = ("reference", "native", "triton")


@dataclass(frozen=True)
class PairLoss:
    """Results per pair, all [P] fp32: losses with autograd, the rest detached. num_empty [1] int32 counts skipped pairs."""

    losses: Tensor
    chosen_mean: Tensor
    rejected_mean: Tensor
    chosen_geometric: Tensor
    rejected_geometric: Tensor
    chosen_arithmetic: Tensor
    num_empty: Tensor


def synpo_pair_loss(
    logps: Tensor,
    chosen_offsets: Tensor,
    rejected_offsets: Tensor,
    *,
    mask: Tensor | None = None,
    alpha: float = 30.0,
    beta: float = 0.2,
    link: str = "sigmoid",
    backend: str | None = None,
) -> PairLoss:
    """SynPO's loss for P pairs whose responses are segments of one flat tensor of token log-probs.

    Args:
        logps: [N] fp32, or fp64 for the reference. (bf16 and fp16 are converted first; autograd then rounds their gradient.)
        chosen_offsets, rejected_offsets: [P + 1] int64; pair i's response is logps[offsets[i] : offsets[i + 1]]. For a padded
            [2P, T] batch, chosen half first, use offsets in steps of T (the rejected ones start at P * T) and a mask.
        mask: [N] bool, the tokens that count; None: all.
        backend: "reference", "native" (CPU) or "triton" (GPU); None picks by device.

    On the CPU a pair with an empty response raises ValueError. On a GPU that check would need a device sync, so the loss and
    coefficients of such a pair are 0 and num_empty counts it. Offsets on a GPU must lie within logps.
    """
    _check(logps, chosen_offsets, rejected_offsets, mask, alpha, beta, link)
    chosen = _choose_backend(logps, backend)
    mask = None if mask is None else mask.contiguous()
    flat = logps.to(torch.promote_types(logps.dtype, torch.float32)).contiguous()
    losses, means, geometric, arithmetic, num_empty = _SynPOPairLoss.apply(
        flat, chosen_offsets.contiguous(), rejected_offsets.contiguous(), mask, float(alpha), float(beta), link, chosen
    )
    if chosen != "triton" and int(num_empty) > 0:
        _raise_empty(chosen_offsets, rejected_offsets, mask)
    return PairLoss(losses, means[0], means[1], geometric[0], geometric[1], arithmetic, num_empty)


def _check(
    logps: Tensor, chosen: Tensor, rejected: Tensor, mask: Tensor | None, alpha: float, beta: float, link: str
) -> None:
    if logps.dim() != 1 or not logps.is_floating_point():
        raise ValueError(f"logps must be a 1-D floating tensor, got {logps.dtype} {list(logps.shape)}")
    for name, offsets in (("chosen_offsets", chosen), ("rejected_offsets", rejected)):
        if offsets.dim() != 1 or offsets.shape[0] < 2 or offsets.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 [P + 1], P >= 1, got {offsets.dtype} {list(offsets.shape)}")
        if offsets.device != logps.device:
            raise ValueError(f"{name} is on {offsets.device} but logps is on {logps.device}")
        if offsets.device.type == "cpu":
            ordered = bool((offsets.diff() >= 0).all())
            if not ordered or int(offsets[0]) < 0 or int(offsets[-1]) > logps.shape[0]:
                raise ValueError(f"{name} = {offsets.tolist()} must rise within [0, {logps.shape[0]}]")
    if chosen.device.type == "cpu" and (chosen[0] < rejected[-1] and rejected[0] < chosen[-1]):
        raise ValueError(
            f"chosen tokens [{int(chosen[0])}, {int(chosen[-1])}) and rejected tokens "
            f"[{int(rejected[0])}, {int(rejected[-1])}) overlap: a token can belong to one response only"
        )
    if chosen.shape != rejected.shape:
        raise ValueError(f"chosen_offsets has {chosen.shape[0]} entries but rejected_offsets {rejected.shape[0]}")
    if mask is not None and (mask.shape != logps.shape or mask.dtype != torch.bool or mask.device != logps.device):
        raise ValueError(
            f"mask must be bool {list(logps.shape)} on {logps.device}, "
            f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
        )
    if link not in LINKS:
        raise ValueError(f"link must be one of {', '.join(LINKS)}, got {link!r}")
    if not (0 < alpha < float("inf")) or not (0 <= beta < float("inf")):
        raise ValueError(f"alpha must be positive and beta at least 0, got alpha={alpha}, beta={beta}")


def _choose_backend(logps: Tensor, wanted: str | None) -> str:
    """The backend that will run. The kernels compute in fp32, so fp64 needs the reference."""
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {wanted!r}")
    if wanted == "reference":
        return wanted
    candidate = wanted or ("triton" if logps.device.type == "cuda" else "native")
    reason = _why_impossible(candidate, logps)
    if reason is not None and wanted is not None:
        raise ValueError(f"backend={wanted!r} cannot be used here: {reason}")
    return "reference" if reason is not None else candidate


def _why_impossible(backend: str, logps: Tensor) -> str | None:
    if logps.dtype == torch.float64:
        return "it computes in float32, logps is float64"
    if backend == "native":
        if logps.device.type != "cpu":
            return f"it works on CPU tensors, logps is on {logps.device}"
        return native_library.reason_unavailable()
    from synpo_fast.ops.linear_logprobs import triton_support

    return triton_support.reason_unusable(logps.device.type, torch.float32)


def _raise_empty(chosen: Tensor, rejected: Tensor, mask: Tensor | None) -> None:
    for name, offsets in (("chosen", chosen), ("rejected", rejected)):
        for pair, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            if end == begin or (mask is not None and not bool(mask[begin:end].any())):
                raise ValueError(f"the {name} response of pair {pair} has no tokens that count")


class _SynPOPairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps, chosen_offsets, rejected_offsets, mask, alpha, beta, link, backend):
        if backend == "triton":
            from synpo_fast.ops.pair_loss.triton_launch import synpo_pair_loss_forward as forward
        elif backend == "native":
            forward = torch.ops.synpo_fast_native.synpo_pair_loss
        else:
            forward = synpo_pair_loss_reference
        losses, statistics, coefficients, num_empty = forward(
            logps, chosen_offsets, rejected_offsets, mask, alpha, beta, link == "logsigmoid"
        )
        ctx.save_for_backward(coefficients, chosen_offsets, rejected_offsets)
        means, geometric, arithmetic = statistics[0:2], statistics[2:4], statistics[4]
        ctx.mark_non_differentiable(means, geometric, arithmetic, num_empty)
        return losses, means, geometric, arithmetic, num_empty

    @staticmethod
    def backward(ctx, grad_losses, *_):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("synpo_pair_loss can be differentiated once, and create_graph=True asks for more")
        coefficients, chosen_offsets, rejected_offsets = ctx.saved_tensors
        return coefficients * per_token(grad_losses, chosen_offsets, rejected_offsets, coefficients.shape[0]), *[
            None
        ] * 7


def per_token(values: Tensor, chosen_offsets: Tensor, rejected_offsets: Tensor, num_tokens: int) -> Tensor:
    """Gives each token its pair's value, [P] -> [N]. A token that belongs to no response gets an arbitrary finite value."""
    token = torch.arange(num_tokens, device=values.device)
    last = values.shape[0] - 1
    as_chosen = torch.searchsorted(chosen_offsets, token, right=True) - 1
    as_rejected = torch.searchsorted(rejected_offsets, token, right=True) - 1
    in_chosen = (token >= chosen_offsets[0]) & (token < chosen_offsets[-1])
    return values[torch.where(in_chosen, as_chosen, as_rejected).clamp(0, last)]
