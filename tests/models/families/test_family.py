"""Which family serves a model, and what families refuse."""

from types import SimpleNamespace

import pytest

from synpo_fast.models.families.registry import FAMILIES, attention_kinds, family_of
from synpo_fast.models.tiny import tiny_model, tiny_tokenizer
from tests.models.tiny_families import TEXT, random_frames, tiny


def test_family_of():
    for name, family in FAMILIES.items():
        assert family.name == name
        assert all(family_of(SimpleNamespace(model_type=kind)) is family for kind in family.model_types)
    with pytest.raises(ValueError, match=r"'smolvlm' is not supported.*qwen2_5_vl"):
        family_of(SimpleNamespace(model_type="smolvlm"))
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(FAMILIES["text"].model_types) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_text_takes_no_video():
    family, model, tokenizer = tiny("text")
    with pytest.raises(ValueError, match="no video"):
        family.video_inputs(model.config, tokenizer, random_frames((1, 28, 28, 3)))
    with pytest.raises(ValueError, match="no video"):
        family.prompt_ids(tokenizer, TEXT, (1,))
    base = tiny_tokenizer("text")
    base.chat_template = None
    assert base.decode(family.prompt_ids(base, TEXT)) == TEXT


def test_linear_attention_is_told():
    for name in FAMILIES:
        family, model, _ = tiny(name)
        assert not family.has_linear_attention(model.config)
        assert attention_kinds(model.config) == {"full_attention"}
    model, _ = tiny_model("text", linear_attention=True)
    assert family_of(model.config).has_linear_attention(model.config)
    from transformers import MistralConfig

    assert attention_kinds(MistralConfig(sliding_window=16)) == {"sliding_attention"}
