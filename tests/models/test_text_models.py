"""Every text model type that is served: a packed, shared call gives what transformers' own forward gives each response alone."""

import re

import pytest
import torch

from synpo_fast.models import attention, load_policy, vision_attention
from synpo_fast.models.attention import SEGMENTS, VARLEN
from synpo_fast.models.families.text import Text
from synpo_fast.models.generate import greedy_tokens
from tests.models.text_models import own_logps, random_sample, save_text_model

SAMPLES = [random_sample(40, 21, 12, seed=1), random_sample(25, 9, 30, seed=2)]
DENSE = {"gemma2": "eager", "stablelm": "sdpa"}  # what auto takes, where it is not segments


def assert_logps_are_transformers_own(policy, folder, samples, atol=2e-5):
    with torch.no_grad():
        found = policy(samples)
    for sample, ours in zip(samples, found, strict=True):
        for logps, expected in zip(ours, own_logps(folder, sample), strict=True):
            torch.testing.assert_close(logps, expected, rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore:text has linear-attention layers")
@pytest.mark.parametrize("model_type", Text.model_types)
def test_packed_and_shared_rows_give_transformers_own_log_probs(tmp_path, model_type):
    folder = save_text_model(tmp_path, model_type)
    policy = load_policy(folder, device="cpu")
    if policy.can_share:
        assert policy.attn_implementation == DENSE.get(model_type, SEGMENTS)
    assert_logps_are_transformers_own(policy, folder, SAMPLES)


@pytest.mark.parametrize(
    ("model_type", "wanted", "message"),
    [
        (
            "gemma2",
            SEGMENTS,
            r"gemma2 caps the scores of its attention at 1 \(attn_logit_softcapping\).*take auto, or eager",
        ),
        ("gemma2", "sdpa", "cannot be used: gemma2 caps the scores"),
        ("stablelm", SEGMENTS, "the layers of stablelm do not pass the row's layout on .*take auto, or sdpa or eager"),
        ("qwen3_next", SEGMENTS, "is for rows that several responses share, and text has linear-attention layers"),
    ],
)
def test_an_attention_that_would_give_something_else_is_refused(tmp_path, model_type, wanted, message):
    folder = save_text_model(tmp_path, model_type)
    with pytest.raises(ValueError, match=message):
        load_policy(folder, device="cpu", attn_implementation=wanted)


def test_the_reason_for_a_dense_mask_is_said(tmp_path, monkeypatch):
    policy = load_policy(save_text_model(tmp_path, "gemma2"), device="cpu")
    assert policy.notes == [
        "attention: eager with a dense mask, because gemma2 caps the scores of its attention at 1 "
        "(attn_logit_softcapping), which only eager supports"
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    gpu = torch.device("cuda", 0)
    assert attention.choose("auto", gpu, torch.bfloat16, policy.base.config)[0] == "eager"
    with pytest.raises(ValueError, match="attn_implementation='synpo_fast_varlen' cannot be used: gemma2 caps"):
        attention.choose(VARLEN, gpu, torch.bfloat16, policy.base.config)


def test_captions_are_written_with_capped_scores(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save_text_model(tmp_path, "gemma2")
    sample = SAMPLES[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config._attn_implementation == "eager"
    tokens = list(sample.prompt)
    with torch.no_grad():
        for _ in range(20):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    found = greedy_tokens(load_policy(folder, device="cpu"), sample, max_new_tokens=20, continue_after_eos=True)
    assert found == tokens[len(sample.prompt) :][: len(found)] and len(found) > 5


@pytest.mark.parametrize("function", [
    attention.segments_attention, attention.varlen_attention,
    vision_attention.segments_attention, vision_attention.varlen_attention,
])  # fmt: skip
@pytest.mark.parametrize("asked", [{"sliding_window": 8}, {"softcap": 50.0}, {"s_aux": 1.0}, {"is_causal": True}])
def test_what_a_layer_asks_for_and_is_not_known_is_an_error(function, asked):
    needed = {"packed": None} if function.__module__ == attention.__name__ else {"cu_seq_lens_q": None}
    if function is vision_attention.segments_attention:
        needed["cuts"] = ()
    if function is vision_attention.varlen_attention:
        needed["max_length_q"] = 1
    q = torch.zeros(1, 1, 1, 8)
    (name,) = asked
    with pytest.raises(ValueError, match=re.escape(f"does not support {name}={asked[name]}")):
        function(None, q, q, q, None, scaling=1.0, dropout=0.0, **needed, **asked)
