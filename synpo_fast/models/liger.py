"""Replaces a model's norms, gated MLPs and rotary embedding by Liger's kernels, module by module.

Liger's own `_apply_liger_kernel_to_instance` does not support every family (0 modules of LLaVA-OneVision), fails with some
versions of transformers, and changes transformers' modules for the whole process. Here, a module is replaced in this model
alone, if its class is known to compute the same as a kernel. It keeps its parameters; names and checkpoints do not change. The
classes are those of inner language models and vision towers, so a family is supported if its parts are. The loss is not
Liger's: see ops/.

A norm's backward does not work in place, because a norm that feeds the residual stream has its gradient used again.
"""

from __future__ import annotations

import inspect
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from synpo_fast.errors import UserError

# Offset and casting mode of each norm, in Liger's terms. llama: normalise in fp32, round, multiply by weight.
# gemma: normalise and multiply by 1 + weight in fp32, then round.
RMS_NORMS: dict[str, tuple[float, str]] = {
    **dict.fromkeys(
        (
            "LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm", "Qwen2MoeRMSNorm", "Qwen3RMSNorm",
            "Qwen3MoeRMSNorm", "Phi3RMSNorm", "GraniteRMSNorm", "SmolLM3RMSNorm", "GlmRMSNorm", "Glm4RMSNorm", "Exaone4RMSNorm",
            "Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm", "InternVLVisionRMSNorm",
        ),
        (0.0, "llama"),
    ),
    **dict.fromkeys(
        ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3NextRMSNorm", "Qwen3_5RMSNorm"), (1.0, "gemma")
    ),
}  # fmt: skip
# Classes that compute down(act(gate(x)) * up(x)) with three linear layers.
GATED_MLPS = frozenset({
    "LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen2MoeMLP", "Qwen3MLP", "Qwen3MoeMLP", "Qwen3NextMLP", "Qwen3_5MLP", "GemmaMLP",
    "Gemma2MLP", "Gemma3MLP", "Olmo2MLP", "Olmo3MLP", "GraniteMLP", "SmolLM3MLP", "CohereMLP", "Cohere2MLP", "StableLmMLP",
    "Exaone4MLP", "Qwen2_5_VLMLP", "Qwen3VLTextMLP",
})  # fmt: skip
# Classes that rotate the two halves of a head by one angle, in the dtype of the query. Some rotate only a part of the head.
ROTARY_ATTENTIONS = frozenset({
    "LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention", "Qwen2MoeAttention", "Qwen3Attention",
    "Qwen3MoeAttention", "Qwen3NextAttention", "Qwen3_5Attention", "GemmaAttention", "Gemma2Attention", "Gemma3Attention",
    "Phi3Attention", "GraniteAttention", "SmolLM3Attention", "Starcoder2Attention", "Qwen2_5_VLAttention", "Qwen3VLTextAttention",
})  # fmt: skip
ROTARY = "apply_rotary_pos_emb"


def apply_liger_kernels(model: nn.Module, language_model: nn.Module) -> dict[str, int]:
    """Replaces all modules of `model` that have a kernel, vision tower included, and returns how many of each kind were replaced.

    The kinds are RMSNorm, LayerNorm, SwiGLU, GEGLU and rotary. Raises ValueError if no module of `language_model` has a kernel.
    The kernels need a GPU, or Triton's interpreter, to run.
    """
    inside = {id(module) for module in language_model.modules()}
    found: Counter[str] = Counter()
    of_language_model = 0
    for parent, name, module in list(_children(model)):
        replaced = _replacement(module)
        if replaced is None:
            continue
        kind, new = replaced
        if new is not module:
            setattr(parent, name, new.train(module.training))
        found[kind] += 1
        of_language_model += id(module) in inside
    if not of_language_model:
        names = ", ".join(sorted({type(module).__name__ for module in language_model.modules()}))
        raise UserError(
            f"liger_kernels=true would change nothing: Liger has no kernel for any module of {names}. Leave it out. It "
            "works with qwen2_5_vl, qwen3_vl, llava_onevision, internvl, video_llama_3, and with text models built like Llama, "
            "Mistral, Qwen, Gemma, Phi-3, Granite or GLM"
        )
    return dict(sorted(found.items()))


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, module in parent.named_children():
            yield parent, name, module


def _replacement(module: nn.Module) -> tuple[str, nn.Module] | None:
    name = type(module).__name__
    if not type(module).__module__.startswith(("transformers.models.", "torch.nn.")):
        return None  # a class of the same name in other code may compute something else
    if name in RMS_NORMS:
        return "RMSNorm", _rms_norm(module, *RMS_NORMS[name])
    if type(module) is nn.LayerNorm and module.bias is not None and len(module.normalized_shape) == 1:
        return "LayerNorm", _layer_norm(module)
    if name in GATED_MLPS:
        return _gated_mlp(module)
    if name in ROTARY_ATTENTIONS and _rotate_with_liger(module):
        return "rotary", module
    return None


def _rms_norm(module: Any, offset: float, casting_mode: str) -> nn.Module:
    from liger_kernel.transformers import LigerRMSNorm

    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    with torch.device("meta"):
        new = LigerRMSNorm(len(module.weight), eps=eps, offset=offset, casting_mode=casting_mode, in_place=False)
    new.weight = module.weight
    return new


def _layer_norm(module: nn.LayerNorm) -> nn.Module:
    from liger_kernel.transformers import LigerLayerNorm

    with torch.device("meta"):
        new = LigerLayerNorm(len(module.weight), eps=module.eps)
    new.weight, new.bias = module.weight, module.bias
    return new


def _gated_mlp(module: Any) -> tuple[str, nn.Module] | None:
    from liger_kernel.transformers import LigerGEGLUMLP, LigerSwiGLUMLP

    kinds: dict[str, Any] = {"SiLU": LigerSwiGLUMLP, "SiLUActivation": LigerSwiGLUMLP, "GELUTanh": LigerGEGLUMLP}
    activation = type(module.act_fn).__name__
    if activation not in kinds:
        return None
    sizes = types.SimpleNamespace(
        hidden_size=module.gate_proj.in_features, intermediate_size=module.gate_proj.out_features, hidden_act="silu"
    )
    with torch.device("meta"):  # no memory: these layers are replaced by the module's own just below
        new = kinds[activation](sizes)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(new, name, getattr(module, name))
    return "GEGLU" if kinds[activation] is LigerGEGLUMLP else "SwiGLU", new


def _rotate_with_liger(module: nn.Module) -> bool:
    """Gives this attention a copy of its forward that calls Liger's rotary function. Returns False if that is impossible.

    The function is a global of the transformers module; replacing it there would change every model of the process.
    """
    from liger_kernel.transformers import liger_rotary_pos_emb

    forward: Any = type(module).forward
    if not inspect.isfunction(forward) or hasattr(forward, "__wrapped__") or ROTARY not in forward.__code__.co_names:
        return False
    own = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, ROTARY: liger_rotary_pos_emb},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    module.forward = types.MethodType(own, module)
    return True
