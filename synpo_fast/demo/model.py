"""Makes a small Qwen2.5-VL with random weights and a tokenizer of whole words, saved as transformers saves any model.

With one token per word a caption of one to three events has 8 to 24 tokens. With one word per attribute a model of a million
parameters learns to see within minutes. The special tokens, the order of the prompt and the network's structure are those of
Qwen2.5-VL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from synpo_fast.demo.captions import vocabulary
from synpo_fast.demo.world import BACKGROUND, CELL, SIDE
from synpo_fast.models.families.chat_template import chatml_template

BOS, EOS, PAD, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|unknown|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPACE = "▁"  # marks the space before a word, so that decoding restores the text

HIDDEN, LAYERS, HEADS = 128, 3, 4
VISION_HIDDEN, VISION_LAYERS, VISION_HEADS = 128, 2, 4
PATCH, MERGE = CELL, 1  # a vision token covers one cell of the picture


def save_model(folder: Path, seed: int) -> None:
    """Writes config, weights, tokenizer and video settings, which AutoModelForImageTextToText and AutoTokenizer can read."""
    from transformers import AutoModelForImageTextToText

    tokenizer = word_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(model_config(tokenizer), dtype=torch.float32)
    model.generation_config.do_sample = False
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def word_tokenizer() -> Any:
    """A tokenizer whose tokens are whole words, each with the space before it, and the full stop."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = (PAD, BOS, EOS, UNKNOWN, *VISION)
    words = [word if word == "." else SPACE + word for word in (*vocabulary(), "user", "assistant")]
    table = {token: index for index, token in enumerate((*specials, *dict.fromkeys(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocab=table, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("\n", " "), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(SPACE, prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=list(VISION),
        clean_up_tokenization_spaces=False,
        chat_template=chatml_template("<|vision_start|><|video_pad|><|vision_end|>"),
    )


def model_config(tokenizer: Any) -> Any:
    """The config of the small Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig

    half = HIDDEN // HEADS // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 16) * 16,
            "hidden_size": HIDDEN,
            "intermediate_size": 3 * HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS // 2,
            "max_position_embeddings": 1024,
            "initializer_range": HIDDEN**-0.5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            },
            "tie_word_embeddings": False,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": VISION_LAYERS,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_heads": VISION_HEADS,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": SIDE,
            "fullatt_block_indexes": list(range(VISION_LAYERS)),
            "out_hidden_size": HIDDEN,
            "initializer_range": VISION_HIDDEN**-0.5,
        },
        tie_word_embeddings=False,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")},
        **{f"vision_{end}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>") for end in ("start", "end")},
    )
    # This maps the background to about zero. Shapes stand out, and the model learns to see in half the steps.
    config.video_processing = {
        "mean": [BACKGROUND / 255] * 3,
        "std": [0.25] * 3,
        "min_pixels": SIDE * SIDE,
        "max_pixels": SIDE * SIDE,
    }
    return config
