"""The size of frames under bounds in pixels and a budget of tokens, against a search over all sizes."""

import pytest
import torch

from synpo_fast.data.pair import Pair
from synpo_fast.errors import UserError
from synpo_fast.models import load_policy
from synpo_fast.models.families.video_frames import with_resolution
from synpo_fast.scoring import PairEncoder, encode_pairs
from tests.models.tiny_families import random_frames, tiny

FREE = ["qwen2_5_vl", "qwen3_vl", "video_llama_3"]
FIXED = ["llava_onevision", "internvl"]
FACTOR = 28  # pixels of a token's side in the tiny models
TOKENS_OF_GRID = {"qwen2_5_vl": 2, "qwen3_vl": 2, "video_llama_3": 1}  # frames of a row of the temporal grid


def pair_of(frames) -> Pair:
    return Pair("What moves?", "A ball.", "A dog.", video=frames, id="p7")


def video_of(name, frames, **options):
    family, model, tokenizer = tiny(name)
    processing = with_resolution(family.processing(model.config), family=name, **options)
    return family.video_inputs(model.config, tokenizer, frames, processing=processing)


def all_tokens(video) -> int:
    """The number of tokens of the grid, of which VideoLLaMA3 drops some afterwards."""
    return int(video.tensors["video_grid_thw"].prod()) // 4


@pytest.mark.parametrize("shape", [(8, 300, 200, 3), (5, 90, 500, 3), (1, 400, 400, 3)])
@pytest.mark.parametrize("name", FREE)
def test_the_largest_size_within_the_budget_is_taken(name, shape):
    """Truth: of all max_pixels between the bounds, in steps finer than a token, the largest result that fits."""
    frames = random_frames(shape)
    least, most = 4 * FACTOR**2, 400 * FACTOR**2
    rows = -(-shape[0] // TOKENS_OF_GRID[name])
    budgets = {"min_pixels": least, "max_pixels": most}
    full = all_tokens(video_of(name, frames, **budgets))
    candidates = [
        all_tokens(video_of(name, frames, min_pixels=least, max_pixels=pixels))
        for pixels in torch.linspace(least, most, 60).int().tolist()
    ]
    for budget in (full, full - 1, full // 2, full // 5):
        found = video_of(name, frames, **budgets, video_max_tokens=budget)
        best = max(count for count in candidates if count <= budget)
        assert best <= all_tokens(found) <= budget
        assert found.num_placeholders <= all_tokens(found) and all_tokens(found) % rows == 0
        assert found.frames.shape[1] * found.frames.shape[2] * rows == all_tokens(found) * FACTOR**2


@pytest.mark.parametrize("name", FREE)
def test_a_budget_that_nothing_fits_names_the_pair(name):
    frames = random_frames((8, 300, 200, 3))
    policy = load_policy(f"tiny:{name}", min_pixels=100 * FACTOR**2, max_pixels=400 * FACTOR**2, video_max_tokens=3)
    with pytest.raises(ValueError, match=r"pair 'p7': its video takes \d+ tokens .* more than video_max_tokens=3"):
        PairEncoder.of(policy)(pair_of(frames), frames)


def test_a_loaded_policy_has_the_bounds():
    frames = random_frames((8, 300, 200, 3))
    options = {"min_pixels": FACTOR**2, "max_pixels": 50 * FACTOR**2, "video_max_tokens": 90}
    (sample,) = encode_pairs(load_policy("tiny:qwen2_5_vl", **options), [pair_of(frames)]).samples
    assert torch.equal(sample.video.frames, video_of("qwen2_5_vl", frames, **options).frames)
    assert sample.video.num_placeholders == 60  # the next size up, 6 x 4 tokens in each of 4 rows, is 96


def test_bounds_mean_what_the_processor_means():
    frames = random_frames((8, 300, 200, 3))
    # Qwen2.5-VL bounds a frame, Qwen3-VL the frames together, VideoLLaMA3 a frame below and all together above.
    size = {name: video_of(name, frames, min_pixels=FACTOR**2, max_pixels=16 * FACTOR**2).frames.shape for name in FREE}
    assert size == {"qwen2_5_vl": (8, 112, 84, 3), "qwen3_vl": (8, 28, 28, 3), "video_llama_3": (8, 28, 28, 3)}
    small = random_frames((2, 30, 30, 3))
    bounds = {"min_pixels": 16 * FACTOR**2, "max_pixels": 1000 * FACTOR**2}
    size = {name: video_of(name, small, **bounds).frames.shape for name in FREE}
    assert size == {"qwen2_5_vl": (2, 112, 112, 3), "qwen3_vl": (2, 84, 84, 3), "video_llama_3": (2, 112, 112, 3)}


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("option", ["min_pixels", "max_pixels", "video_max_tokens"])
def test_fixed_squares_refuse_a_size(name, option):
    with pytest.raises(ValueError, match=rf"{option}: family '{name}' scales every frame to 56 x 56"):
        load_policy(f"tiny:{name}", **{option: 100_000})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_pixels": 2000, "max_pixels": 1000}, "min_pixels=2000 is above max_pixels=1000$"),
        ({"max_pixels": 10}, r"is above max_pixels=10 \(min_pixels is the model's own setting: give both\)"),
        ({"min_pixels": 10**9}, r"\(max_pixels is the model's own setting: give both\)"),
        ({"max_pixels": 0}, "max_pixels must be above 0, got 0"),
        ({"video_max_tokens": -5}, "video_max_tokens must be above 0, got -5"),
    ],
)
def test_bounds_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        load_policy("tiny:qwen2_5_vl", **options)


def test_a_text_model_has_no_frames():
    with pytest.raises(ValueError, match="text model: it takes no video"):
        load_policy("tiny:text", max_pixels=1000)


def test_a_wrong_size_is_said_before_weights_are_read(tmp_path):
    """The error is one line for the user. The folder has a config, and weights that cannot be read."""
    _, model, _ = tiny("internvl")
    model.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"max_pixels: family 'internvl' scales every frame to 56 x 56"):
        load_policy(str(tmp_path), max_pixels=1000)
