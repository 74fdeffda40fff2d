"""Vision towers in bf16: features are those of transformers' own bf16 model on the same frames.

Frames are as large as videos make them (26 x 46 patches), weights so large that attention depends on where a patch lies. What a
mistake in precision would do is tried, too: each kind has to be far above the bar, or the test would prove nothing.
"""

from unittest import mock

import pytest
import torch

from synpo_fast.models import Sample, load_policy
from synpo_fast.models.families.registry import FAMILIES
from synpo_fast.models.families.video_frames import PixelRecipe, with_resolution
from synpo_fast.models.tiny import tiny_model
from tests.models.tiny_families import VIDEO_FAMILIES, official_inputs, random_frames

SLACK = 0.1  # of what bf16 costs; the features are the same numbers where transformers computes them in the same order
SECONDS = 1.7  # no number of bf16
# Patches of the video in time, height and width; families of fixed squares take their own size.
GRIDS = {"qwen2_5_vl": (8, 26, 46), "qwen3_vl": (2, 26, 46), "video_llama_3": (2, 26, 46)}


class LanguageModelReached(Exception):
    pass


def save_model(name, folder):
    model, tokenizer = tiny_model(
        name, hidden_size=64, num_heads=2, num_kv_heads=1, num_layers=1, vision_hidden_size=128
    )
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in FAMILIES[name].vision_modules(model):
            for parameter_name, parameter in module.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5, generator=g)
                else:
                    parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.1)
                # Large biases of queries and keys: which patches a patch attends to is decided by where they lie.
                if parameter_name.endswith("qkv.bias"):
                    parameter[: 2 * len(parameter) // 3].normal_(0, 2.5, generator=g)
                elif parameter_name.endswith(("q_proj.bias", "k_proj.bias")):
                    parameter.normal_(0, 2.5, generator=g)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def frames_of(name):
    if name not in GRIDS:
        return random_frames((3, 61, 83, 3))
    t, h, w = GRIDS[name]
    return random_frames((t * (1 if name == "video_llama_3" else 2), 14 * h, 14 * w, 3))


@torch.no_grad()
def own_features(name, folder, dtype, sample):
    """The features [P, D] that transformers' composite forward puts in place of the placeholders."""
    model = FAMILIES[name].load_class().from_pretrained(folder, dtype=dtype)
    seen = []

    def stop(module, arguments, keywords):
        seen.append(keywords["inputs_embeds"][0])
        raise LanguageModelReached

    model.model.language_model.register_forward_pre_hook(stop, with_kwargs=True)
    tokens = torch.tensor(sample.prompt)
    with pytest.raises(LanguageModelReached):
        model(**official_inputs(name, model, tokens, sample.video), use_cache=False)
    return seen[0][tokens == sample.video.placeholder_id].float()


def fp8(values):
    return values.to(torch.float8_e4m3fn).to(values.dtype)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_features_in_bf16_are_transformers_own(tmp_path, name):
    save_model(name, tmp_path)
    policy = load_policy(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    processing = policy.family.processing(policy.base.config)
    if name in GRIDS:
        processing = with_resolution(
            processing, family=name, min_pixels=28 * 28, max_pixels=1 << 30, video_max_tokens=None
        )
    frames = frames_of(name)
    video = policy.family.video_inputs(
        policy.base.config, policy.tokenizer, frames, seconds_per_frame=SECONDS, processing=processing
    )
    if name in GRIDS:
        assert tuple(video.tensors["video_grid_thw"][0].tolist()) == GRIDS[name]
    sample = Sample(tuple(policy.family.prompt_ids(policy.tokenizer, "", video.token_ids)), ((1,),), video)
    truth = own_features(name, tmp_path, torch.float32, sample)
    theirs = own_features(name, tmp_path, torch.bfloat16, sample)
    cost = float((theirs - truth).abs().mean())

    def distance(change=lambda features: features):
        (found,) = policy.encode_videos([sample])
        return float((change(found.features.float()) - theirs).abs().mean()) / cost

    assert distance() <= SLACK
    mistakes = {"features": distance(fp8)}
    pixels = PixelRecipe.pixels
    with mock.patch.object(PixelRecipe, "pixels", lambda self, *a, **k: fp8(pixels(self, *a, **k).float())):
        mistakes["pixels"] = distance()
    for key, buffer in policy.named_buffers():
        if "inv_freq" in key and ".language_model." not in key:
            buffer.data = buffer.data.bfloat16().float()
            mistakes["frequencies"] = distance()
    assert ("frequencies" in mistakes) == (name in GRIDS)
    assert min(mistakes.values()) > 5 * SLACK, mistakes
