"""The model inside DeepSpeed's engine is, at every stage, the one that transformers loads: types, log-probs of long prompts."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from synpo_fast.config.deepspeed_config import deepspeed_config
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.models import load_policy
from synpo_fast.models.families.registry import FAMILIES
from synpo_fast.models.lora import add_lora
from synpo_fast.models.tiny import tiny_model
from synpo_fast.run_folder.model_files import save_model_files
from synpo_fast.training.pair_module import PairModule
from synpo_fast.training.run_model import RunModel, build_engine
from tests.models.test_low_precision import SIZES, SLACK, composite_logps, long_sample, theirs
from tests.models.tiny_families import VIDEO_FAMILIES
from tests.world import options

STAGES = (0, 1, 2, 3)


class Scores(PairModule):
    """The module a run trains, its forward cut short at the log-probs."""

    def forward(self, samples):
        return torch.cat(self.policy.forward(samples)[0])


def config_of(stage, **more):
    return TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", use_cpu=True, zero_stage=stage, **more)


def engine_of(policy, stage, *, use_peft=True, dtype=None):
    """An engine built as start.py builds it; stage 0 trains only in fp32."""
    dtype = dtype or (torch.bfloat16 if stage else torch.float32)
    if use_peft:
        add_lora(policy, r=4)  # begins at zero: log-probs are the base model's
    module = Scores(policy, config_of(stage))
    return build_engine(config_of(stage), RunModel(policy, module, dtype))


def dtype_at(stage):
    return torch.bfloat16 if stage else torch.float32


def float_buffers(model):
    # peft puts a frozen layer's parameters one level down; buffers of the model keep their names.
    return {name: buffer.dtype for name, buffer in model.named_buffers() if buffer.is_floating_point()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def measured(name, length):
        """Returns a folder, a sample, its fp32 log-probs and the error of transformers' bf16 model, by the composite forward."""
        if name not in made:
            folder = str(tmp_path_factory.mktemp(name))
            model, tokenizer = tiny_model(name, **SIZES)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[name] = folder
        if (name, length) not in made:
            policy = load_policy(made[name], device="cpu")
            sample = long_sample(policy, length, with_video=name != "text")
            truth = composite_logps(name, theirs(name, made[name], torch.float32), sample)
            other = composite_logps(name, theirs(name, made[name], torch.bfloat16), sample)
            made[name, length] = sample, truth, float((other - truth).abs().mean())
        return made[name], *made[name, length]

    return measured


def _cases():
    """Every family at every stage, half of them marked heavy; the longest prompt with one family only."""
    for name, stage in itertools.product(FAMILIES, STAGES):
        later = name not in ("qwen2_5_vl", "text") and stage < 2
        yield pytest.param(name, 2000, stage, marks=[pytest.mark.heavy] if later else [])
    yield from (("qwen2_5_vl", 8000, stage) for stage in STAGES)


@pytest.mark.parametrize(("name", "length", "stage"), _cases())
def test_the_engine_runs_the_model_that_transformers_loads(saved, group, name, length, stage):
    folder, sample, truth, allowed = saved(name, length)
    dtype = dtype_at(stage)
    policy = load_policy(folder, dtype=dtype, device="cpu")
    engine = engine_of(policy, stage)
    assert float_buffers(policy.base) == float_buffers(theirs(name, folder, dtype))
    with torch.no_grad():
        error = float((engine.forward([sample]).double() - truth).abs().mean())
    assert error <= (1e-5 if dtype == torch.float32 else SLACK * allowed)


@pytest.fixture(scope="module")
def adapted(saved, tmp_path_factory):
    """A policy with an adapter that does something; a sample, its fp32 log-probs and peft's error in bf16, the adapter loaded by
    peft into transformers' own model."""
    from peft import PeftModel

    folder, *_ = saved("qwen2_5_vl", 2000)
    adapter = tmp_path_factory.mktemp("adapter")

    def make(dtype):
        policy = load_policy(folder, dtype=dtype, device="cpu")
        add_lora(policy, r=8, alpha=16, dropout=0.0)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_" in name:  # both: peft's first values follow another generator
                    parameter.copy_(torch.randn(parameter.shape, generator=g).mul_(0.1).bfloat16())
        return policy

    def peft_logps(dtype):
        # In the type of the model, as it trains here (peft alone would compute adapters in fp32).
        model = PeftModel.from_pretrained(
            theirs("qwen2_5_vl", folder, dtype), str(adapter), autocast_adapter_dtype=False
        )
        return composite_logps("qwen2_5_vl", model.get_base_model(), sample)

    policy = make(torch.float32)
    policy.model.save_pretrained(adapter)
    sample = long_sample(policy, 2000, with_video=True, responses=(300, 200))
    truth = peft_logps(torch.float32)
    assert (
        truth - composite_logps("qwen2_5_vl", theirs("qwen2_5_vl", folder, torch.float32), sample)
    ).abs().mean() > 0.1
    return make, sample, truth, float((peft_logps(torch.bfloat16) - truth).abs().mean())


@pytest.mark.parametrize("stage", STAGES)
def test_the_engine_runs_an_adapter_as_peft_does(adapted, group, stage):
    make, sample, truth, allowed = adapted
    policy = make(dtype_at(stage))
    module = Scores(policy, config_of(stage))
    engine = build_engine(config_of(stage), RunModel(policy, module, dtype_at(stage)))
    with torch.no_grad():
        error = float((engine.forward([sample]).double() - truth).abs().mean())
    assert error <= (1e-5 if stage == 0 else SLACK * allowed)


def test_an_adapter_rounded_to_fp8_would_be_noticed(adapted):
    make, sample, truth, allowed = adapted
    policy = make(torch.bfloat16)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).to(parameter.dtype)
    with torch.no_grad():
        error = float((torch.cat(policy([sample])[0]).double() - truth).abs().mean())
    assert error > 1.5 * SLACK * allowed


@pytest.fixture
def newline_in_fp32(monkeypatch):
    """A LLaVA-OneVision that declares its newline, a parameter of the model itself, to stay in fp32."""
    from transformers import LlavaOnevisionForConditionalGeneration as Model

    monkeypatch.setattr(Model, "_keep_in_fp32_modules_strict", ["image_newline"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_that_are_declared_stay_in_fp32(newline_in_fp32, group, tmp_path, stage):
    policy = load_policy("tiny:llava_onevision", dtype=torch.bfloat16, device="cpu")
    before = policy.base.model.image_newline.detach().clone()
    assert before.dtype == torch.float32 and not torch.equal(before, before.bfloat16().float())
    engine = engine_of(policy, stage, use_peft=False)
    assert torch.equal(policy.base.model.image_newline, before)
    assert policy.vision_is_frozen()
    sample = long_sample(policy, 300, with_video=True)
    engine.backward(-engine.forward([sample]).mean())
    assert engine.step(1e-2).applied
    assert torch.equal(policy.base.model.image_newline, before)
    # A checkpoint of full fine-tuning holds it, in its type.
    save_model_files(policy, tmp_path, engine.whole_weights(), adapter=False, source="tiny:x")
    again = load_policy(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert torch.equal(again.base.model.image_newline, before)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_frozen_tower_in_fp32_gives_the_same_features_inside_the_engine(group, name):
    """A tower that a model declares to stay in fp32 as a whole has no parameters left there, and pixels that are not rounded."""
    policy = load_policy(f"tiny:{name}", dtype=torch.bfloat16, device="cpu")
    for module in policy.family.vision_modules(policy.base):
        module.float()
    sample = long_sample(policy, 200, with_video=True)
    (before,) = policy.encode_videos([sample])
    engine_of(policy, 2)
    assert not list(policy.family.vision_modules(policy.base)[0].parameters())
    (after,) = policy.encode_videos([sample])
    assert torch.equal(after.features, before.features) and after.features.dtype == torch.float32


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_trained_parameter_that_is_declared_is_refused(group, monkeypatch, stage):
    from transformers import Qwen2ForCausalLM

    monkeypatch.setattr(Qwen2ForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    policy = load_policy("tiny:text", dtype=torch.bfloat16, device="cpu")
    with pytest.raises(ValueError, match=r"2 trained parameters .*input_layernorm.weight \(float32\).*use_peft=true"):
        engine_of(policy, stage, use_peft=False)
    # Frozen under an adapter it is no obstacle.
    policy = load_policy("tiny:text", dtype=torch.bfloat16, device="cpu")
    engine_of(policy, stage)
    assert policy.base.model.layers[0].input_layernorm.weight.dtype == torch.float32


def test_an_adapter_on_a_layer_kept_in_fp32_trains_in_the_type_of_the_others(group, monkeypatch):
    from transformers import Qwen2ForCausalLM

    monkeypatch.setattr(Qwen2ForCausalLM, "_keep_in_fp32_modules_strict", ["k_proj"])
    policy = load_policy("tiny:text", dtype=torch.bfloat16, device="cpu")
    engine = engine_of(policy, 2)
    assert {parameter.dtype for _, parameter in engine.trained_parameters()} == {torch.bfloat16}
    assert policy.base.model.layers[0].self_attn.k_proj.base_layer.weight.dtype == torch.float32


def test_a_deepspeed_file_that_is_not_there_is_told_so():
    with pytest.raises(ValueError, match=r"deepspeed='zero2': there is no such file: .* set zero_stage"):
        deepspeed_config(config_of(2, deepspeed="zero2"), torch.bfloat16)


def test_a_deepspeed_file_may_not_round_buffers(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"data_types": {"buffer_dtype": "bf16"}}))
    with pytest.raises(ValueError, match=r"data_types\.buffer_dtype, which would round rotary frequencies"):
        deepspeed_config(config_of(2, deepspeed=str(file)), torch.bfloat16)


def test_resumed_full_fine_tuning_in_bf16_has_the_same_model(world, tmp_path, in_one_process, monkeypatch):
    """The resumed run has its frequencies in fp32 and ends with the weights of the uninterrupted run."""
    seen = []

    def noted(config, model):
        seen.append(float_buffers(model.policy.base))
        return build_engine(config, model)

    monkeypatch.setattr("synpo_fast.training.start.build_engine", noted)
    common = {"use_peft": False, "bf16": True, "loss_type": "dpo", "learning_rate": 3e-4, "max_steps": 4}
    in_one_process(options(world, tmp_path / "whole", save_steps=2, **common))
    half = str(tmp_path / "whole" / "checkpoint-000002")
    in_one_process(options(world, tmp_path / "part", resume=half, **common))
    assert seen[0] == seen[1] and set(seen[0].values()) == {torch.float32}
    ends = [load_file(tmp_path / name / "checkpoint-000004" / "model.safetensors") for name in ("whole", "part")]
    assert {tensor.dtype for tensor in ends[0].values()} == {torch.bfloat16}
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_adapter_trained_in_bf16_is_saved_in_fp32_and_resumes_bit_for_bit(world, tmp_path, in_one_process):
    """The saved weights are the optimiser's fp32 weights; rounded, they are the trained ones."""
    common = {"bf16": True, "loss_type": "dpo", "learning_rate": 3e-4, "max_steps": 4}
    in_one_process(options(world, tmp_path / "whole", save_steps=2, **common))
    half = tmp_path / "whole" / "checkpoint-000002"
    in_one_process(options(world, tmp_path / "part", resume=str(half), **common))
    ends = [
        load_file(tmp_path / name / "checkpoint-000004" / "adapter_model.safetensors") for name in ("whole", "part")
    ]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert {tensor.dtype for tensor in ends[0].values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in ends[0].values())
    state = load_file(tmp_path / "whole" / "checkpoint-000004" / "state" / "optimizer.safetensors")
    masters = sorted(float(value.double().sum()) for name, value in state.items() if name.endswith(".master"))
    assert masters == sorted(float(value.double().sum()) for value in ends[0].values())
