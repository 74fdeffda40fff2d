"""The tiny random models."""

import pytest
import torch

from synpo_fast.models.families.registry import FAMILIES, family_of
from synpo_fast.models.tiny import tiny_model


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_models_depend_on_the_seed(name, tmp_path):
    from transformers import AutoTokenizer

    before = torch.random.get_rng_state()
    (first, tokenizer), (same, _), (other, _) = (tiny_model(name, seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in first.parameters())
    assert not first.training and family_of(first.config) is FAMILIES[name]
    text = "Ünïcode, 漢字 🙂  two  spaces .\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("x" * 100).input_ids) == 100
    vocab_size = first.get_input_embeddings().num_embeddings
    assert len(tokenizer) <= vocab_size == first.get_output_embeddings().out_features
    # What is saved is what is loaded, the sizes of its frames included.
    first.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = FAMILIES[name].load_class().from_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert FAMILIES[name].prompt_ids(again, text) == FAMILIES[name].prompt_ids(tokenizer, text)
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), loaded.parameters(), strict=True))
    if name != "text":
        assert FAMILIES[name].processing(loaded.config) == FAMILIES[name].processing(first.config)


def test_tiny_model_of_20_million_parameters():
    sizes = {"hidden_size": 512, "num_layers": 4, "num_heads": 8, "intermediate_size": 2048, "vocab_size": 8192}
    model, _ = tiny_model("qwen2_5_vl", **sizes)
    assert sum(p.numel() for p in model.parameters()) >= 20e6


def test_tiny_model_refuses():
    with pytest.raises(ValueError, match="smolvlm"):
        tiny_model("smolvlm")
    with pytest.raises(ValueError, match="internvl"):
        tiny_model("internvl", linear_attention=True)
    with pytest.raises(ValueError, match="100"):
        tiny_model("text", vocab_size=100)
    with pytest.raises(ValueError, match="num_heads"):
        tiny_model("text", hidden_size=30, num_heads=4)
