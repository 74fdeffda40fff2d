"""Every family: our assembly of embeddings, features and positions against transformers' own composite forward."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from synpo_fast.models.family import FAMILIES, VideoFeatures, attention_kinds, family_of
from synpo_fast.models.qwen3_vl import grid_times
from synpo_fast.models.tiny import tiny_model, tiny_tokenizer
from synpo_fast.models.video_frames import (
    CLIP_MEAN,
    CLIP_STD,
    VideoProcessing,
    normalise_frames,
    pack_patches,
    processing_with,
    resize_frames,
    smart_resize,
    smart_resize_volume,
)

VIDEO_FAMILIES = [name for name in FAMILIES if name != "text"]
TEXT = "What happens, naïve  reader?\n"
# An odd T with sides no patch divides, larger than the bound; an even T; one frame smaller than a patch.
SHAPES = [(5, 61, 143, 3), (8, 56, 56, 3), (1, 11, 9, 3), (3, 30, 200, 3)]

_models: dict[str, tuple] = {}


def tiny(name):
    if name not in _models:
        _models[name] = tiny_model(name)
    return FAMILIES[name], *_models[name]


def random_frames(shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def sample(family, model, tokenizer, shape, seed=0, **options):
    video = family.video_inputs(model.config, tokenizer, random_frames(shape, seed), **options)
    prompt = family.prompt_ids(tokenizer, TEXT, video.token_ids)
    response = tokenizer("A dog runs.", add_special_tokens=False).input_ids
    return torch.tensor([*prompt, *response, tokenizer.eos_token_id]), video


@torch.no_grad()
def our_hidden(family, model, token_ids, video=None, features=None, positions=None):
    embeddings = model.get_input_embeddings()(token_ids)[None]
    mask = torch.zeros(1, len(token_ids), dtype=torch.bool)
    all_features = []
    if video is not None:
        all_features = [features or family.encode_videos(model, [video])[0]]
        mask[0] = token_ids == video.placeholder_id
        embeddings[mask] = all_features[0].features
    if positions is None:
        positions = family.position_ids(model, token_ids, video)
    output = family.language_model(model)(
        inputs_embeds=embeddings,
        position_ids=positions[..., None, :],
        use_cache=False,
        **family.language_kwargs(mask, all_features),
    )
    return output.last_hidden_state[0]


@torch.no_grad()
def official_hidden(name, model, token_ids, video=None):
    inputs = {"input_ids": token_ids[None], "attention_mask": torch.ones(1, len(token_ids), dtype=torch.long)}
    if video is not None:
        inputs |= video.tensors
        if name == "llava_onevision":
            inputs["pixel_values_videos"] = inputs["pixel_values_videos"][None]
        if name in ("qwen2_5_vl", "qwen3_vl"):
            inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == model.config.video_token_id).int()
        if name == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([video.seconds_per_grid])
    return model.base_model(**inputs, use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_hidden_states_equal_the_composite_forward(name):
    family, model, tokenizer = tiny(name)
    samples = [sample(family, model, tokenizer, shape, seed) for seed, shape in enumerate(SHAPES)]
    for token_ids, video in samples:
        torch.testing.assert_close(
            our_hidden(family, model, token_ids, video),
            official_hidden(name, model, token_ids, video),
            rtol=0,
            atol=1e-5,
        )
    # The comparison is worth something only if the features matter.
    token_ids, video = samples[0]
    features = family.encode_videos(model, [video])[0]
    blind = VideoFeatures(features.features * 0, features.deepstack)
    seen = our_hidden(family, model, token_ids, video, features)
    assert (our_hidden(family, model, token_ids, video, blind) - seen).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_text_alone_equals_the_composite_forward(name):
    family, model, tokenizer = tiny(name)
    token_ids = torch.tensor(family.prompt_ids(tokenizer, TEXT))
    torch.testing.assert_close(
        our_hidden(family, model, token_ids), official_hidden(name, model, token_ids), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_have_three_components_and_matter(name):
    family, model, tokenizer = tiny(name)
    token_ids, video = sample(family, model, tokenizer, (9, 60, 90, 3), seconds_per_frame=2.0)
    positions = family.position_ids(model, token_ids, video)
    assert positions.shape == (3, len(token_ids)) and positions.dtype == torch.int64
    assert not torch.equal(positions[0], positions[1])
    flat = torch.arange(len(token_ids)).expand(3, -1)
    change = our_hidden(family, model, token_ids, video, positions=flat) - our_hidden(family, model, token_ids, video)
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(
        our_hidden(family, model, token_ids, video), official_hidden(name, model, token_ids, video), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_response_goes_on_one_after_the_last_token_of_the_prompt(name):
    """In Qwen2.5-VL the time of a long video runs ahead of the text after it, so the largest position is not the last."""
    family, model, tokenizer = tiny(name)
    video = None
    if name != "text":
        video = family.video_inputs(model.config, tokenizer, random_frames((24, 56, 56, 3)), seconds_per_frame=5.0)
    prompt = torch.tensor(family.prompt_ids(tokenizer, "x", video and video.token_ids))
    whole = torch.cat([prompt, torch.full((7,), 65)])
    positions = family.position_ids(model, prompt, video)
    going_on = positions[..., -1:] + torch.arange(1, 8)
    assert torch.equal(family.position_ids(model, whole, video), torch.cat([positions, going_on], dim=-1))


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_list_of_videos_is_one_call_and_equals_one_by_one(name):
    family, model, tokenizer = tiny(name)
    videos = [sample(family, model, tokenizer, shape, seed)[1] for seed, shape in enumerate(SHAPES)]
    calls = []
    tower = family.vision_modules(model)[0]
    hook = tower.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        together = family.encode_videos(model, videos)
        assert len(calls) == 1
        apart = [family.encode_videos(model, [video])[0] for video in videos]
        assert len(calls) == 1 + len(videos)
        assert family.encode_videos(model, []) == []
    hook.remove()
    for one, other, video in zip(together, apart, videos, strict=True):
        assert one.features.shape == (video.num_placeholders, model.config.get_text_config().hidden_size)
        assert len(one.deepstack) == (2 if name == "qwen3_vl" else 0)
        for a, b in zip((one.features, *one.deepstack), (other.features, *other.deepstack), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_vision_modules_hold_what_features_depend_on(name):
    family, _, tokenizer = tiny(name)
    model, _ = tiny_model(name)  # its own: gradients are left behind
    vision = {id(p) for module in family.vision_modules(model) for p in module.parameters()}
    model.train()
    features = family.encode_videos(model, [sample(family, model, tokenizer, SHAPES[0])[1]])[0]
    sum(part.square().sum() for part in (features.features, *features.deepstack)).backward()
    used = {id(p) for p in model.parameters() if p.grad is not None and p.grad.any()}
    assert used and used <= vision
    assert id(model.get_input_embeddings().weight) not in vision


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_rows_with_several_videos(name):
    """Two samples of one length in a batch: features are handed over row after row."""
    family, model, tokenizer = tiny(name)
    samples = [sample(family, model, tokenizer, (4, 56, 56, 3), seed) for seed in (1, 2)]
    token_ids = torch.stack([ids for ids, _ in samples])
    with torch.no_grad():
        features = family.encode_videos(model, [video for _, video in samples])
        embeddings = model.get_input_embeddings()(token_ids)
        mask = token_ids == samples[0][1].placeholder_id
        embeddings[mask] = torch.cat([video.features for video in features])
        positions = torch.stack([family.position_ids(model, ids, video) for ids, video in samples], dim=-2)
        hidden = family.language_model(model)(
            inputs_embeds=embeddings, position_ids=positions, use_cache=False, **family.language_kwargs(mask, features)
        ).last_hidden_state
    for row, (ids, video) in zip(hidden, samples, strict=True):
        torch.testing.assert_close(row, our_hidden(family, model, ids, video), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt(name):
    family, model, tokenizer = tiny(name)
    alone = family.prompt_ids(tokenizer, TEXT)
    assert tokenizer.decode(alone).endswith(f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n")
    if name == "text":
        return
    video = family.video_inputs(model.config, tokenizer, random_frames((2, 56, 56, 3)))
    ids = family.prompt_ids(tokenizer, TEXT, video.token_ids)
    start = next(i for i in range(len(ids)) if tuple(ids[i : i + len(video.token_ids)]) == video.token_ids)
    after = tokenizer.decode(ids[start + len(video.token_ids) :])
    assert after.endswith(f"{TEXT}<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(ids[:start]).removesuffix("<|vision_start|>").endswith("<|im_start|>user\n")
    assert ids.count(video.placeholder_id) == video.num_placeholders
    # Tokenised in one piece, as a processor does, it is the same.
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_prompt_refuses(name):
    family, _, tokenizer = tiny(name)
    with pytest.raises(ValueError, match="may not hold"):
        family.prompt_ids(tokenizer, f"see {family.placeholder_token}", (1, 2))
    other = tiny_tokenizer(name)
    other.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(ValueError, match=name):
        family.prompt_ids(other, TEXT, (1, 2))
    other.chat_template = None  # a repository that keeps the template with its processor
    assert family.prompt_ids(other, TEXT, (1, 2)) == family.prompt_ids(tokenizer, TEXT, (1, 2))


def test_what_stands_for_a_video():
    def written(name, shape, **options):
        family, model, tokenizer = tiny(name)
        video = family.video_inputs(model.config, tokenizer, random_frames(shape), **options)
        text = tokenizer.decode(video.token_ids)
        return text.replace(tokenizer.decode([video.placeholder_id]), "#")

    assert written("qwen2_5_vl", (3, 56, 56, 3)) == "#" * 8
    frame = "<|vision_start|>####<|vision_end|>"
    assert written("qwen3_vl", (3, 56, 56, 3)) == f"<0.2 seconds>{frame}<1.0 seconds>{frame}"
    assert written("llava_onevision", (3, 40, 70, 3)) == "#" * 13
    assert written("internvl", (2, 40, 70, 3)) == "Frame1: <img>####</img>\nFrame2: <img>####</img>"
    assert written("video_llama_3", (2, 56, 56, 3), seconds_per_frame=0.5) == "Time 0.0s:####,Time 0.5s:####"


def test_video_llama_3_leaves_out_what_repeats():
    family, model, tokenizer = tiny("video_llama_3")
    frames = random_frames((1, 56, 84, 3)).repeat(4, 1, 1, 1)
    frames[2, :28, 28:56] = 7  # one merged patch changes, and back
    video = family.video_inputs(model.config, tokenizer, frames)
    kept = video.tensors["video_compression_mask"].view(4, 6).int().tolist()
    assert kept == [[1] * 6, [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    token_ids = torch.tensor(family.prompt_ids(tokenizer, TEXT, video.token_ids))
    torch.testing.assert_close(
        our_hidden(family, model, token_ids, video),
        official_hidden("video_llama_3", model, token_ids, video),
        rtol=0,
        atol=1e-5,
    )
    whole = VideoProcessing((0.5,) * 3, (0.5,) * 3, drop_repeated_tokens=False)
    assert family.video_inputs(model.config, tokenizer, frames, processing=whole).num_placeholders == 24


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 9])
def test_grid_times_equal_the_processors(num_frames):
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    theirs = Qwen3VLProcessor._calculate_timestamps(None, list(range(num_frames)), 1 / 0.7, 2)
    assert grid_times(num_frames, 2, 0.7) == pytest.approx(theirs)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_bad_frames_are_refused(name):
    family, model, tokenizer = tiny(name)
    for frames in (
        random_frames((2, 28, 28, 3)).float(),
        random_frames((2, 3, 28, 28)),
        random_frames((28, 28, 3)),
        random_frames((2, 28, 28, 3))[:0],
    ):
        with pytest.raises(ValueError, match="uint8"):
            family.video_inputs(model.config, tokenizer, frames)


@pytest.mark.parametrize("merge_size, temporal_patch_size", [(2, 2), (2, 1), (1, 2), (3, 3)])
def test_packing_order(merge_size, temporal_patch_size):
    """Against loops that name every index. T = 5 needs padding by 0 or 1."""
    patch_size, h, w = 2, 6, 12
    frames = torch.arange(5 * 3 * h * w * patch_size**2).float().view(5, 3, h * patch_size, w * patch_size)
    packed, grid = pack_patches(
        frames, patch_size=patch_size, merge_size=merge_size, temporal_patch_size=temporal_patch_size
    )
    t = -(-5 // temporal_patch_size)
    assert grid == (t, h, w)
    rows = []
    blocks = itertools.product(range(t), range(0, h, merge_size), range(0, w, merge_size))
    for time, top, left in blocks:
        for i, j in itertools.product(range(merge_size), range(merge_size)):
            y, x = (top + i) * patch_size, (left + j) * patch_size
            rows.append(
                [
                    frames[min(time * temporal_patch_size + dt, 4), channel, y + dy, x + dx].item()
                    for channel in range(3)
                    for dt in range(temporal_patch_size)
                    for dy in range(patch_size)
                    for dx in range(patch_size)
                ]
            )
    assert packed.tolist() == rows


def test_smart_resize_equals_the_processors():
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        height, width = torch.randint(5, 900, (2,), generator=generator).tolist()
        bounds = {"factor": 28, "min_pixels": 56 * 56, "max_pixels": 200 * 200}
        assert smart_resize(height, width, **bounds) == theirs(height, width, **bounds)
    with pytest.raises(ValueError, match="aspect ratio"):
        smart_resize(1000, 4, factor=28, min_pixels=1, max_pixels=10**9)


def test_smart_resize_volume_equals_the_processors():
    module = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        num_frames, height, width = torch.randint(2, 500, (3,), generator=generator).tolist()
        if max(height, width) > 200 * min(height, width):
            continue
        bounds = {"temporal_factor": 2, "factor": 32, "min_pixels": 128 * 32 * 32, "max_pixels": 768 * 32 * 32}
        ours = smart_resize_volume(num_frames, height, width, **bounds)
        assert ours == module.smart_resize(num_frames, height, width, **bounds)


@pytest.mark.parametrize("height, width", [(56, 84), (61, 143), (300, 200)])
def test_pixels_equal_the_image_processor(height, width):
    """An image is a video of one frame, repeated. The Pillow processor's bicubic may differ by 1 of 255."""
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    frames = random_frames((1, height, width, 3))
    theirs = pil.Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 12})(
        images=[frames[0].numpy()], return_tensors="pt"
    )
    family, model, tokenizer = tiny("qwen2_5_vl")
    processing = VideoProcessing(CLIP_MEAN, CLIP_STD, min_pixels=28 * 28, max_pixels=28 * 28 * 12)
    ours = family.video_inputs(model.config, tokenizer, frames, processing=processing).tensors
    assert ours["video_grid_thw"].tolist() == theirs["image_grid_thw"].tolist()
    one_level = 1.01 / 255 / min(CLIP_STD)
    resized = (height % 28, width % 28) != (0, 0)
    difference = (ours["pixel_values_videos"] - theirs["pixel_values"]).abs().max().item()
    assert difference <= (one_level if resized else 1e-6)


def test_resizing_and_normalising():
    frames = random_frames((2, 40, 50, 3))
    assert torch.equal(resize_frames(frames, (40, 50)), frames.permute(0, 3, 1, 2))
    flat = resize_frames(torch.full((1, 33, 47, 3), 200, dtype=torch.uint8), (56, 28))
    assert flat.shape == (1, 3, 56, 28) and flat.unique().tolist() == [200]
    processing = VideoProcessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    pixels = normalise_frames(frames.permute(0, 3, 1, 2), processing)
    expected = (frames.double() / 255 - torch.tensor(processing.mean).double()) / torch.tensor(processing.std).double()
    torch.testing.assert_close(pixels.double(), expected.permute(0, 3, 1, 2), rtol=0, atol=1e-6)


def test_processing_comes_from_the_preprocessor_and_the_config():
    defaults = VideoProcessing(CLIP_MEAN, CLIP_STD, min_pixels=10, max_pixels=100)
    plain = SimpleNamespace()
    assert processing_with(defaults, plain, None) == defaults
    preprocessor = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": {"shortest_edge": 5, "longest_edge": 50}}
    assert processing_with(defaults, plain, preprocessor) == VideoProcessing((0, 0, 0), (1, 1, 1), 5, 50)
    squares = processing_with(defaults, plain, {"size": {"height": 3, "width": 4}, "min_pixels": 7})
    assert (squares.size, squares.min_pixels) == ((3, 4), 7)
    own = SimpleNamespace(video_processing={"max_pixels": 60})
    assert processing_with(defaults, own, preprocessor).max_pixels == 60
    with pytest.raises(ValueError, match="min_pixels"):
        processing_with(defaults, plain, {"min_pixels": 101})
    for name in ("llava_onevision", "internvl"):
        family, model, tokenizer = tiny(name)
        wrong = VideoProcessing(CLIP_MEAN, CLIP_STD, size=(28, 28))
        with pytest.raises(ValueError, match="28"):
            family.video_inputs(model.config, tokenizer, random_frames((1, 28, 28, 3)), processing=wrong)


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
