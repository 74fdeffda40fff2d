"""Reference log-probs: they agree with the policy at the start, and only the policy changes afterwards."""

import dataclasses

import pytest
import torch

from synpo_fast.models import load_policy
from synpo_fast.models.digest import sample_key, tower_key, weights_key
from synpo_fast.models.feature_cache import FeatureCache
from synpo_fast.models.lora import add_lora
from synpo_fast.references import (
    AdapterOff,
    AnchorClip,
    FrozenCopy,
    Precomputed,
    PreviousRound,
    in_batches,
    is_fresh,
    precompute,
    why_stale,
    write_logps,
)
from tests.models.alone import encoded, some_pairs
from tests.models.test_policy import loss_of, policy_of


def flat(logps) -> torch.Tensor:
    return torch.cat([values for sample in logps for values in sample])


@pytest.fixture
def policy():
    return policy_of("qwen2_5_vl", lora=False)


def train(policy, samples, steps: int = 20) -> None:
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(policy(samples)).backward()
        optimizer.step()


def make(kind: str, policy, samples, folder):
    if kind == "frozen copy":
        return FrozenCopy(policy)
    if kind == "adapter off":
        return AdapterOff(policy)
    if kind == "previous round":
        return PreviousRound(load_policy("tiny:qwen2_5_vl", dtype="float32", device="cpu"))
    file = folder / "reference.pt"
    precompute(FrozenCopy(policy), in_batches(samples, 2), file, weights_key=weights_key(policy))
    return Precomputed(file, weights_key=weights_key(policy))


@pytest.mark.parametrize("kind", ["frozen copy", "adapter off", "previous round", "precomputed"])
def test_agrees_at_step_0_and_never_moves(kind, policy, tmp_path):
    add_lora(policy, r=4, alpha=8, dropout=0.1)
    samples = encoded(policy, some_pairs("qwen2_5_vl"))
    reference = make(kind, policy, samples, tmp_path)
    with torch.no_grad():
        start = flat(policy.eval()(samples))
    torch.testing.assert_close(flat(reference(samples)), start, rtol=0, atol=1e-6)
    policy.train()
    train(policy, samples)
    after = flat(reference(samples))
    torch.testing.assert_close(after, start, rtol=0, atol=1e-6)
    assert not after.requires_grad
    assert policy.training, "a reference must leave the policy's mode as it was"
    with torch.no_grad():
        assert (flat(policy.eval()(samples)) - start).abs().max() > 0.1, "the policy itself did move"


@pytest.mark.parametrize("kind", ["frozen copy", "adapter off", "previous round", "precomputed"])
def test_a_reference_tells_whether_a_pass_of_the_tower_serves_it_too(kind, policy, tmp_path):
    add_lora(policy, r=4, alpha=8)
    reference = make(kind, policy, encoded(policy, some_pairs("qwen2_5_vl")), tmp_path)
    assert reference.same_tower is (reference.policy if kind in ("frozen copy", "adapter off") else None)


def test_the_file_of_a_run_is_what_it_always_was(policy, tmp_path):
    """A file of an earlier version is read, and an earlier version reads ours."""
    samples, file = encoded(policy, some_pairs("qwen2_5_vl")), tmp_path / "reference.pt"
    precompute(FrozenCopy(policy), [samples[:1], [], samples[1:]], file, weights_key="key")
    stored = torch.load(file, weights_only=True)
    assert sorted(stored) == ["entries", "weights"] and stored["weights"] == "key"
    assert sorted(stored["entries"]) == sorted(map(sample_key, samples))
    assert all(
        [len(values) for values in stored["entries"][sample_key(s)]] == list(map(len, s.responses)) for s in samples
    )
    assert is_fresh(file, "key") and not is_fresh(file, "another") and not is_fresh(tmp_path / "none.pt", "key")
    assert list(tmp_path.iterdir()) == [file]


def test_adapter_off_is_refused_when_anything_else_trains(policy):
    with pytest.raises(ValueError, match="needs a peft adapter"):
        AdapterOff(policy)
    add_lora(policy, r=4, alpha=8)
    reference = AdapterOff(policy)
    policy.base.get_input_embeddings().weight.requires_grad_()
    samples = encoded(policy, some_pairs("qwen2_5_vl"))
    with pytest.raises(ValueError, match=r"1 trained parameters lie outside the adapter, .*embed_tokens"):
        reference(samples)
    with pytest.raises(ValueError, match="would change"):
        AdapterOff(policy)


def test_stale_precomputed_references_are_errors(policy, tmp_path):
    samples = encoded(policy, some_pairs("qwen2_5_vl"))
    file = tmp_path / "reference.pt"
    precompute(FrozenCopy(policy), in_batches(samples[:2]), file, weights_key=weights_key(policy))
    with pytest.raises(ValueError, match="no reference for sample 'text'"):
        Precomputed(file, weights_key=weights_key(policy))(samples)
    changed = dataclasses.replace(samples[0], responses=(samples[0].responses[0][:-1], samples[0].responses[1]))
    with pytest.raises(ValueError, match="no reference for sample 'a' as it is now"):
        Precomputed(file, weights_key=weights_key(policy))([changed])
    with torch.no_grad():
        policy.base.get_output_embeddings().weight[0, 0] += 1
    with pytest.raises(ValueError, match="other reference weights"):
        Precomputed(file, weights_key=weights_key(policy))


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ("a2 7c FrameSampling(fps=1.0, max_frames=8) None 55", "was made with other weights, pairs or video files"),
        (
            "a1 7c FrameSampling(num_frames=8) Video(size=(1, 2)) 55",
            "was made with other weights, pairs or video files",
        ),
        ("a1 7c FrameSampling(fps=1.0, max_frames=8)", "was made by another version of synpo-fast"),
        ("a1", "was made by another version of synpo-fast"),
    ],
)
def test_why_a_file_is_not_fresh(tmp_path, stored, told):
    file = tmp_path / "reference.pt"
    write_logps(file, {}, weights_key=stored)
    assert why_stale(file, "a1 7c FrameSampling(fps=1.0, max_frames=8) None 55") == told
    file.write_bytes(b"")
    assert why_stale(file, "a1") == "could not be read"


def test_the_anchor_clip_ignores_the_distractors(policy):
    """The view drops everything but the anchor: whatever the rest of the composite shows, the reference stays."""
    samples = encoded(policy, some_pairs("qwen2_5_vl"))
    anchor, composite = samples[0], dataclasses.replace(samples[1], responses=samples[0].responses)
    seen = AnchorClip(FrozenCopy(policy), lambda sample: dataclasses.replace(anchor, responses=sample.responses))
    expected = flat(FrozenCopy(policy)([anchor]))
    assert torch.equal(flat(seen([composite])), expected)
    assert not torch.equal(flat(FrozenCopy(policy)([composite])), expected)
    with pytest.raises(ValueError, match="changed its responses"):
        AnchorClip(FrozenCopy(policy), lambda sample: samples[1])([anchor])


def test_features_are_kept_and_never_stale(policy, tmp_path):
    samples = encoded(policy, some_pairs("qwen2_5_vl"))
    plain = flat(policy(samples))
    policy.feature_store = FeatureCache(tmp_path, tower=tower_key(policy))
    calls = []
    tower = policy.family.vision_modules(policy.base)[0]
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    first, again = flat(policy(samples)), flat(policy(samples))
    assert torch.equal(first, plain) and torch.equal(again, plain)
    assert len(calls) == 1, "the second pass must not call the tower"
    assert policy.feature_store.hits == 2 and policy.feature_store.misses == 2
    handle.remove()
    reopened = FeatureCache(tmp_path, tower=tower_key(policy))
    assert reopened.get(samples[0].video) is not None
    assert FeatureCache(tmp_path, tower=tower_key(policy)).get(
        dataclasses.replace(samples[0].video, tensors={k: v + 1 for k, v in samples[0].video.tensors.items()})
    ) is None  # fmt: skip
    with torch.no_grad():
        next(tower.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="features of another vision tower"):
        FeatureCache(tmp_path, tower=tower_key(policy))


def test_a_trainable_tower_is_never_cached(tmp_path):
    policy = policy_of("qwen2_5_vl", freeze_vision=False)
    policy.feature_store = FeatureCache(tmp_path, tower=tower_key(policy))
    policy(encoded(policy, some_pairs("qwen2_5_vl")))
    assert not list(tmp_path.glob("*.pt"))
