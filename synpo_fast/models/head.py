"""The language-model head of a transformers model, and the hidden states that go into it.

    logits = f(hidden @ weight.T + bias),   f(x) = softcap * tanh(logit_scale * x / softcap)

`head_of` reads weight and bias from the output embedding, and logit_scale and softcap from the config. Families name these
differently, and some change their logits in a manner that no config entry shows. So `check_head` compares with the model's own
code: it runs the model's forward on random hidden states, which replace the backbone's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.errors import UserError

# Config entries that multiply the logits, in Cohere, Muse and Falcon-H1.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# `logits_scaling` divides the logits in Granite and MiniCPM3, and multiplies them in these model types.
MULTIPLIED_BY_LOGITS_SCALING = ("hyperclovax",)
# Config entries with the softcap, in Gemma and its relatives, RecurrentGemma and xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap).

    softcap None: no cap. weight [V, D] and bias [V] are the model's own tensors, so gradients reach its parameters.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Computes all logits, [..., D] -> [..., V]. Meant for checks and for generation."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: nn.Module) -> Head:
    """Returns the head of a causal language model, which peft may wrap.

    It is cheap: call it at each use, because wrappers replace parameters.
    Raises ValueError for a head whose weight alone does not give the logits (it has an adapter, is quantised or offloaded, or is
    not a plain linear layer), for a trained head that is sharded by itself, and for a wrapped model (DDP, DeepSpeed), whose
    head must be read inside the wrapper's forward.
    """
    base = base_model_of(model)
    weight, bias = _weight_and_bias(base, base.get_output_embeddings())
    if not weight.is_floating_point():
        raise UserError(f"the head's weight is {weight.dtype}: a quantised head cannot be read; leave it unquantised")
    if weight.is_meta:
        raise UserError("the head's weight is on the meta device (offloaded?): keep the head in memory")
    config = base.config.get_text_config()
    return Head(weight, bias, _logit_scale_of(config), _softcap_of(config))


def base_model_of(model: nn.Module) -> Any:
    """Returns the transformers model inside a peft wrapper (peft's get_base_model), with its adapters in place."""
    if hasattr(model, "get_base_model"):
        adapter = getattr(model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise UserError(
                f"{type(adapter).__name__} adds virtual tokens in peft's own forward, which the fused loss does not go "
                "through; use LoRA or another adapter of the layers"
            )
        inner: Any = model
        model = inner.get_base_model()
    if not hasattr(model, "get_output_embeddings"):
        raise UserError(
            f"{type(model).__name__} is not a transformers model; give the model itself, not what wraps it (DDP, FSDP, "
            "DeepSpeed), and read its head inside the wrapper's forward"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{type(model).__name__} is an encoder-decoder; prompt and response must be one sequence")
    return model


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Computes the last hidden states [B, T, D], final norm included, without the logits.

    `inputs` are the keyword arguments of the model's forward. Adapters of the layers (LoRA) act as in that forward. The forward
    of a wrapper (DDP, FSDP, DeepSpeed) is not called, so call this function inside it.
    """
    backbone: Any = _backbone_of(base_model_of(model))
    return backbone(**{"use_cache": False, **inputs, "return_dict": True}).last_hidden_state


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Raises ValueError if head_of does not give the logits of the model's own forward. Costs a few rows of logits."""
    head, base = head_of(model), base_model_of(model)
    size = head.weight.shape[1]
    # Its own generator, because a check must not change the run's random numbers. Logits up to 50 reveal a softcap of 30.
    hidden = torch.randn(1, 2, size, generator=torch.Generator().manual_seed(0)).to(head.weight)
    hidden = hidden * (50 / nn.functional.linear(hidden, head.weight).abs().max())
    fused = head.logits(hidden)  # before the model's own forward, after which DeepSpeed's hooks may release the weight
    with _backbone_returning(base, hidden):
        own = base(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=hidden.device), use_cache=False).logits
    if own.shape != fused.shape:
        raise UserError(f"{type(base).__name__} returns logits {list(own.shape)}, its head alone {list(fused.shape)}")
    error = float((own.float() - fused.float()).abs().max())
    allowed = max(1e-4, 4 * torch.finfo(hidden.dtype).eps) * float(own.abs().max())
    if not error <= allowed:
        raise UserError(
            f"{type(base).__name__} does not treat its logits as its config says: they differ by {error:.3g} from "
            f"those of its head with logit_scale={head.logit_scale} and softcap={head.softcap}"
        )


def _weight_and_bias(base: Any, head: Any) -> tuple[Tensor, Tensor | None]:
    name = type(base).__name__
    if head is None:
        raise UserError(f"{name} has no output embedding: it is not a language model with a head")
    if hasattr(head, "modules_to_save"):
        # peft's fully trained copy of the head, which the model's forward uses while the adapter is on.
        on = not head.disable_adapters and head.active_adapters
        head = head.modules_to_save[head.active_adapters[0]] if on else head.original_module
    if hasattr(head, "base_layer") or hasattr(head, "original_module"):
        raise UserError(
            f"{name} has an adapter on its head ({type(head).__name__}). The fused loss multiplies hidden states by the "
            "head's weight and would ignore the adapter, which would then never train. Leave the head (lm_head) out of "
            "target_modules (with target_modules='all-linear' peft does so by itself; else exclude_modules=['lm_head']), "
            "or train it in full with modules_to_save=['lm_head']"
        )
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise UserError(f"{name}'s head is {type(head).__module__}.{type(head).__name__}, not a plain linear layer")
    weight: Any = head.weight
    bias: Any = head.bias
    if not hasattr(weight, "full_tensor"):
        return weight, bias
    # A DTensor: FSDP2 or tensor parallelism shards the head. full_tensor's backward keeps each process's own gradient,
    # which is right under tensor parallelism and wrong under FSDP.
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        raise UserError(
            f"{name}'s head is trained and sharded by itself, so its gradient would not be summed over processes: under "
            "FSDP wrap the layers and the model but not the head, and read the head inside the model's forward"
        )
    return weight.full_tensor(), None if bias is None else bias.full_tensor()


def _logit_scale_of(config: Any) -> float:
    for name in MULTIPLIERS:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type in MULTIPLIED_BY_LOGITS_SCALING else 1.0 / float(scaling)


def _softcap_of(config: Any) -> float | None:
    for name in SOFTCAPS:
        if getattr(config, name, None):
            return float(getattr(config, name))
    return None


def _backbone_of(base: Any) -> nn.Module:
    backbone = base.base_model
    if backbone is base:
        raise UserError(f"{type(base).__name__} names no backbone (base_model_prefix={base.base_model_prefix!r})")
    return backbone


class _BackboneOutput:
    """Replaces any family's output class. Missing attributes are None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, _: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


@contextmanager
def _backbone_returning(base: Any, hidden: Tensor) -> Iterator[None]:
    """Makes the backbone return `hidden`. OPT and Bart call the decoder inside their backbone, so it is replaced, too."""
    with _returning(_backbone_of(base), hidden), _returning(base.get_decoder(), hidden):
        yield


@contextmanager
def _returning(module: Any, hidden: Tensor) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: _BackboneOutput(hidden)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
