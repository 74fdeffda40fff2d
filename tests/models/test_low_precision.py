"""bf16 and fp16: the model that trains is the model that transformers' from_pretrained(dtype=...) gives its users.

The bar is transformers' own 16-bit model, through its own composite forward, on prompts as long as videos make them: rotary
frequencies rounded to bf16 show at long positions alone. Heads are of size 64, as real models have them or larger.
"""

import pytest
import torch

from synpo_fast.models import Sample, load_policy
from synpo_fast.models.digest import tower_key, weights_key
from synpo_fast.models.families.registry import FAMILIES
from synpo_fast.models.low_precision import cast_as_loaded
from synpo_fast.models.tiny import tiny_model
from synpo_fast.references import FrozenCopy
from tests.models.tiny_families import VIDEO_FAMILIES, official_inputs, random_frames

SIZES = {"hidden_size": 128, "num_heads": 2, "num_kv_heads": 1}
RESPONSES = {2000: (300, 200), 8000: (400,)}  # tokens of each response, by the prompt's: enough for a mean
SLACK = 1.05  # the errors of two rounding orders are similar, not equal


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family as transformers saves it, in fp32."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name))
            model, tokenizer = tiny_model(name, **SIZES)
            model.save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return folder


def theirs(name, folder, dtype):
    return FAMILIES[name].load_class().from_pretrained(folder, dtype=dtype)


def types(model):
    return {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_has_the_type_and_value_that_from_pretrained_gives(folders, name, dtype):
    expected = theirs(name, folders(name), dtype)
    assert any(kind == torch.float32 for kind in types(expected).values()), "rotary frequencies are in fp32"
    loaded = load_policy(folders(name), dtype=dtype, device="cpu")
    tiny = load_policy(f"tiny:{name}", dtype=dtype, device="cpu", tiny_options=SIZES)
    copied = FrozenCopy(loaded).policy
    for policy in (loaded, tiny, copied):
        assert types(policy.base) == types(expected)
        ours = dict([*policy.base.named_parameters(), *policy.base.named_buffers()])
        for tensor_name, value in [*expected.named_parameters(), *expected.named_buffers()]:
            assert torch.equal(ours[tensor_name], value), tensor_name
        assert policy.base.config.dtype == policy.base.config.get_text_config().dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_declared_parameters_stay_in_fp32(folders, monkeypatch, name, dtype):
    folder = folders(name)
    kind = type(theirs(name, folder, torch.float32))
    monkeypatch.setattr(kind, "_keep_in_fp32_modules", ["k_proj.bias", "layers.*.input_layernorm"])
    monkeypatch.setattr(kind, "_keep_in_fp32_modules_strict", ["post_attention_layernorm"])
    expected = types(theirs(name, folder, dtype))
    for policy in (
        load_policy(folder, dtype=dtype, device="cpu"),
        load_policy(f"tiny:{name}", dtype=dtype, device="cpu", tiny_options=SIZES),
    ):
        assert types(policy.base) == expected
        kept = {key for key, value in types(policy.base).items() if value == torch.float32 and "inv_freq" not in key}
        assert any("post_attention_layernorm" in key for key in kept)
        assert any("input_layernorm" in key for key in kept) == (dtype == torch.float16)


def test_a_model_that_is_cast_keeps_fp32_frequencies_of_every_rope_type():
    """A dynamic rope computes its frequencies anew from the original ones, so both are looked at."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    for rope in ("default", "linear", "dynamic", "yarn"):
        parameters = {"rope_type": rope, "rope_theta": 10000.0}
        if rope != "default":
            parameters |= {"factor": 2.0, "original_max_position_embeddings": 64}
        config = Qwen2Config(
            vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=128, rope_parameters=parameters,
        )  # fmt: skip
        model = Qwen2ForCausalLM(config)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        cast_as_loaded(model, torch.bfloat16)
        assert model.lm_head.weight.dtype == torch.bfloat16 and len(before) == 2
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name]) and buffer.dtype == torch.float32, (rope, name)
        model(torch.zeros(1, 200, dtype=torch.int64))  # beyond the original length: a dynamic rope sets new ones
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_model_whose_code_reads_numbers_while_it_is_built_is_cast_too():
    """A model's own code does this to space drop rates over its layers. On the meta device there are no numbers to read."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    class Spaced(Qwen2ForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.rates = [rate.item() for rate in torch.linspace(0, 0.1, config.num_hidden_layers)]

    config = Qwen2Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = cast_as_loaded(Spaced(config), torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16} and model.rates[1] == pytest.approx(0.1)


def test_keys_tell_a_model_from_one_with_rounded_frequencies():
    """References and features on disk that were computed with rounded frequencies are not taken for this model's."""
    policy = load_policy("tiny:qwen2_5_vl", dtype=torch.bfloat16, device="cpu")
    keys = weights_key(policy), tower_key(policy)
    for name, buffer in policy.base.named_buffers():
        if "inv_freq" in name:
            buffer.data = buffer.data.bfloat16()
    assert weights_key(policy) != keys[0] and tower_key(policy) != keys[1]


def long_sample(policy, length, *, with_video, responses=(200,)):
    """A prompt of `length` tokens, its video first, and responses of so many random letters."""
    video = None
    if with_video:
        video = policy.family.video_inputs(
            policy.base.config, policy.tokenizer, random_frames((6, 56, 84, 3)), seconds_per_frame=1.7
        )
    words = policy.family.prompt_ids(policy.tokenizer, "", video and video.token_ids)
    g = torch.Generator().manual_seed(length)
    text = torch.randint(0, 256, (length - len(words),), generator=g).tolist()
    answers = tuple(tuple(torch.randint(0, 256, (size,), generator=g).tolist()) for size in responses)
    return Sample((*words[:-2], *text, *words[-2:]), answers, video)


@torch.no_grad()
def composite_logps(name, model, sample):
    """Each response in a row of its own through transformers' own forward, logits included."""
    found = []
    for response in sample.responses:
        inputs = official_inputs(name, model, torch.tensor([*sample.prompt, *response]), sample.video)
        logits = model(**inputs, use_cache=False).logits[0, len(sample.prompt) - 1 : -1]
        found.append(logits.double().log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def our_logps(policy, sample):
    return torch.cat(policy([sample])[0]).double()


@pytest.mark.parametrize("length", [2000, 8000])
@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_is_no_further_from_fp32_than_transformers_own_bf16(folders, name, length):
    """Several samples in one packed row, a short one first; at the longest prompts one alone."""
    folder = folders(name)
    policy = load_policy(folder, dtype=torch.bfloat16, device="cpu")
    video = name in VIDEO_FAMILIES
    samples = [long_sample(policy, length, with_video=video, responses=RESPONSES[length])]
    if length == 2000:
        short = long_sample(policy, 300, with_video=video, responses=(150, 100))
        samples = [short, *samples, long_sample(policy, 1900, with_video=False, responses=(200, 200))]
    with torch.no_grad():
        found = [torch.cat(logps).double() for logps in policy(samples)]
    truth, other = ([composite_logps(name, model, s) for s in samples] for model in (
        theirs(name, folder, torch.float32), theirs(name, folder, torch.bfloat16)
    ))  # fmt: skip
    for ours, exact, own in zip(found, truth, other, strict=True):
        error, allowed = (float((each - exact).abs().mean()) for each in (ours, own))
        assert error <= SLACK * allowed, (error, allowed)
