"""head_of and hidden_states give the model's own logits, family by family; heads that they cannot handle are refused."""

import pytest
import torch

from synpo_fast import fused_linear_logprobs
from synpo_fast.models.head import check_head, head_of, hidden_states

from . import tiny

transformers = tiny.transformers
SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip

# family: (class prefix, what its config says, logit_scale, softcap)
FAMILIES = {
    "plain": ("Llama", {}, 1.0, None),
    "its own path to the decoder": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, 1.0, None),
    "tied": ("Qwen2", {"tie_word_embeddings": True}, 1.0, None),
    "bias": ("Phi", {}, 1.0, None),
    "softcap": ("Gemma2", {"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "softcap named otherwise": ("RecurrentGemma", {"logits_soft_cap": 4.0, "lru_width": 32}, 1.0, 4.0),
    "no softcap though the entry exists": ("Gemma2", {"final_logit_softcapping": None}, 1.0, None),
    "scale": ("Cohere", {"logit_scale": 0.25}, 0.25, None),
    "divides": ("Granite", {"logits_scaling": 8.0}, 0.125, None),
    "multiplies under the name that divides": ("HyperCLOVAX", {"logits_scaling": 0.5}, 0.5, None),
}


def family(name):
    prefix, options, *_ = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**SHAPE, **options})
    policy = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    if policy.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(policy.get_output_embeddings().bias)
    return policy


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_the_models_own(name):
    policy = family(name)
    inputs = {"input_ids": torch.randint(2, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    inputs["attention_mask"][1, 6:] = 0
    labels = inputs["input_ids"].roll(-1, 1)
    expected = policy(**inputs, use_cache=False).logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    check_head(policy)
    head, hidden = head_of(policy), hidden_states(policy, **inputs)
    got = fused_linear_logprobs(
        hidden, head.weight, labels, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap
    )
    assert (head.logit_scale, head.softcap) == FAMILIES[name][2:]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def lora(policy, **options):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    config = peft.LoraConfig(r=4, **{"target_modules": ["q_proj", "v_proj"], **options})
    wrapped = peft.get_peft_model(policy, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


@pytest.fixture
def one_process_group():
    """A device mesh of this process alone. The trainer's tests may have left such a group in this process already."""
    dist = torch.distributed
    is_new = not dist.is_initialized()
    if is_new:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    if is_new:
        dist.destroy_process_group()


def test_a_sharded_head(one_process_group):
    """Frozen it is gathered. Trained it is refused: two FSDP2 processes that shard lm_head by itself drift from the eager
    loss by 1e-3 in the second step, because full_tensor's backward does not sum over processes."""
    policy = tiny.model()
    full = policy.lm_head.weight.detach().clone()
    sharded = torch.distributed.tensor.distribute_tensor(full, one_process_group, [torch.distributed.tensor.Shard(0)])
    policy.lm_head.weight = torch.nn.Parameter(sharded, requires_grad=False)
    weight = head_of(policy).weight
    assert type(weight) is torch.Tensor
    assert torch.equal(weight, full)
    policy.lm_head.weight.requires_grad_()
    with pytest.raises(ValueError, match="sharded by itself"):
        head_of(policy)


def test_hidden_states_through_an_adapter():
    policy = tiny.model().eval()
    plain = hidden_states(policy, input_ids=torch.arange(6)[None])
    wrapped = lora(policy).eval()
    with torch.no_grad():
        outputs = wrapped(input_ids=torch.arange(6)[None], output_hidden_states=True)
        hidden = hidden_states(wrapped, input_ids=torch.arange(6)[None])
        with wrapped.disable_adapter():
            off = hidden_states(wrapped, input_ids=torch.arange(6)[None])
    torch.testing.assert_close(hidden, outputs.hidden_states[-1], rtol=0, atol=0)
    torch.testing.assert_close(off, plain, rtol=0, atol=0)
    assert not torch.allclose(hidden, plain, atol=1e-2)
    torch.testing.assert_close(head_of(wrapped).logits(hidden), outputs.logits)
    check_head(wrapped)


def test_an_adapter_on_the_head_is_refused():
    wrapped = lora(tiny.model(), target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"adapter on its head.*would ignore.*target_modules"):
        head_of(wrapped)


def test_a_head_trained_in_full_beside_the_adapter():
    wrapped = lora(tiny.model(), modules_to_save=["lm_head"]).eval()
    copy = wrapped.get_output_embeddings().modules_to_save["default"]
    torch.nn.init.normal_(copy.weight)
    inputs = {"input_ids": torch.arange(6)[None]}

    head = head_of(wrapped)
    assert head.weight is copy.weight
    assert head.weight.requires_grad
    torch.testing.assert_close(head.logits(hidden_states(wrapped, **inputs)), wrapped(**inputs).logits)
    check_head(wrapped)
    with wrapped.disable_adapter():
        torch.testing.assert_close(head_of(wrapped).logits(hidden_states(wrapped, **inputs)), wrapped(**inputs).logits)


def quantised():
    policy = tiny.model()
    policy.lm_head.weight = torch.nn.Parameter(torch.zeros(5, 5, dtype=torch.int8), requires_grad=False)
    return policy


def two_layers():
    policy = tiny.model()
    policy.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(32, 32), policy.lm_head))
    return policy


def prompt_tuned():
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    return peft.get_peft_model(tiny.model(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def encoder_decoder():
    small = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**small, decoder_start_token_id=0))


REFUSED = {
    "quantised": (quantised, "int8.*unquantised"),
    "not a linear layer": (two_layers, "Sequential, not a plain linear layer"),
    "offloaded": (lambda: tiny.model().to("meta"), "meta device"),
    "no head": (lambda: tiny.model().model, "has no output embedding"),
    "wrapped": (lambda: torch.nn.Sequential(tiny.model()), "inside the wrapper's forward"),
    "virtual tokens": (prompt_tuned, "PromptTuningConfig adds virtual tokens"),
    "encoder-decoder": (encoder_decoder, "encoder-decoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        head_of(build())


class ScalesItsLogits(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 1.01
        return outputs


class DropsPaddedWords(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits[..., :-2]
        return outputs


@pytest.mark.parametrize("build", [ScalesItsLogits, DropsPaddedWords], ids=["scale", "vocabulary"])
def test_check_head_finds_what_no_config_says(build):
    policy = build(tiny.model().config)
    with pytest.raises(ValueError, match=r"does not treat its logits|returns logits"):
        check_head(policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_check_head_sees_a_wrong_softcap_in_any_dtype(dtype, monkeypatch):
    policy = family("softcap").to(dtype)
    policy.config.final_logit_softcapping = 30.0
    check_head(policy)
    monkeypatch.setattr("synpo_fast.models.head._softcap_of", lambda config: None)
    with pytest.raises(ValueError, match="softcap=None"):
        check_head(policy)


def test_check_head_leaves_no_trace():
    policy = tiny.model()
    state, inputs = torch.get_rng_state(), {"input_ids": torch.arange(6)[None]}
    before = policy(**inputs).logits
    check_head(policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in policy.model.__dict__
    assert torch.equal(policy(**inputs).logits, before)
