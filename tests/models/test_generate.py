"""Greedy captions: what the cache gives is what a whole forward gives, and what transformers' own generate gives."""

import pytest
import torch

from synpo_fast.data.pair import Pair
from synpo_fast.models import load_policy
from synpo_fast.models.families.registry import FAMILIES
from synpo_fast.models.generate import greedy_text, greedy_tokens
from synpo_fast.models.layout import plan_rows
from synpo_fast.models.policy import Sample
from synpo_fast.scoring import PairEncoder

STEPS = 10


def sample_of(policy, prompt="Describe it."):
    video = None
    if policy.family.name != "text":
        video = torch.randint(0, 255, (5, 40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return PairEncoder.of(policy)(Pair(prompt, "a", "b"), video, 0.5).sample


def tokens_without_cache(policy, sample):
    tokens = []
    for _ in range(STEPS):
        longer = Sample(sample.prompt, ((*tokens, 0),), sample.video)
        (row,) = plan_rows([longer.lengths])
        hidden = policy.hidden_states(row, [longer], policy.encode_videos([longer]))
        token = int((hidden[-1] @ policy.head().weight.T).argmax())
        if token == policy.tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_the_cache_changes_nothing(family):
    policy = load_policy(f"tiny:{family}", device="cpu", seed=2)
    sample = sample_of(policy)
    before = policy.family.language_model(policy.base).config._attn_implementation
    assert greedy_tokens(policy, sample, max_new_tokens=STEPS) == tokens_without_cache(policy, sample)
    assert policy.family.language_model(policy.base).config._attn_implementation == before


def test_text_model_against_transformers_generate():
    policy = load_policy("tiny:text", device="cpu", seed=5)
    sample = sample_of(policy)
    policy.family.language_model(policy.base).config._attn_implementation = "sdpa"
    ids = torch.tensor([sample.prompt])
    theirs = policy.base.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False,
        eos_token_id=policy.tokenizer.eos_token_id, pad_token_id=0,
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    if theirs and theirs[-1] == policy.tokenizer.eos_token_id:
        theirs.pop()
    assert greedy_tokens(policy, sample, max_new_tokens=STEPS) == theirs


def test_it_ends_at_eos_and_the_lockstep_form_says_the_same():
    policy = load_policy("tiny:text", device="cpu", seed=5)
    sample = sample_of(policy)
    tokens = greedy_tokens(policy, sample, max_new_tokens=STEPS)
    policy.tokenizer.eos_token = policy.tokenizer.convert_ids_to_tokens(tokens[3])
    cut = tokens[: tokens.index(tokens[3])]
    calls = []
    policy.base.model.register_forward_hook(lambda *_: calls.append(1))
    assert greedy_tokens(policy, sample, max_new_tokens=STEPS) == cut
    stopped = len(calls)
    assert greedy_tokens(policy, sample, max_new_tokens=STEPS, continue_after_eos=True) == cut
    assert (stopped, len(calls) - stopped) == (len(cut) + 1, STEPS)
    assert isinstance(greedy_text(policy, sample, max_new_tokens=2), str)


def test_training_mode_comes_back():
    policy = load_policy("tiny:text", device="cpu").train()
    greedy_tokens(policy, sample_of(policy), max_new_tokens=1)
    assert policy.training
