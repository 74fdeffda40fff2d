"""Frames are held as uint8 until the tower is called; what it then gets is what a video's pixels always were, to the bit."""

import math

import pytest
import torch
from transformers import AutoConfig

from synpo_fast.models.families import video_llama_3
from synpo_fast.models.families.base import concatenated
from synpo_fast.models.families.video_frames import smart_resize, smart_resize_volume
from synpo_fast.models.tiny import tiny_model
from synpo_fast.ops.video_patches import Packing, resized_frames, video_patches
from tests.models.tiny_families import SHAPES, VIDEO_FAMILIES, random_frames, tiny

PIXELS = {"internvl": "pixel_values"}


def pixels_at_once(name, config, frames, processing):
    """From the frames as they came, in one call; sizes and packing by the rules of the families' processors."""
    vision, num_frames = config.vision_config, len(frames)
    bounds = {"min_pixels": processing.min_pixels, "max_pixels": processing.max_pixels}
    if name == "qwen2_5_vl":
        packing = Packing(vision.patch_size, 2, 2)
        size = smart_resize(*frames.shape[1:3], factor=28, **bounds)
    elif name == "qwen3_vl":
        packing = Packing(vision.patch_size, 2, 2)
        size = smart_resize_volume(*frames.shape[:3], temporal_factor=2, factor=28, **bounds)
    elif name == "video_llama_3":
        packing = Packing(vision.patch_size, 2)
        bounds["max_pixels"] //= num_frames
        size = smart_resize(*frames.shape[1:3], factor=28, **bounds)
    else:
        packing, size = None, processing.size
    return video_patches(frames, size=size, mean=processing.mean, std=processing.std, packing=packing)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_the_tower_gets_the_pixels_of_one_call(name, shape):
    family, model, tokenizer = tiny(name)
    frames = random_frames(shape)
    processing = family.processing(model.config)
    expected = pixels_at_once(name, model.config, frames, processing)
    video = family.video_inputs(model.config, tokenizer, frames, processing=processing)
    assert video.frames.dtype == torch.uint8 and len(video.frames) == shape[0]
    assert not any(tensor.is_floating_point() for tensor in video.tensors.values())
    argument = PIXELS.get(name, "pixel_values_videos")
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(video.argument(argument, dtype=dtype), expected.to(dtype or torch.float32))
    assert torch.equal(video.arguments()[argument], expected)
    tower = family.vision_modules(model)[0]
    both = concatenated(tower, [video, video], (argument,))[argument]
    assert torch.equal(both, torch.cat([expected, expected]))
    if name == "video_llama_3":
        kept = video_llama_3.kept_tokens(expected.view(shape[0], -1, 4 * expected.shape[1]))
        assert torch.equal(video.tensors["video_compression_mask"], kept.flatten())


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_bf16_tower_sees_what_it_saw(name):
    """Pixels are made in the tower's dtype, where it used to cast fp32 ones."""
    family, _, _ = tiny(name)
    model, tokenizer = tiny_model(name)
    model.to(torch.bfloat16)
    video = family.video_inputs(model.config, tokenizer, random_frames((5, 61, 143, 3)))
    seen = []
    tower = family.vision_modules(model)[0]
    embedding = next(module for module in tower.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)))
    handle = embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = family.encode_videos(model, [video])[0].features
    handle.remove()
    argument = PIXELS.get(name, "pixel_values_videos")
    pixels = video.argument(argument)
    assert seen[0].dtype == torch.bfloat16 and torch.equal(seen[0].flatten(), pixels.bfloat16().flatten())
    ready = type(video)({**video.tensors, argument: pixels}, video.token_ids, video.placeholder_id)
    assert torch.equal(features, family.encode_videos(model, [ready])[0].features)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_video_takes_a_quarter_of_the_bytes(name):
    """16 frames of 720p in the families' published sizes; the counts stand in models/README.md."""
    held = {
        "qwen2_5_vl": (560, 1008),
        "qwen3_vl": (160, 288),
        "llava_onevision": (384, 384),
        "internvl": (448, 448),
        "video_llama_3": (128, 256),
    }
    family, _, tokenizer = tiny(name)
    video = family.video_inputs(AutoConfig.for_model(name), tokenizer, random_frames((16, 720, 1280, 3)))
    small = sum(tensor.numel() * tensor.element_size() for tensor in video.tensors.values())
    assert video.num_bytes - small == 16 * math.prod(held[name]) * 3 and small < 100_000


@pytest.mark.parametrize(("shape", "size"), [((3, 11, 7), (8, 12)), ((1, 16, 17), (2, 2)), ((2, 6, 10), (6, 10))])
def test_resizing_first_changes_nothing_on_a_gpu_either(shape, size):
    """Up, down and not at all, by the kernel (in Triton's interpreter here) and by the reference."""
    pytest.importorskip("triton", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    frames = random_frames((*shape, 3))
    options = {"mean": (0.48, 0.45, 0.40), "std": (0.26, 0.27, 0.28)}
    resized = resized_frames(frames, size, backend="reference")
    assert resized.dtype == torch.uint8 and resized.shape == (shape[0], *size, 3) and resized.is_contiguous()
    by_kernel = resized_frames(frames.to(device), size, backend="triton")
    assert by_kernel.dtype == torch.uint8 and torch.equal(by_kernel.cpu(), resized)
    expected = video_patches(frames, size=size, **options, backend="reference")
    for backend, first in (("reference", resized), ("triton", by_kernel)):
        assert torch.equal(video_patches(first, size=size, **options, backend=backend).cpu(), expected)


def test_a_size_that_is_none_is_refused():
    with pytest.raises(ValueError, match="both positive ints"):
        resized_frames(random_frames((1, 4, 4, 3)), (0, 4))
    with pytest.raises(ValueError, match="uint8"):
        resized_frames(torch.zeros(1, 4, 4, 3), (2, 2))
