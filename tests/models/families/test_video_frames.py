"""Frame sizes and pixel settings against the processors. The conversion itself is tested in tests/ops/video_patches."""

from types import SimpleNamespace

import pytest
import torch

from synpo_fast.models.families import video_llama_3
from synpo_fast.models.families.video_frames import (
    CLIP_MEAN,
    CLIP_STD,
    VideoProcessing,
    processing_with,
    smart_resize,
    smart_resize_volume,
)
from tests.models.tiny_families import VIDEO_FAMILIES, random_frames, tiny


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
    ours = family.video_inputs(model.config, tokenizer, frames, processing=processing).arguments()
    assert ours["video_grid_thw"].tolist() == theirs["image_grid_thw"].tolist()
    one_level = 1.01 / 255 / min(CLIP_STD)
    resized = (height % 28, width % 28) != (0, 0)
    difference = (ours["pixel_values_videos"] - theirs["pixel_values"]).abs().max().item()
    assert difference <= (one_level if resized else 1e-6)


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


@pytest.mark.parametrize("frames_at_a_time", [1, 2, 100])
def test_repeats_are_found_a_few_frames_at_a_time(monkeypatch, frames_at_a_time):
    patches = torch.randn(7, 5, 12).index_select(0, torch.tensor([0, 0, 1, 2, 2, 2, 6]))
    patches[4, 3] += 1
    monkeypatch.setattr(video_llama_3, "CHUNK_BYTES", frames_at_a_time * 4 * 5 * 12)
    kept = video_llama_3.kept_tokens(patches).int().tolist()
    nothing_new = [1, 0, 0, 0, 0]
    assert kept == [[1] * 5, nothing_new, [1] * 5, [1] * 5, [0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [1] * 5]


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_family_hears_its_preprocessor_and_its_config(name):
    family, model, _ = tiny(name)
    assert family.processing(model.config, {"image_mean": [0.1, 0.2, 0.3]}).mean == (0.1, 0.2, 0.3)
    config = SimpleNamespace(vision_config=model.config.vision_config, video_processing={"std": [1, 2, 3]})
    assert family.processing(config, {"image_std": [4, 5, 6]}).std == (1, 2, 3)
    assert family.processing(SimpleNamespace(vision_config=config.vision_config)) == family.default_processing(config)
