"""Liger's kernels, module by module: what each family has, and that a replaced model computes the same.

The kernels run in Triton's interpreter, in fp32. It lacks what a GPU gives them: scalars with a type, and CUDA's rsqrt and tanh.
"""

import importlib
import sys

import pytest
import torch
from torch import nn

from synpo_fast.models import Sample, load_policy
from synpo_fast.models.families.registry import FAMILIES
from synpo_fast.models.liger import GATED_MLPS, RMS_NORMS, ROTARY_ATTENTIONS, apply_liger_kernels
from synpo_fast.references import FrozenCopy
from tests.models.tiny_families import random_frames

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

MODELING = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "gemma", "gemma2",
    "gemma3", "phi3", "olmo2", "olmo3", "granite", "smollm3", "cohere", "cohere2", "glm", "glm4", "stablelm", "exaone4",
    "starcoder2", "qwen2_5_vl", "qwen3_vl", "internvl",
)  # fmt: skip
# Two layers of language model, two of the tower.
COUNTS = {
    "qwen2_5_vl": {"RMSNorm": 10, "SwiGLU": 4, "rotary": 2},
    "qwen3_vl": {"LayerNorm": 7, "RMSNorm": 9, "SwiGLU": 2, "rotary": 2},
    "llava_onevision": {"LayerNorm": 5, "RMSNorm": 5, "SwiGLU": 2, "rotary": 2},
    "internvl": {"LayerNorm": 5, "RMSNorm": 5, "SwiGLU": 2, "rotary": 2},
    "video_llama_3": {"LayerNorm": 5, "RMSNorm": 5, "SwiGLU": 2, "rotary": 2},
    "text": {"RMSNorm": 5, "SwiGLU": 2, "rotary": 2},
}


class Scalar(float):
    """A number as a compiled kernel sees it."""

    def to(self, _):
        return self


@pytest.fixture
def interpreter(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("kernels run compiled where there is a GPU: tests/training/test_gpu.py")
    import triton.language as tl
    from triton.runtime import interpreter as module

    convert = module._implicit_cvt
    monkeypatch.setattr(module, "_implicit_cvt", lambda x: Scalar(x) if isinstance(x, float) else convert(x))
    for name in ("rms_norm", "layer_norm"):
        importlib.import_module(f"liger_kernel.ops.{name}")
        monkeypatch.setattr(sys.modules[f"liger_kernel.ops.{name}"], "rsqrt", lambda x: tl.math.rsqrt(x))
    importlib.import_module("liger_kernel.ops.geglu")
    monkeypatch.setattr(sys.modules["liger_kernel.ops.geglu"], "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


def apply(policy):
    return apply_liger_kernels(policy.base, policy.family.language_model(policy.base))


def classes(names):
    found = {}
    for kind in MODELING:
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        found |= {(kind, name): getattr(module, name) for name in names if hasattr(module, name)}
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_modules_replaced(name):
    policy = load_policy(f"tiny:{name}", device="cpu")
    before = {key: value.data_ptr() for key, value in policy.base.state_dict().items()}
    assert apply(policy) == COUNTS[name]
    kinds = {type(module).__name__ for module in policy.family.language_model(policy.base).modules()}
    assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= kinds and not kinds & (set(RMS_NORMS) | GATED_MLPS)
    assert {key: value.data_ptr() for key, value in policy.base.state_dict().items()} == before, "the same weights"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_replaced_model_has_the_same_log_probs_and_gradients(interpreter, name):
    sizes = {"num_layers": 1, "vision_layers": 1}
    plain, replaced = (load_policy(f"tiny:{name}", device="cpu", tiny_options=sizes) for _ in range(2))
    for policy in (plain, replaced):  # ones would hide how a norm's weight enters
        g = torch.Generator().manual_seed(1)
        for module in policy.base.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                module.weight.data += torch.randn(module.weight.shape, generator=g) / 4
    apply(replaced)
    replaced = FrozenCopy(replaced).policy.requires_grad_(True)  # a copy runs the kernels on its own weights
    video = None
    if name != "text":
        config, tokenizer = plain.base.config, plain.tokenizer
        video = plain.family.video_inputs(config, tokenizer, random_frames((2, 28, 28, 3)))
    prompt = plain.family.prompt_ids(plain.tokenizer, "", video and video.token_ids)
    sample = Sample(tuple(prompt), ((5, 6, 7), (8, 9)), video)
    results = []
    for policy in (plain.requires_grad_(True), replaced):
        logps = torch.cat(policy([sample])[0])
        logps.sum().backward()
        results.append((logps.detach(), {key: p.grad for key, p in policy.named_parameters() if p.grad is not None}))
    (expected, gradients), (found, found_gradients) = results
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert set(found_gradients) == set(gradients) and len(gradients) > 10
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            found_gradients[key], gradient, rtol=1e-3, atol=1e-4, msg=lambda text, k=key: f"{k}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_known_norm_rounds_as_liger_is_told(interpreter, dtype):
    found = classes(RMS_NORMS)
    assert {name for _, name in found} == set(RMS_NORMS)
    x = torch.randn(4, 64).to(dtype)
    for (kind, name), make in found.items():
        holder = nn.ModuleDict({"norm": make(64).to(dtype)})
        nn.init.normal_(holder["norm"].weight)
        expected = holder["norm"](x)
        apply_liger_kernels(holder, holder)
        # In fp16 a value may round to its neighbour where fp32 sums come in another order.
        torch.testing.assert_close(
            holder["norm"](x), expected, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-6
        )
        if dtype == torch.float16:
            assert (holder["norm"](x) == expected).float().mean() > 0.97, (kind, name)


def test_every_known_gated_mlp_computes_the_same(interpreter):
    from types import SimpleNamespace

    found = classes(GATED_MLPS)
    assert {name for _, name in found} == set(GATED_MLPS)
    x = torch.randn(3, 16)
    for (kind, name), make in found.items():
        for activation in ("silu", "gelu_pytorch_tanh"):
            config = SimpleNamespace(
                hidden_size=16, intermediate_size=32, hidden_act=activation, hidden_activation=activation, mlp_bias=True
            )
            sizes = [32] if name in ("Qwen3_5MLP", "Qwen3NextMLP", "Qwen2MoeMLP", "Qwen3MoeMLP") else []
            holder = nn.ModuleDict({"mlp": make(config, *sizes)})
            expected = holder["mlp"](x)
            (counted,) = apply_liger_kernels(holder, holder)
            assert counted == {"silu": "SwiGLU", "gelu_pytorch_tanh": "GEGLU"}[activation]
            torch.testing.assert_close(holder["mlp"](x), expected, rtol=1e-5, atol=1e-5, msg=f"{kind} {name}")


def test_every_known_attention_finds_ligers_rotary_function(interpreter):
    """And that function does what the one it stands for does; half a head has no angle where a family rotates a part."""
    from liger_kernel.transformers import liger_rotary_pos_emb

    found = classes(ROTARY_ATTENTIONS)
    assert {name for _, name in found} == set(ROTARY_ATTENTIONS)
    for (kind, name), make in found.items():
        attention = make.__new__(make)
        nn.Module.__init__(attention)
        holder = nn.ModuleDict({"attention": attention})
        assert apply_liger_kernels(holder, holder) == {"rotary": 1}, (kind, name)
        used = attention.forward.__func__.__globals__
        original = make.forward.__globals__["apply_rotary_pos_emb"]
        assert used["apply_rotary_pos_emb"] is liger_rotary_pos_emb and original is not liger_rotary_pos_emb
        q, k, angles = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 5, 8)
        parts = (8, 4) if kind in ("qwen3_next", "qwen3_5", "phi3") else (8,)
        for part in parts:
            both = torch.cat([angles[..., :part]] * 2, -1)
            expected = original(q.clone(), k.clone(), both.cos(), both.sin())
            for one, other in zip(
                liger_rotary_pos_emb(q.clone(), k.clone(), both.cos(), both.sin()), expected, strict=True
            ):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=f"{kind} {name}")


def test_nothing_to_replace_is_an_error_that_names_who_has_something():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(
        ValueError,
        match=r"for any module of Linear, Sequential.*works with qwen2_5_vl, qwen3_vl, llava_onevision",
    ):
        apply_liger_kernels(model, nn.Sequential(model[0]))  # the norm is the tower's


def test_loading_notes_the_counts():
    """The test runs on a CPU, because only the first check needs the device."""
    from synpo_fast.models import loading

    policy = load_policy("tiny:llava_onevision", device="cpu")
    assert (
        loading._apply_liger(policy, torch.device("cuda"))
        == "Liger's kernels: 5 LayerNorm, 5 RMSNorm, 2 SwiGLU, 2 rotary"
    )


def test_other_models_of_the_process_stay_as_they_are():
    policy, other = (load_policy("tiny:text", device="cpu") for _ in range(2))
    apply(policy)
    assert not any("Liger" in type(module).__name__ or "forward" in vars(module) for module in other.base.modules())
    again = load_policy("tiny:text", device="cpu")
    assert not any("Liger" in type(module).__name__ for module in again.base.modules())
