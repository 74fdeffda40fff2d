"""The shared, packed path gives what each response gives alone: values, gradients, isolation, and counted work."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synpo_fast.data import Pair
from synpo_fast.models import Policy, Sample, load_policy
from synpo_fast.models.attention import SEGMENTS
from synpo_fast.models.lora import add_lora
from synpo_fast.scoring import encode_pairs, score_pairs
from tests.models.alone import FAMILIES, VIDEO_FAMILIES, alone, encoded, gradients, plain_attention, some_pairs


def policy_of(family: str, *, lora: bool = False, **options) -> Policy:
    policy = load_policy(f"tiny:{family}", dtype="float32", device="cpu", **options)
    if lora:
        torch.manual_seed(1)
        add_lora(policy, r=4, alpha=8, dropout=0.0)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(
                    parameter, std=0.05
                )  # 0 at the start: an adapter that does nothing would prove nothing
    return policy


def loss_of(logps) -> torch.Tensor:
    """Any function of all log-probs in which each has its own weight."""
    flat = torch.cat([values for sample in logps for values in sample])
    return (flat * torch.linspace(-1.0, 1.0, flat.shape[0])).sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager", SEGMENTS])
@pytest.mark.parametrize(("share", "pack"), [(True, True), (True, False), (False, True)])
def test_log_probs_equal_those_of_each_response_alone(family, attn, share, pack):
    policy = policy_of(family, attn_implementation=attn).eval()
    samples = encoded(policy, some_pairs(family))
    with torch.no_grad():
        found = policy(samples, share_prefix=share, pack=pack)
        for sample, responses in zip(samples, found, strict=True):
            for response, logps in enumerate(responses):
                assert logps.shape == (len(sample.responses[response]),) and logps.dtype == torch.float32
                torch.testing.assert_close(logps, alone(policy, sample, response), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients_equal_those_of_each_response_alone(family, lora, checkpointing):
    """Full fine-tuning trains the tower too, through features that two responses share."""
    policy = policy_of(family, lora=lora, gradient_checkpointing=checkpointing, freeze_vision=lora).train()
    samples = encoded(policy, some_pairs(family))
    loss_of(policy(samples)).backward()
    found = gradients(policy)
    policy.zero_grad(set_to_none=True)
    with plain_attention(policy):
        loss_of([[alone(policy, s, r) for r in range(len(s.responses))] for s in samples]).backward()
    expected = gradients(policy)
    assert found.keys() == expected.keys() and len(found) > 5
    assert lora == all("lora_" in name for name in found)
    # A few gradients are 0 but for rounding (a key's bias moves all scores alike): those are held to the largest's scale.
    floor = 1e-4 * max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-4 * grad.norm().clamp_min(floor), name


def text_sample(prompt: list[int], *responses: list[int]) -> Sample:
    return Sample(tuple(prompt), tuple(tuple(response) for response in responses))


@pytest.fixture(scope="module")
def text_policy() -> Policy:
    return policy_of("text").eval()


tokens = st.integers(5, 60)
lengths = st.integers(1, 200)


@settings(max_examples=15)
@given(data=st.data())
def test_any_lengths_and_any_number_of_responses(text_policy, data):
    samples = []
    for _ in range(data.draw(st.integers(1, 3))):
        sizes = [data.draw(lengths) for _ in range(1 + data.draw(st.integers(1, 3)))]
        samples.append(text_sample(*(torch.randint(5, 60, (size,)).tolist() for size in sizes)))
    with torch.no_grad():
        for sample, responses in zip(samples, text_policy(samples), strict=True):
            for response, logps in enumerate(responses):
                torch.testing.assert_close(logps, alone(text_policy, sample, response), rtol=0, atol=1e-5)


@settings(max_examples=15)
@given(data=st.data())
def test_branches_and_pairs_are_isolated(text_policy, data):
    """Other words in one branch, or in a whole pair, leave all others as they are: bit-equal at equal length."""
    draw = lambda: torch.randint(5, 60, (data.draw(lengths),)).tolist()  # noqa: E731
    first, second = text_sample(draw(), draw(), draw()), text_sample(draw(), draw(), draw())
    other_branch = text_sample(list(first.prompt), [t + 1 for t in first.responses[0]], list(first.responses[1]))
    longer_branch = text_sample(list(first.prompt), [*first.responses[0], 7, 8], list(first.responses[1]))
    with torch.no_grad():
        before = text_policy([first, second])
        after = text_policy([other_branch, second])
        longer = text_policy([longer_branch, second])
    assert torch.equal(before[0][1], after[0][1])
    assert torch.equal(before[1][0], after[1][0]) and torch.equal(before[1][1], after[1][1])
    assert not torch.equal(before[0][0][1:], after[0][0][1:]) or len(first.responses[0]) == 1
    torch.testing.assert_close(longer[0][1], before[0][1], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat(longer[1]), torch.cat(before[1]), rtol=0, atol=1e-6)


def test_rows_are_bounded_and_give_the_same(text_policy):
    samples = [text_sample(*(torch.randint(5, 60, (size,)).tolist() for size in (20, 9, 12))) for _ in range(5)]
    calls = []
    language_model = text_policy.family.language_model(text_policy.base)
    handle = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            whole = text_policy(samples)
            assert calls == [5 * 39]
            calls.clear()
            text_policy.row_tokens = 80
            cut = text_policy(samples)
            assert calls == [78, 78, 39]
    finally:
        text_policy.row_tokens = None
        handle.remove()
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(torch.cat(one), torch.cat(other), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize("share", [True, False])
def test_the_tower_sees_each_video_once(family, share):
    policy = policy_of(family)
    samples = encoded(policy, some_pairs(family))
    seen = []
    encode = policy.family.encode_videos

    class Counting(type(policy.family)):
        def encode_videos(self, model, videos):
            seen.extend(videos)
            return encode(model, videos)

    policy.family.__class__ = Counting
    try:
        logps = policy(samples, share_prefix=share)
        assert [id(video) for video in seen] == [id(s.video) for s in samples if s.video is not None]
    finally:
        policy.family.__class__ = Counting.__mro__[1]
    assert len(logps) == 3


def test_score_pairs():
    policy = policy_of("qwen2_5_vl")
    pairs = some_pairs("qwen2_5_vl")
    scored = score_pairs(policy, pairs)
    apart = score_pairs(policy, pairs, share_prefix=False, pack=False)
    for (chosen, rejected), (chosen_apart, rejected_apart), pair in zip(scored, apart, pairs, strict=True):
        assert len(chosen) == len(policy.tokenizer(pair.chosen)["input_ids"]) + 1, "EOS included"
        torch.testing.assert_close(chosen, chosen_apart, rtol=0, atol=1e-5)
        torch.testing.assert_close(rejected, rejected_apart, rtol=0, atol=1e-5)


def test_nothing_is_cut():
    policy = policy_of("qwen2_5_vl")
    pairs = some_pairs("qwen2_5_vl")
    sizes = [len(s.prompt) + max(map(len, s.responses)) for s in encoded(policy, pairs)]
    bound = sorted(sizes)[1]
    with pytest.raises(ValueError, match=rf"needs {max(sizes)} tokens .* more than max_tokens={bound}"):
        encode_pairs(policy, pairs, max_tokens=bound)
    kept = encode_pairs(policy, pairs, max_tokens=bound, drop_too_long=True)
    assert kept.dropped == [sizes.index(max(sizes))] and len(kept.samples) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chosen": " "}, "pair 'p': chosen is empty"),
        ({"rejected": ""}, "pair 'p': rejected is empty"),
        ({"rejected": "same", "chosen": "same"}, "pair 'p': chosen and rejected are the same text"),
        ({"video": torch.zeros(2, 4, 4, 3)}, r"frames must be uint8 \[T, H, W, 3\], got float32"),
        ({"video": torch.zeros(0, 4, 4, 3, dtype=torch.uint8)}, r"got uint8 \[0, 4, 4, 3\]"),
        ({"video": np.zeros((4, 32, 32, 3), np.float32)}, r"uint8 \[T, H, W, 3\], got float32 \[4, 32, 32, 3\]$"),
        ({"video": np.zeros((4, 3, 32, 32), np.uint8)}, r"got uint8 \[4, 3, 32, 32\]$"),
        ({"video": [np.zeros((32, 32, 3), np.uint8)] * 4}, r"or frames as uint8 \[T, H, W, 3\], got list$"),
        ({"loss": "ppo"}, "loss must be 'preference', 'sft', 'desirable' or 'undesirable', got 'ppo'"),
    ],
)
def test_bad_pairs_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Pair(**{"prompt": "q", "chosen": "a", "rejected": "b", "id": "p", **fields})


def test_frames_in_a_numpy_array_are_those_of_a_tensor():
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    read_only = frames.copy()
    read_only.setflags(write=False)
    for array in (frames, frames[:, :, ::-1], read_only):
        video = Pair("q", "a", "b", video=array).video
        assert isinstance(video, torch.Tensor) and video.tolist() == array.tolist()


def test_short_names_of_types():
    for short, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        assert load_policy("tiny:text", dtype=short, device="cpu").base.get_input_embeddings().weight.dtype == dtype


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny:gpt5", {}, "unknown family in 'tiny:gpt5', expected one of qwen2_5_vl"),
        ("tiny:text", {"attn_implementation": "flash_attention_2"}, "must be auto or one of sdpa, eager"),
        ("tiny:text", {"attn_implementation": "synpo_fast_varlen", "device": "cpu"}, "needs a CUDA device"),
        ("tiny:text", {"liger_kernels": True, "device": "cpu"}, "liger_kernels=True needs a CUDA device"),
        ("tiny:text", {"dtype": "int8"}, "dtype must be one of float32"),
        (
            "tiny:text",
            {"tiny_options": {"foo": 3}},
            r"has no option 'foo' \(got foo=3\); it has hidden_size, num_layers",
        ),
        ("tiny:text", {"tiny_options": {"hidden_size": "foo"}}, "hidden_size .* a whole number above 0, got 'foo'"),
        ("tiny:text", {"tiny_options": {"num_heads": 0}}, "num_heads .* a whole number above 0, got 0"),
        ("tiny:text", {"tiny_options": {"linear_attention": 1}}, "linear_attention .* true or false, got 1"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_policy(name, **options)


def test_a_target_of_an_adapter_that_no_layer_has_is_told_those_there_are():
    told = (
        "lora_target_modules=q_proj,foo: the language model of text has no layer called foo; it has down_proj, gate_proj, "
        "k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    with pytest.raises(ValueError, match=f"^{told}$"):
        add_lora(load_policy("tiny:text", device="cpu"), targets=("q_proj", "foo"))


def test_linear_attention_is_run_apart():
    """A state that runs along the row cannot be masked: nothing is shared, and one warning says so."""
    from synpo_fast.models import policy as module

    policy = policy_of("text", tiny_options={"linear_attention": True}).eval()
    samples = [text_sample(*(torch.randint(5, 60, (size,)).tolist() for size in (20, 9, 12)))]
    calls = []
    handle = policy.family.language_model(policy.base).register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    module._warn_once_that_nothing_is_shared.cache_clear()
    with torch.no_grad(), pytest.warns(UserWarning, match="text has linear-attention layers"):
        found = policy(samples)
    handle.remove()
    assert calls == [20 + 11, 20 + 8], "each response in a row of its own, the longer first"
    with torch.no_grad():
        for response, logps in enumerate(found[0]):
            torch.testing.assert_close(logps, alone(policy, samples[0], response), rtol=0, atol=1e-5)


def test_saved_models_load_again(tmp_path):
    policy = policy_of("qwen2_5_vl").eval()
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    loaded = load_policy(str(tmp_path), dtype="float32", device="cpu").eval()
    pairs = some_pairs("qwen2_5_vl")
    with torch.no_grad():
        for one, other in zip(score_pairs(policy, pairs), score_pairs(loaded, pairs), strict=True):
            assert torch.equal(torch.cat(one), torch.cat(other))
