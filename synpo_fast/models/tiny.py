"""Small random models of every family with their own tokenizer, built from a config in a second or two, without network.

The tokenizer has one token per byte, so any text survives a round trip and texts of an exact length can be made. It also has
the family's special tokens and chat template. Weights depend on the seed and the sizes only. Their standard deviation is
1 / sqrt(width) instead of transformers' 0.02: otherwise a small model's output would hardly depend on its input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from synpo_fast.errors import UserError
from synpo_fast.models.families.registry import FAMILIES

BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS: dict[str, tuple[str, ...]] = {
    "qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "qwen3_vl": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "llava_onevision": ("<image>", "<video>"),
    "internvl": ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    "video_llama_3": ("<|image_pad|>", "<|video_pad|>"),
    "text": (),
}
TEXT_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

PATCH_SIZE = 14
SQUARE = 4 * PATCH_SIZE  # side of frames with a fixed size: 4 x 4 patches, 4 tokens
# Bounds for frames that keep their aspect ratio: 1 to 6 tokens per frame, or per two frames.
MIN_PIXELS, MAX_PIXELS = 28 * 28, 6 * 28 * 28


@dataclass(frozen=True)
class Sizes:
    """The sizes of a tiny model; see tiny_model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    vision_hidden_size: int
    vision_layers: int
    tie_word_embeddings: bool
    max_positions: int


def tiny_model(
    family_name: str,
    seed: int = 0,
    *,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int | None = None,
    vocab_size: int | None = None,
    vision_hidden_size: int = 32,
    vision_layers: int = 2,
    tie_word_embeddings: bool = False,
    linear_attention: bool = False,
    max_positions: int = 32768,
) -> tuple[Any, Any]:
    """Builds a random model of the family, in fp32 and eval mode, and its tokenizer.

    Args:
        family_name: "text", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl" or "video_llama_3".
        seed: the weights depend on the seed and the sizes.
        intermediate_size: None: twice the hidden size.
        vocab_size: pads the vocabulary with unused tokens to this size; None: to a multiple of 16.
        linear_attention: every other layer has linear attention (family "text" only).

    Raises ValueError for an unknown family, for sizes that do not fit together, and for an option that the family lacks.
    """
    if family_name not in FAMILIES:
        raise UserError(f"unknown family {family_name!r}, expected one of {', '.join(FAMILIES)}")
    if linear_attention and family_name != "text":
        raise UserError(f"family {family_name!r} has no linear attention; only 'text' can be built with it")
    if hidden_size % num_heads or hidden_size // num_heads % 2 or num_heads % num_kv_heads:
        raise UserError(
            "hidden_size must be an even multiple of num_heads, and num_heads a multiple of num_kv_heads, got"
            f" {hidden_size}, {num_heads} and {num_kv_heads}"
        )
    if hidden_size // num_heads < 6 and family_name in ("qwen2_5_vl", "qwen3_vl"):
        raise UserError(f"family {family_name!r} needs hidden_size / num_heads >= 6, got {hidden_size // num_heads}")
    if vision_hidden_size % 8:
        raise UserError(f"vision_hidden_size must be a multiple of 8, got {vision_hidden_size}")
    tokenizer = tiny_tokenizer(family_name)
    smallest = -(-len(tokenizer) // 16) * 16
    if vocab_size is not None and vocab_size < len(tokenizer):
        raise UserError(f"vocab_size must be at least {len(tokenizer)} for family {family_name!r}, got {vocab_size}")
    sizes = Sizes(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=2 * hidden_size if intermediate_size is None else intermediate_size,
        vocab_size=smallest if vocab_size is None else vocab_size,
        vision_hidden_size=vision_hidden_size,
        vision_layers=vision_layers,
        tie_word_embeddings=tie_word_embeddings,
        max_positions=max_positions,
    )
    make_config = _linear_text if linear_attention else CONFIGS[family_name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family_name].load_class().from_config(make_config(sizes, tokenizer), dtype=torch.float32)
    return model.eval(), tokenizer


def check_tiny_options(options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that tiny_model lacks, and for a value of a wrong type."""
    known = {
        name: each for name, each in inspect.signature(tiny_model).parameters.items() if each.kind is each.KEYWORD_ONLY
    }
    for name, value in options.items():
        if name not in known:
            raise UserError(f"a tiny: model has no option {name!r} (got {name}={value!r}); it has {', '.join(known)}")
        if isinstance(known[name].default, bool):
            fits, wanted = isinstance(value, bool), "true or false"
        else:
            fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
            wanted = "a whole number above 0"
        if not fits and not (value is None and known[name].default is None):
            raise UserError(f"option {name} of a tiny: model must be {wanted}, got {value!r}")


def tiny_tokenizer(family_name: str) -> Any:
    """Builds a tokenizer with one token per byte, followed by the special tokens of the family."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level.decoder = decoders.ByteLevel()
    specials = (PAD, BOS, EOS, *SPECIAL_TOKENS[family_name])
    byte_level.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS[family_name]),
        clean_up_tokenization_spaces=False,
        chat_template=FAMILIES[family_name].chat_template or TEXT_CHAT_TEMPLATE,
    )


def _text_settings(sizes: Sizes, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "max_position_embeddings": sizes.max_positions,
        "initializer_range": sizes.hidden_size**-0.5,
        "tie_word_embeddings": sizes.tie_word_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _mrope(sizes: Sizes, **settings: Any) -> dict[str, Any]:
    half = sizes.hidden_size // sizes.num_heads // 2
    third = half // 3
    sections = [half - 2 * third, third, third]
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **settings}


def _ids(tokenizer: Any, **tokens: str) -> dict[str, Any]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _free_size(config: Any, *, max_pixels: int = MAX_PIXELS) -> Any:
    config.video_processing = {"min_pixels": MIN_PIXELS, "max_pixels": max_pixels}
    return config


def _qwen2_5_vl(sizes: Sizes, tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(
        text_config={**_text_settings(sizes, tokenizer), "rope_parameters": _mrope(sizes)},
        vision_config={
            "depth": sizes.vision_layers,
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": 2 * sizes.vision_hidden_size,
            "num_heads": 2,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": SQUARE,
            "fullatt_block_indexes": [sizes.vision_layers - 1],
            "out_hidden_size": sizes.hidden_size,
            "initializer_range": sizes.vision_hidden_size**-0.5,
        },
        tie_word_embeddings=sizes.tie_word_embeddings,
        **_vision_ids(tokenizer),
    )
    return _free_size(config)


def _qwen3_vl(sizes: Sizes, tokenizer: Any) -> Any:
    from transformers import Qwen3VLConfig

    config = Qwen3VLConfig(
        text_config={
            **_text_settings(sizes, tokenizer),
            "head_dim": sizes.hidden_size // sizes.num_heads,
            "rope_parameters": _mrope(sizes, mrope_interleaved=True),
        },
        vision_config={
            "depth": sizes.vision_layers,
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": 2 * sizes.vision_hidden_size,
            "num_heads": 2,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": sizes.hidden_size,
            "num_position_embeddings": 16,
            # One for each of the first decoder layers: the model would silently drop any more.
            "deepstack_visual_indexes": list(range(min(2, sizes.vision_layers, sizes.num_layers))),
            "initializer_range": sizes.vision_hidden_size**-0.5,
        },
        tie_word_embeddings=sizes.tie_word_embeddings,
        **_vision_ids(tokenizer),
    )
    return _free_size(config, max_pixels=8 * MAX_PIXELS)


def _vision_ids(tokenizer: Any) -> dict[str, Any]:
    return _ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


def _llava_onevision(sizes: Sizes, tokenizer: Any) -> Any:
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_text_settings(sizes, tokenizer)},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": 2 * sizes.vision_hidden_size,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": 2,
            "image_size": SQUARE,
            "patch_size": PATCH_SIZE,
            "vision_use_head": False,
        },
        tie_word_embeddings=sizes.tie_word_embeddings,
        **_ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )


def _internvl(sizes: Sizes, tokenizer: Any) -> Any:
    from transformers import InternVLConfig

    return InternVLConfig(
        text_config={"model_type": "qwen2", **_text_settings(sizes, tokenizer)},
        vision_config={
            "model_type": "internvl_vision",
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": 2 * sizes.vision_hidden_size,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": 2,
            "image_size": [SQUARE, SQUARE],
            "patch_size": [PATCH_SIZE, PATCH_SIZE],
            "initializer_range": sizes.vision_hidden_size**-0.5,
        },
        image_seq_length=4,
        tie_word_embeddings=sizes.tie_word_embeddings,
        **_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )


def _video_llama_3(sizes: Sizes, tokenizer: Any) -> Any:
    from transformers import VideoLlama3Config

    config = VideoLlama3Config(
        text_config={"model_type": "qwen2", **_text_settings(sizes, tokenizer)},
        vision_config={
            "model_type": "video_llama_3_vision",
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": 2 * sizes.vision_hidden_size,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": 2,
            "patch_size": PATCH_SIZE,
            "initializer_range": sizes.vision_hidden_size**-0.5,
        },
        tie_word_embeddings=sizes.tie_word_embeddings,
        **_ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    return _free_size(config, max_pixels=8 * MAX_PIXELS)


def _text(sizes: Sizes, tokenizer: Any) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**_text_settings(sizes, tokenizer))


def _linear_text(sizes: Sizes, tokenizer: Any) -> Any:
    from transformers import Qwen3_5TextConfig

    head_dim = sizes.hidden_size // sizes.num_heads
    return Qwen3_5TextConfig(
        **_text_settings(sizes, tokenizer),
        head_dim=head_dim,
        layer_types=["linear_attention" if index % 2 == 0 else "full_attention" for index in range(sizes.num_layers)],
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim,
        linear_num_key_heads=sizes.num_kv_heads,
        linear_num_value_heads=sizes.num_heads,
        rope_parameters=_mrope(sizes, mrope_interleaved=True, partial_rotary_factor=1.0),
    )


CONFIGS: dict[str, Callable[[Sizes, Any], Any]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "video_llama_3": _video_llama_3,
    "text": _text,
}
