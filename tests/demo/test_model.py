"""The demo's model: a folder that transformers and peft load without this package, and that says the same there."""

import json
import os
import subprocess
import sys
from random import Random

import pytest
import torch

from synpo_fast.data.pair import Pair
from synpo_fast.demo.captions import PROMPT, careless_caption, vocabulary
from synpo_fast.demo.model import save_model, word_tokenizer
from synpo_fast.demo.world import FRAMES_PER_EVENT, draw_scene, random_scene
from synpo_fast.models.generate import greedy_text
from synpo_fast.models.loading import load_policy
from synpo_fast.models.lora import add_lora, save_adapter
from synpo_fast.scoring import PairEncoder

PLAIN = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "synpo_fast":
            raise ImportError("synpo_fast is blocked here")

sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

base, adapter, inputs, length = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter or base)
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
if adapter:
    model = PeftModel.from_pretrained(model, adapter)
model.eval()
captions = []
for sample in torch.load(inputs):
    written = model.generate(**sample, max_new_tokens=int(length), do_sample=False)[0, sample["input_ids"].shape[1] :]
    captions.append(tokenizer.decode(written, skip_special_tokens=True))
assert not [name for name in sys.modules if name.startswith("synpo_fast")]
print("CAPTIONS", json.dumps(captions))
"""


def plain_captions(base, adapter, samples, tmp_path, max_new_tokens=24):
    """Captions by transformers' own generate, in a process that cannot import synpo_fast. It gets the video's tensors ready made:
    transformers' processors for video need torchvision."""
    inputs = []
    for sample in samples:
        tokens = torch.tensor([sample.prompt])
        inputs.append(
            {
                "input_ids": tokens,
                "attention_mask": torch.ones_like(tokens),
                "mm_token_type_ids": 2 * (tokens == sample.video.placeholder_id).int(),
                "second_per_grid_ts": torch.tensor([sample.video.seconds_per_grid]),
                **sample.video.arguments(),
            }
        )
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [
        sys.executable,
        "-c",
        PLAIN,
        str(base),
        str(adapter or ""),
        str(tmp_path / "inputs.pt"),
        str(max_new_tokens),
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("CAPTIONS ")]
    return json.loads(line.removeprefix("CAPTIONS "))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "base"
    save_model(folder, seed=1)
    return folder


def samples_of(policy, count):
    encoder = PairEncoder.of(policy)
    samples = []
    for seed in range(count):
        random = Random(seed)
        frames = torch.from_numpy(draw_scene(random_scene(random), random))
        samples.append(encoder(Pair(PROMPT, "First one.", "", loss="sft"), frames, 0.25).sample)
    return samples


def test_text_survives_the_tokenizer():
    tokenizer = word_tokenizer()
    for seed in range(50):
        text = careless_caption(random_scene(Random(seed)), Random(seed), num_slips=3).text
        tokens = tokenizer(text).input_ids
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
        assert len(tokens) == len(text.replace(".", " .").split()) and tokenizer.unk_token_id not in tokens
    assert tokenizer.unk_token_id in tokenizer("First two large red elephants.").input_ids


def test_every_word_of_the_prompt_is_known(base):
    policy = load_policy(str(base), device="cpu")
    (sample,) = samples_of(policy, 1)
    assert policy.tokenizer.unk_token_id not in sample.prompt
    text = policy.tokenizer.decode([token for token in sample.prompt if token != sample.video.placeholder_id])
    assert text.replace(" ", "") == (
        "<|im_start|>user<|vision_start|><|vision_end|>Describethevideo.<|im_end|><|im_start|>assistant"
    )
    assert len(policy.tokenizer) < 2 * len(vocabulary())


def test_a_cell_of_two_frames_is_one_token(base):
    policy = load_policy(str(base), device="cpu")
    for sample, seed in zip(samples_of(policy, 4), range(4), strict=True):
        num_frames = FRAMES_PER_EVENT * len(random_scene(Random(seed)))
        assert sample.video.num_placeholders == num_frames // 2 * 16


def test_the_seed_decides_the_weights(tmp_path, base):
    save_model(tmp_path / "same", seed=1)
    save_model(tmp_path / "other", seed=2)
    files = [(folder / "model.safetensors").read_bytes() for folder in (base, tmp_path / "same", tmp_path / "other")]
    assert files[0] == files[1] != files[2]


def test_plain_transformers_and_peft_write_the_same_captions(base, tmp_path):
    """An adapter as training leaves it, with weights large enough to change what is said."""
    policy = load_policy(str(base), device="cpu")
    samples = samples_of(policy, 3)
    without = [greedy_text(policy, sample, max_new_tokens=24) for sample in samples]
    add_lora(policy, r=4, alpha=8, dropout=0.0)
    torch.manual_seed(0)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.3)
    weights = {f"policy.{name}": p.detach() for name, p in trained.items()}
    save_adapter(policy, tmp_path / "adapter", weights)
    policy.tokenizer.save_pretrained(str(tmp_path / "adapter"))
    captions = [greedy_text(policy, sample, max_new_tokens=24) for sample in samples]
    assert captions != without
    assert plain_captions(base, tmp_path / "adapter", samples, tmp_path) == captions
