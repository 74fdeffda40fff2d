"""A row with several responses gives what each response gives alone, in every family, and runs its video and prompt once."""

from dataclasses import replace

import pytest
import torch

from synpo_fast.data import Response
from synpo_fast.models.attention import SEGMENTS
from synpo_fast.models.batching import micro_batches, packed_tokens
from synpo_fast.models.layout import plan_rows
from tests.models.alone import FAMILIES, VIDEO_FAMILIES, alone, encoded, gradients, plain_attention, some_pairs
from tests.models.test_policy import loss_of, policy_of

TEXTS = (
    "A red ball rolls left.",
    "x",
    "A dog.",
    "Two green squares fall, then a circle turns.",
    "No, nothing moves at all.",
)


def samples_of(policy, family):
    """The pairs of the model tests with five responses each."""
    responses = tuple(Response(text, float(-place)) for place, text in enumerate(TEXTS))
    return encoded(policy, [replace(pair, chosen="", rejected="", responses=responses) for pair in some_pairs(family)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [True, False])
def test_log_probs_equal_those_of_each_response_alone(family, share):
    policy = policy_of(family, attn_implementation=SEGMENTS).eval()
    samples = samples_of(policy, family)
    with torch.no_grad():
        for sample, found in zip(samples, policy(samples, share_prefix=share), strict=True):
            assert len(found) == len(TEXTS)
            for response, logps in enumerate(found):
                torch.testing.assert_close(logps, alone(policy, sample, response), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_each_response_alone(family):
    """The tower trains too, through features that five responses share."""
    policy = policy_of(family, freeze_vision=False).train()
    samples = samples_of(policy, family)
    loss_of(policy(samples)).backward()
    found = gradients(policy)
    policy.zero_grad(set_to_none=True)
    with plain_attention(policy):
        loss_of([[alone(policy, sample, place) for place in range(len(TEXTS))] for sample in samples]).backward()
    expected = gradients(policy)
    assert found.keys() == expected.keys()
    floor = 1e-4 * max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-4 * grad.norm().clamp_min(floor), name


@pytest.mark.parametrize("family", VIDEO_FAMILIES[:1])
def test_the_video_and_the_prompt_run_once(family):
    policy = policy_of(family).eval()
    sample = samples_of(policy, family)[0]
    seen = []
    policy.family.vision_modules(policy.base)[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        policy([sample])
    assert len(seen) == 1
    tokens = len(sample.prompt) + sum(len(response) - 1 for response in sample.responses)
    assert packed_tokens(sample) == tokens == sum(row.length for row in plan_rows([sample.lengths]))
    assert micro_batches([sample] * 3, max_pairs=3, max_tokens=2 * tokens) == [[0, 1], [2]]
