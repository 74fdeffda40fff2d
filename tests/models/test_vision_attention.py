"""Towers that pack frames into one row: the same features as transformers' own path, in a call or a few a layer."""

import copy

import pytest
import torch
import torch.nn.functional as F

from synpo_fast.models import load_policy, vision_attention
from synpo_fast.models.attention import SEGMENTS, VARLEN
from synpo_fast.models.families.base import inner
from synpo_fast.models.families.registry import FAMILIES
from synpo_fast.models.tiny import tiny_model
from synpo_fast.models.vision_attention import REGISTERED, segments_attention, segments_of, set_vision_attention
from synpo_fast.models.vision_attention import varlen_attention as varlen
from tests.models.tiny_families import VIDEO_FAMILIES, random_frames, sample

PACKED = [name for name in VIDEO_FAMILIES if FAMILIES[name].packs_frames]
SHAPES = [(5, 61, 143, 3), (4, 56, 84, 3), (2, 30, 30, 3)]  # windows of several sizes; frames of several sizes


def plain(q, k, v, ends, longest, scale, dropout):
    """Flash attention by its definition, segment by segment: [L, H, E]."""
    assert dropout == 0 and longest == int(ends.diff().max())
    parts = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        scores = torch.einsum("qhe,khe->hqk", q[start:end], k[start:end]) * scale
        parts.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[start:end]))
    return torch.cat(parts)


@pytest.fixture
def plain_kernel(monkeypatch):
    """In place of flash attention, which no CPU runs; what surrounds it is what a GPU uses."""
    monkeypatch.setattr(vision_attention, "_kernel", lambda: plain)


def window_ends(height, width, frames):
    """Windows of 8 x 8 patches over a grid that they do not divide, as Qwen2.5-VL's tower cuts it."""
    lengths = [
        min(8, height - top) * min(8, width - left)
        for _ in range(frames)
        for top in range(0, height, 8)
        for left in range(0, width, 8)
    ]
    return torch.tensor([0, *lengths]).cumsum(0)


# Qwen2.5-VL's tower has 16 heads of 80: windows that do not fit the grid, whole frames, and frames of unequal videos.
@pytest.mark.parametrize(
    "ends",
    [window_ends(28, 34, 2), torch.arange(0, 3 * 320 + 1, 320), torch.tensor([0, 64, 68, 132, 148, 149, 181])],
    ids=["windows", "frames", "unequal"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_equal_one_call_a_segment(ends, dtype, plain_kernel):
    cut, other = segments_of(ends), segments_of(torch.tensor([0, int(ends[-1])]))
    q, k, v = torch.randn(3, 1, 16, int(ends[-1]), 80, dtype=dtype)
    scale = 0.07
    expected = torch.cat(
        [
            F.scaled_dot_product_attention(*(tensor[:, :, start:end] for tensor in (q, k, v)), scale=scale)
            for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        ],
        2,
    ).transpose(1, 2)
    found, _ = segments_attention(None, q, k, v, None, cu_seq_lens_q=cut.ends, cuts=(other, cut), scaling=scale)
    assert torch.equal(found, expected)
    found, _ = varlen(None, q, k, v, None, cu_seq_lens_q=cut.ends, max_length_q=cut.longest, scaling=scale)
    slack = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=slack)


def transformers_features(name, model, videos):
    """The tower from the grid alone, transformers' own sdpa, one video after another."""
    tower = FAMILIES[name].vision_modules(model)[0]
    was, tower.config._attn_implementation = tower.config._attn_implementation, "sdpa"
    names = ["pixel_values_videos", "video_grid_thw", *(["video_merge_sizes"] if name == "video_llama_3" else [])]
    features = []
    for video in videos:
        output = inner(model).get_video_features(**{key: video.argument(key) for key in names}, return_dict=True)
        # One tensor a layer up to transformers 5.19, split by video after that.
        layers = [
            layer if isinstance(layer, torch.Tensor) else layer[0] for layer in output.get("deepstack_features") or ()
        ]
        parts = [output.pooler_output[0], *layers]
        kept = video.tensors.get("video_compression_mask", torch.ones(len(parts[0]), dtype=torch.bool))
        features.append([part[kept] for part in parts])
    tower.config._attn_implementation = was
    return features


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", SEGMENTS, VARLEN])
def test_towers_equal_transformers(name, implementation, plain_kernel):
    """Features and gradients of a tower of four layers, windowed and full, for several videos in one call."""
    family = FAMILIES[name]
    model, tokenizer = tiny_model(name, vision_layers=4, vision_hidden_size=64)
    videos = [sample(family, model, tokenizer, shape, seed)[1] for seed, shape in enumerate(SHAPES)]
    theirs = copy.deepcopy(model)
    set_vision_attention(family, model, "sdpa", dtype=torch.float32, device=torch.device("cpu"))
    family.vision_modules(model)[0].config._attn_implementation = REGISTERED.get(implementation, implementation)
    found = [[each.features, *each.deepstack] for each in family.encode_videos(model, videos)]
    expected = transformers_features(name, theirs, videos)
    for ours, truth in zip(found, expected, strict=True):
        assert len(ours) == len(truth)
        for one, other in zip(ours, truth, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    sum(part.square().sum() for video in found for part in video).backward()
    sum(part.square().sum() for video in expected for part in video).backward()
    for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4 * float(other.grad.abs().max()))


@pytest.mark.parametrize(("implementation", "calls"), [("sdpa", 2 * 3 * 9 + 2 * 3), (SEGMENTS, 2 * 3 + 2), (VARLEN, 4)])
def test_calls_of_attention(implementation, calls, monkeypatch):
    """A grid of 3 x 20 x 20 patches: 3 x 9 windows of 64, 32 or 16 in two layers, 3 frames of 400 in the other two."""
    model, tokenizer = tiny_model("qwen2_5_vl", vision_layers=4)
    model.config.vision_config.fullatt_block_indexes[:] = [1, 3]
    tower = inner(model).visual
    tower.fullatt_block_indexes, tower.window_size = [1, 3], 8 * 14
    model.config.video_processing = {"min_pixels": 1, "max_pixels": 1 << 30}
    video = FAMILIES["qwen2_5_vl"].video_inputs(model.config, tokenizer, random_frames((6, 280, 280, 3)))
    assert video.tensors["video_grid_thw"].tolist() == [[3, 20, 20]]
    seen = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(1) or attention(*a, **k))
    monkeypatch.setattr(vision_attention, "_kernel", lambda: lambda *a: seen.append(1) or plain(*a))
    set_vision_attention(FAMILIES["qwen2_5_vl"], model, "auto", dtype=torch.float32, device=torch.device("cpu"))
    tower.config._attn_implementation = REGISTERED.get(implementation, implementation)
    with torch.no_grad():
        FAMILIES["qwen2_5_vl"].encode_videos(model, [video])
    assert len(seen) == calls


@pytest.mark.parametrize(
    ("name", "device", "dtype", "chosen"),
    [
        ("qwen2_5_vl", "cpu", torch.bfloat16, "sdpa"),
        ("qwen2_5_vl", "cuda", torch.bfloat16, VARLEN),
        ("qwen3_vl", "cuda", torch.float16, VARLEN),
        ("video_llama_3", "cuda", torch.float32, SEGMENTS),  # flash attention knows no fp32
        ("internvl", "cuda", torch.bfloat16, "sdpa"),  # a frame is a sequence of its batch: one call already
        ("llava_onevision", "cuda", torch.bfloat16, "sdpa"),
        ("text", "cuda", torch.bfloat16, None),
    ],
)
def test_auto(name, device, dtype, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    model, _ = tiny_model(name)
    found = set_vision_attention(FAMILIES[name], model, "auto", dtype=dtype, device=torch.device(device))
    assert found == chosen
    for module in FAMILIES[name].vision_modules(model)[:1]:
        assert module.config._attn_implementation == REGISTERED.get(chosen, chosen)


@pytest.mark.parametrize(("hidden_size", "capability"), [(24, (9, 0)), (32, (7, 5))], ids=["heads of 12", "Turing"])
def test_auto_leaves_flash_attention_where_it_does_not_fit(hidden_size, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    model, _ = tiny_model("qwen2_5_vl", vision_hidden_size=hidden_size)
    found = set_vision_attention(
        FAMILIES["qwen2_5_vl"], model, "auto", dtype=torch.bfloat16, device=torch.device("cuda")
    )
    assert found == SEGMENTS


@pytest.mark.parametrize(
    ("name", "wanted", "reason"),
    [
        ("qwen2_5_vl", "flash", "must be one of auto, sdpa, eager"),
        ("qwen2_5_vl", VARLEN, "needs a CUDA device, got cpu: leave it at auto"),
        ("qwen2_5_vl", "flash_attention_2", "needs a CUDA device"),
        ("internvl", SEGMENTS, "the tower of internvl takes each frame whole"),
    ],
)
def test_what_cannot_be_had_is_refused(name, wanted, reason):
    with pytest.raises(ValueError, match=reason):
        load_policy(f"tiny:{name}", dtype="float32", device="cpu", vision_attn_implementation=wanted)


def test_a_loaded_policy_says_what_runs():
    policy = load_policy("tiny:qwen2_5_vl", dtype="float32", device="cpu", vision_attn_implementation=SEGMENTS)
    assert policy.vision_attn_implementation == SEGMENTS
    assert load_policy("tiny:qwen2_5_vl", dtype="float32", device="cpu").vision_attn_implementation == "sdpa"
    assert load_policy("tiny:text", dtype="float32", device="cpu").vision_attn_implementation is None
