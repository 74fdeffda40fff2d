"""From pairs to samples: which responses, which frames, and an encoder that can travel."""

import pickle
import re

import pytest
import torch

from synpo_fast.data.encoded import PairTooLong
from synpo_fast.data.pair import Clip, Pair
from synpo_fast.data.video.decode import decode_frames
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.errors import UserError
from synpo_fast.models import load_policy
from synpo_fast.scoring import PairEncoder, encode_pair, score_pairs
from synpo_fast.testing.clips import write_clip


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny:qwen2_5_vl", tiny_options={"hidden_size": 128}).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """40 frames, one every half second."""
    root = tmp_path_factory.mktemp("videos")
    write_clip(root / "clip.mp4", codec="h264", num_frames=40, width=64, height=48, fps=2)
    return root


def text_of(policy, response) -> str:
    assert response[-1] == policy.tokenizer.eos_token_id
    return policy.tokenizer.decode(response[:-1])


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({}, ["good", "bad"]),
        ({"ground_truth": "true"}, ["good", "bad", "true"]),
        ({"loss": "sft"}, ["good"]),
        ({"loss": "sft", "rejected": "", "ground_truth": "true"}, ["good", "true"]),
    ],
)
def test_responses_and_their_order(policy, fields, texts):
    pair = Pair(**{"prompt": "q", "chosen": "good", "rejected": "bad", "id": "p", **fields})
    encoded = PairEncoder.of(policy, with_ground_truth=True)(pair, None)
    assert [text_of(policy, response) for response in encoded.sample.responses] == texts
    assert encoded.preference == (pair.loss == "preference") and encoded.has_ground_truth == ("true" in texts)
    assert encoded.id == encoded.sample.name == "p"
    without = PairEncoder.of(policy)(pair, None)
    assert not without.has_ground_truth and len(without.sample.responses) == len(texts) - encoded.has_ground_truth


def test_an_encoder_travels_without_the_weights(policy):
    frames = torch.randint(0, 256, (3, 40, 56, 3), dtype=torch.uint8)
    encoder = PairEncoder.of(policy, max_tokens=500, with_ground_truth=True)
    pickled = pickle.dumps(encoder)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    assert len(pickled) < 50_000 < weights / 10
    pair = Pair("q", "good", "bad", ground_truth="true")
    here, there = encoder(pair, frames, 0.7), pickle.loads(pickled)(pair, frames, 0.7)
    assert here.sample.prompt == there.sample.prompt and here.sample.responses == there.sample.responses
    for name, tensor in here.sample.video.arguments().items():
        assert torch.equal(tensor, there.sample.video.argument(name))
    assert here.sample.video.seconds_per_grid == there.sample.video.seconds_per_grid == pytest.approx(1.4)


def test_the_longest_response_counts(policy):
    pair = Pair("q", "good", "bad", ground_truth="x" * 50, id="p")
    prompt = len(PairEncoder.of(policy)(pair, None).sample.prompt)
    for with_truth, longest in ((False, 5), (True, 51)):
        PairEncoder.of(policy, max_tokens=prompt + longest, with_ground_truth=with_truth)(pair, None)
        short = PairEncoder.of(policy, max_tokens=prompt + longest - 1, with_ground_truth=with_truth)
        with pytest.raises(PairTooLong, match=rf"pair 'p' needs {prompt + longest} tokens \({prompt} of them"):
            short(pair, None)


def test_videos_are_decoded_by_path(policy, root):
    frames, _ = decode_frames("clip.mp4", indices=[4, 5, 6, 7], root=root)
    ready = Pair("q", "good", "bad", video=frames)  # half a second between frames is taken where nobody says
    named = Pair("q", "good", "bad", clips=(Clip("clip.mp4", 2.0, 4.0),))
    sampling = FrameSampling(num_frames=4)
    with torch.no_grad():
        wanted = torch.cat(score_pairs(policy, [ready])[0])
        found = torch.cat(score_pairs(policy, [named], video_root=root, sampling=sampling)[0])
        whole = Pair("q", "good", "bad", video="clip.mp4")
        other = torch.cat(score_pairs(policy, [whole], video_root=root, sampling=sampling)[0])
    assert torch.equal(found, wanted)
    assert not torch.equal(other, wanted)


def test_by_default_a_frame_every_two_seconds_within_8_and_16(policy, root):
    pair = Pair("q", "good", "bad", video="clip.mp4")
    for sampling, num_frames in ((None, 10), (FrameSampling(num_frames=3), 3)):
        options = {} if sampling is None else {"sampling": sampling}
        sample = encode_pair(policy, pair, video_root=root, **options)
        assert sample.video.tensors["video_grid_thw"][0, 0] == -(-num_frames // 2), "two frames a grid row"


def test_an_sft_pair_has_no_rejected_response(policy):
    with torch.no_grad():
        ((chosen, rejected),) = score_pairs(policy, [Pair("q", "good", "", loss="sft")])
    assert len(chosen) == 5 and rejected.shape == (0,) and rejected.dtype == torch.float32


def test_mistakes_are_named(policy):
    with pytest.raises(ValueError, match="there is no such file"):
        encode_pair(policy, Pair("q", "a", "b", video="missing.mp4"), video_root=".")
    tokenizer = load_policy("tiny:text").tokenizer
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        PairEncoder(policy.family, policy.base.config, tokenizer)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected", "ground_truth"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "text"])
def test_a_special_token_in_a_text_is_refused_as_in_training(name, field):
    """A tokenizer would end the response there, or make room for a video."""
    policy = load_policy(f"tiny:{name}", tiny_options={"hidden_size": 128})
    for token in {policy.tokenizer.eos_token, policy.family.placeholder_token} - {""}:
        fields = {
            "prompt": "q",
            "chosen": "good",
            "rejected": "bad",
            "ground_truth": "true",
            field: f"So {token}it goes",
        }
        said = re.escape(f"pair 'p7' has {token!r} in {field}, a special token of the model's tokenizer")
        with pytest.raises(UserError, match=said):
            score_pairs(policy, [Pair("q", "good", "bad"), Pair(**fields, id="p7")])
        with pytest.raises(UserError, match=said):
            PairEncoder.of(policy)(Pair(**fields, id="p7"), None)


def test_what_is_no_pair_is_named(policy):
    with pytest.raises(UserError, match=re.escape("pairs[1]: expected Pair, got dict")):
        score_pairs(policy, [Pair("q", "good", "bad"), {"prompt": "q", "chosen": "good", "rejected": "bad"}])
