"""Presets of throughput.py: shapes of models, and the number of tokens and frames of a pair.

cpu        a small Qwen2.5-VL: 29 M parameters in about the proportions of the 7B model (a visual token costs the tower a
           third of what it costs the language model, the head is a tenth of the language model)
text       the same language model without a tower; TRL's own data pipeline can feed it
text-1024  28 M parameters, prompts of 1024 tokens and responses of 128, to measure what sharing a long prompt saves
responses  4 M parameters; ten responses to one video and all 45 comparisons of two of them
gpu        Qwen2.5-VL-7B in its published dimensions, with random bf16 weights, built on the device
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from synpo_fast.models import Policy, load_policy
from synpo_fast.models.families.registry import FAMILIES
from synpo_fast.models.lora import add_lora


@dataclass(frozen=True)
class Preset:
    """A model's shape and the sizes of its pairs.

    pairs: prompts of a step, each with its own video. responses: of each prompt; with more than two, pairs_from names the
    comparisons as the trainer's option does (data/comparisons.py), and each comparison is a pair.

    prefix: tokens of the prompt, including the video's. completion: tokens of a response on average, EOS included; lengths lie
    within the share `spread` of it. size: width and height of a frame in pixels.
    """

    name: str
    family: str
    shape: dict[str, int]
    dtype: str
    frames: int
    size: int
    prefix: int
    completion: int
    spread: float
    pairs: int
    lora_r: int
    responses: int = 2
    pairs_from: str = "all"
    published: bool = False  # shape has the dimensions of a published config, not load_policy's tiny_options
    checkpointing: bool = False
    seconds_per_frame: float = 0.5


_CPU_LANGUAGE = {
    "hidden_size": 768,
    "num_layers": 3,
    "num_heads": 12,
    "num_kv_heads": 2,
    "intermediate_size": 2304,
    "vocab_size": 3072,
}
_NARROW_LANGUAGE = {"hidden_size": 512, "num_layers": 6, "intermediate_size": 1536, "vocab_size": 8000}
_SMALL_LANGUAGE = {
    "hidden_size": 256,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 768,
    "vocab_size": 2048,
}
# Qwen/Qwen2.5-VL-7B-Instruct, config.json
_QWEN25_VL_7B = {
    "hidden_size": 3584,
    "num_layers": 28,
    "num_heads": 28,
    "num_kv_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "vision_hidden_size": 1280,
    "vision_layers": 32,
    "vision_heads": 16,
    "vision_intermediate_size": 3420,
}
PRESETS = {
    "cpu": Preset(
        "cpu", "qwen2_5_vl", _CPU_LANGUAGE | {"vision_hidden_size": 256, "vision_layers": 2}, "float32",
        frames=16, size=140, prefix=240, completion=48, spread=0.0, pairs=2, lora_r=16,
    ),
    "text": Preset(
        "text", "text", _CPU_LANGUAGE, "float32",
        frames=0, size=0, prefix=240, completion=48, spread=0.0, pairs=2, lora_r=16,
    ),
    "text-1024": Preset(
        "text-1024", "text", _NARROW_LANGUAGE, "float32",
        frames=0, size=0, prefix=1024, completion=128, spread=0.0, pairs=2, lora_r=16,
    ),
    "responses": Preset(
        "responses", "qwen2_5_vl", _SMALL_LANGUAGE | {"vision_hidden_size": 64, "vision_layers": 2}, "float32",
        frames=8, size=84, prefix=120, completion=24, spread=0.0, pairs=1, lora_r=16, responses=10,
    ),
    "gpu": Preset(
        "gpu", "qwen2_5_vl", _QWEN25_VL_7B, "bfloat16",
        frames=16, size=378, prefix=1600, completion=300, spread=0.0, pairs=1, lora_r=128, published=True,
    ),
}  # fmt: skip


def build_policy(preset: Preset, device: torch.device, seed: int = 0) -> Policy:
    """A random model with a frozen tower and a LoRA adapter that is not zero, ready to train."""
    dtype = getattr(torch, preset.dtype)
    if preset.published:
        policy = _published_qwen25_vl(preset.shape, device, dtype, seed)
    else:
        sizes: dict[str, Any] = dict(preset.shape)
        policy = load_policy(f"tiny:{preset.family}", dtype=dtype, device=device, seed=seed, tiny_options=sizes)
    if preset.checkpointing:
        policy.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(seed + 1)
    add_lora(policy, r=preset.lora_r, alpha=preset.lora_r, dropout=0.0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # with B = 0 policy and reference would always agree
            nn.init.normal_(parameter, std=0.05 / preset.lora_r**0.5)
    return policy.train()


def _published_qwen25_vl(shape: dict[str, int], device: torch.device, dtype: torch.dtype, seed: int) -> Policy:
    """Builds the model on the device in its dtype, without a download and without an fp32 copy in host memory."""
    from transformers import AutoModelForImageTextToText

    from synpo_fast.models import attention
    from synpo_fast.models.tiny import tiny_tokenizer

    attention.register()
    tokenizer, family = tiny_tokenizer("qwen2_5_vl"), FAMILIES["qwen2_5_vl"]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(qwen25_vl_config(shape, tokenizer), dtype=dtype)
    implementation, _ = attention.choose("auto", device, dtype)
    policy = Policy(model.to(device), tokenizer, family, attn_implementation=implementation)
    language_model: Any = family.language_model(policy.base)
    language_model.config._attn_implementation = implementation
    policy.freeze_vision()
    return policy


def qwen25_vl_config(shape: dict[str, int], tokenizer: Any) -> Any:
    """Qwen2.5-VL's published config with these dimensions and the byte tokenizer's token ids."""
    from transformers import Qwen2_5_VLConfig

    token_ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    layers = shape["vision_layers"]
    sections = _mrope_sections(shape["hidden_size"] // shape["num_heads"])
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape["vocab_size"],
            "hidden_size": shape["hidden_size"],
            "intermediate_size": shape["intermediate_size"],
            "num_hidden_layers": shape["num_layers"],
            "num_attention_heads": shape["num_heads"],
            "num_key_value_heads": shape["num_kv_heads"],
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "initializer_range": shape["hidden_size"] ** -0.5,
            "use_sliding_window": False,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": layers,
            "hidden_size": shape["vision_hidden_size"],
            "intermediate_size": shape["vision_intermediate_size"],
            "num_heads": shape["vision_heads"],
            "out_hidden_size": shape["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [index for index in range(layers) if index % 8 == 7],  # 7, 15, 23, 31
            "initializer_range": shape["vision_hidden_size"] ** -0.5,
        },
        tie_word_embeddings=False,
        **token_ids,
    )


def _mrope_sections(head_dim: int) -> list[int]:
    """Scales the published sections 16, 24, 24 (of 64) to the head's dimension."""
    rest = head_dim // 2 * 3 // 8
    return [head_dim // 2 - 2 * rest, rest, rest]
