"""The model files of a run load in transformers and peft without synpo_fast, and give the same results."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from synpo_fast.data import read_manifest
from synpo_fast.models import load_policy
from synpo_fast.models.lora import load_adapter_model
from synpo_fast.run_folder.model_files import merge_adapter
from synpo_fast.scoring import encode_pair, score_pairs
from tests.world import options, run

PLAIN = """
import json, sys, torch

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "synpo_fast":
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForImageTextToText, AutoTokenizer
model_dir, adapter_dir, inputs = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32)
if adapter_dir != "none":
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter_dir)
tokenizer = AutoTokenizer.from_pretrained(adapter_dir if adapter_dir != "none" else model_dir)
model.eval()
results = []
for case in torch.load(inputs):
    ids = torch.tensor([case["prompt"] + case["response"]])
    kinds = 2 * (ids == case["video_token"]).int()
    with torch.no_grad():
        logits = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
            pixel_values_videos=case["pixel_values_videos"], video_grid_thw=case["video_grid_thw"],
            second_per_grid_ts=torch.tensor([case["seconds"]]),
        ).logits[0, len(case["prompt"]) - 1 : -1]
    logps = logits.double().log_softmax(-1).gather(1, torch.tensor(case["response"])[:, None])[:, 0]
    results.append(logps.tolist())
assert not [name for name in sys.modules if name.startswith("synpo_fast")]
print("RESULT", json.dumps({"logps": results, "eos": tokenizer.eos_token_id}))
"""


def plain_logps(tmp_path, policy, samples, model_dir, adapter_dir):
    cases = [
        {
            "prompt": list(sample.prompt),
            "response": list(response),
            "video_token": sample.video.placeholder_id,
            "seconds": sample.video.seconds_per_grid,
            **sample.video.arguments(),
        }
        for sample in samples
        for response in sample.responses
    ]
    torch.save(cases, tmp_path / "inputs.pt")
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    done = run(
        [sys.executable, str(script), str(model_dir), str(adapter_dir), str(tmp_path / "inputs.pt")], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.split("RESULT ")[1])
    assert result["eos"] == policy.tokenizer.eos_token_id
    return result["logps"]


@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "full"])
def test_the_saved_model_in_plain_transformers(world, tmp_path, in_one_process, use_peft):
    values = options(world, tmp_path / "out", use_peft=use_peft, max_steps=3)
    in_one_process(values)
    checkpoint = tmp_path / "out" / "checkpoint-000003"
    pairs = read_manifest(world / "pairs.jsonl")[:3]
    base = load_policy(str(world / "base"), device="cpu")
    before = score_pairs(base, pairs, video_root=world)
    if use_peft:
        policy = load_policy(str(world / "base"), device="cpu")
        policy.model, _, named = load_adapter_model(checkpoint, None, torch.float32)
        assert named == str(world / "base")
        folders = [(world / "base", checkpoint)]
        merge_adapter(checkpoint, tmp_path / "merged")
        folders.append((tmp_path / "merged", "none"))
    else:
        policy = load_policy(str(checkpoint), device="cpu")
        folders = [(checkpoint, "none")]
    with torch.no_grad():
        ours = [values.double() for pair in score_pairs(policy, pairs, video_root=world) for values in pair]
    samples = [encode_pair(policy, pair, video_root=world) for pair in pairs]
    for model_dir, adapter_dir in folders:
        theirs = plain_logps(tmp_path, policy, samples, model_dir, adapter_dir)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, torch.tensor(other, dtype=torch.float64), rtol=0, atol=2e-5)
    moved = max(float((a - b).abs().max()) for a, b in zip(ours, [v for pair in before for v in pair], strict=True))
    assert moved > 1e-2  # training changed what is compared


def test_merging_small_updates_in_fp32_keeps_them(world, tmp_path, in_one_process):
    """An update below half a step of bf16 is there after the merge."""
    values = options(world, tmp_path / "out", max_steps=1, learning_rate=1e-6, warmup_ratio=0.0)
    in_one_process(values)
    merge_adapter(tmp_path / "out" / "checkpoint-000001", tmp_path / "merged")
    base, merged = (load_policy(str(folder), device="cpu").base for folder in (world / "base", tmp_path / "merged"))
    difference = [float((a - b).abs().max()) for a, b in zip(base.parameters(), merged.parameters(), strict=True)]
    assert 0 < max(difference) < 1e-5


def test_a_merge_in_bf16_has_the_types_that_transformers_loads(world, tmp_path, in_one_process, monkeypatch):
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    in_one_process(options(world, tmp_path / "out", max_steps=1))
    monkeypatch.setattr(Model, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    merge_adapter(tmp_path / "out" / "checkpoint-000001", tmp_path / "merged", dtype="bfloat16")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if "input_layernorm" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in saved.items() if "input_layernorm" not in name} == {torch.bfloat16}
    loaded = Model.from_pretrained(tmp_path / "merged", dtype="auto")
    assert loaded.config.dtype == torch.bfloat16
    assert sum(p.dtype == torch.float32 for p in loaded.parameters()) == loaded.config.text_config.num_hidden_layers


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        merge_adapter(tmp_path, tmp_path / "out", dtype="int8")


def test_an_adapter_of_a_tiny_model_is_merged_into_the_weights_it_was_trained_on(world, tmp_path, in_one_process):
    """They follow from the run's seed and options; another seed's are another model."""
    values = options(world, tmp_path / "out", model_name_or_path="tiny:qwen2_5_vl", seed=7, max_steps=1, report=False)
    values["model_options"] = {"hidden_size": 64}
    in_one_process(values)
    checkpoint = tmp_path / "out" / "checkpoint-000001"
    merge_adapter(checkpoint, tmp_path / "merged")
    base = load_policy("tiny:qwen2_5_vl", seed=7, tiny_options={"hidden_size": 64}).base.state_dict()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = next(name for name in merged if name.endswith("embed_tokens.weight"))
    own = next(value for key, value in base.items() if key.endswith("embed_tokens.weight"))
    assert torch.equal(merged[name], own), "embeddings have no adapter"
    with pytest.raises(ValueError, match="was not trained on 'tiny:internvl' but on 'tiny:qwen2_5_vl'"):
        merge_adapter(checkpoint, tmp_path / "other", model_name_or_path="tiny:internvl")
