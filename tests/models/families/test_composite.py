"""Every family: our assembly of embeddings, features and positions against transformers' own composite forward."""

import pytest
import torch

from synpo_fast.models.families.registry import FAMILIES, VideoFeatures
from synpo_fast.models.families.video_frames import VideoProcessing
from synpo_fast.models.tiny import tiny_model
from tests.models.tiny_families import (
    SHAPES,
    TEXT,
    VIDEO_FAMILIES,
    official_hidden,
    our_hidden,
    random_frames,
    sample,
    tiny,
)


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
