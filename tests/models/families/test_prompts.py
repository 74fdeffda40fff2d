"""The parts of a prompt: the chat template, the tokens that stand for a video, its timestamps."""

import pytest

from synpo_fast.models.families.qwen3_vl import grid_times
from synpo_fast.models.families.registry import FAMILIES
from synpo_fast.models.tiny import tiny_tokenizer
from tests.models.tiny_families import TEXT, VIDEO_FAMILIES, random_frames, tiny


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
    with pytest.raises(ValueError, match="may not contain"):
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


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 9])
def test_grid_times_equal_the_processors(num_frames):
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    theirs = Qwen3VLProcessor._calculate_timestamps(None, list(range(num_frames)), 1 / 0.7, 2)
    assert grid_times(num_frames, 2, 0.7) == pytest.approx(theirs)
