"""Ropes whose angles depend on the row's length: log-probs are those of each whole sequence alone, whatever ran before."""

import pytest
import torch

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.models import load_policy
from synpo_fast.models import policy as policy_module
from synpo_fast.models.digest import weights_key
from synpo_fast.models.generate import greedy_tokens
from synpo_fast.training.run_model import build_model
from tests.models.test_text_models import assert_logps_are_transformers_own
from tests.models.text_models import own_logps, random_sample, save_text_model

LENGTH = 1024  # that the model was first trained for
ROPES = {
    "default": ("llama", {}),
    "linear": ("llama", {"factor": 4.0}),
    "llama3": ("llama", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "yarn": ("llama", {"factor": 4.0}),
    "dynamic": ("llama", {"factor": 2.0}),
    "longrope": ("phi3", {"short_factor": [1.0] * 16, "long_factor": [1.0 + 0.2 * i for i in range(16)]}),
}
BY_LENGTH = ("dynamic", "longrope")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(rope):
        if rope not in made:
            model_type, options = ROPES[rope]
            parameters = {"rope_type": rope, "rope_theta": 10000.0, **options}
            more = {"max_position_embeddings": LENGTH if rope == "dynamic" else 4 * LENGTH}
            if rope not in ("default", "linear"):
                parameters["original_max_position_embeddings"] = LENGTH
            if rope == "longrope":
                parameters["partial_rotary_factor"] = 1.0
                more |= {"original_max_position_embeddings": LENGTH, "sliding_window": None}
            made[rope] = save_text_model(tmp_path_factory.mktemp(rope), model_type, rope_parameters=parameters, **more)
        return made[rope]

    return folder


@pytest.mark.filterwarnings("ignore:text has a rope")
@pytest.mark.parametrize("rope", ROPES)
def test_a_short_and_a_long_pair_in_one_call(folders, rope):
    """A pair on either side of the bound, one whose chosen response alone crosses it, and the short one again."""
    samples = [
        random_sample(400, 60, 40, seed=1),
        random_sample(2000, 60, 50, seed=2),
        random_sample(980, 90, 20, seed=3),
    ]
    policy = load_policy(folders(rope), device="cpu")
    assert policy.can_share == (rope not in BY_LENGTH)
    assert_logps_are_transformers_own(policy, folders(rope), samples, atol=1e-4)
    assert_logps_are_transformers_own(policy, folders(rope), samples[2:] + samples[:1], atol=1e-4)


@pytest.mark.filterwarnings("ignore:text has a rope")
@pytest.mark.parametrize("rope", BY_LENGTH)
def test_the_last_token_counts_though_it_predicts_nothing(folders, rope):
    """A sequence of 1,025 tokens is above the bound, its row of 1,024 is not."""
    samples = [random_sample(1000, size, seed=size) for size in (23, 24, 25)]
    assert_logps_are_transformers_own(load_policy(folders(rope), device="cpu"), folders(rope), samples, atol=1e-4)


@pytest.mark.filterwarnings("ignore:text has a rope")
@pytest.mark.parametrize("rope", BY_LENGTH)
def test_the_lengths_differ_enough_to_matter(folders, rope):
    """The tests above would see one length taken for another."""
    from transformers import AutoModelForCausalLM

    sample = random_sample(980, 20, seed=3)
    model = AutoModelForCausalLM.from_pretrained(folders(rope), dtype=torch.float32)
    with torch.no_grad():
        longer = model(
            input_ids=torch.tensor([[*sample.prompt, *sample.responses[0], *range(100)]]), use_cache=False
        ).logits
    longer = longer[0, 979:999].log_softmax(-1).gather(1, torch.tensor(sample.responses[0])[:, None])[:, 0]
    assert (longer - own_logps(folders(rope), sample)[0]).abs().mean() > 0.05


@pytest.mark.filterwarnings("ignore:text has a rope")
@pytest.mark.parametrize("rope", BY_LENGTH)
def test_a_model_is_the_same_after_a_long_row(folders, rope):
    policy = load_policy(folders(rope), device="cpu")
    short = random_sample(LENGTH - 60, 30, seed=4)
    key, written = weights_key(policy), greedy_tokens(policy, short, max_new_tokens=4, continue_after_eos=True)
    names = [name for name, _ in policy.named_buffers()]
    with torch.no_grad():
        policy([random_sample(2000, 30)])
    greedy_tokens(policy, random_sample(1500, 1), max_new_tokens=2)
    assert weights_key(policy) == key and [name for name, _ in policy.named_buffers()] == names
    assert greedy_tokens(policy, short, max_new_tokens=4, continue_after_eos=True) == written


@pytest.mark.parametrize("rope", BY_LENGTH)
def test_it_is_said_why_rows_are_not_shared(folders, rope):
    reason = f"text has a rope of type '{rope}', whose angles depend on how long the whole row is"
    policy = load_policy(folders(rope), device="cpu")
    assert policy.notes == [f"attention: sdpa, each response in a row of its own, because {reason}"]
    policy_module._warn_once_that_nothing_is_shared.cache_clear()
    with torch.no_grad(), pytest.warns(UserWarning, match=f"{reason}: prefix sharing and packing are off"):
        policy([random_sample(20, 5, 5)])
    config = TrainConfig(
        model_name_or_path=folders(rope), train_file="x", output_dir="x", use_cpu=True, zero_stage=3, bf16=True
    )
    with pytest.raises(ValueError, match=f"{reason}: .*zero_stage=3 needs the same number of rows .*use zero_stage=2"):
        build_model(config, None, torch.device("cpu"), None)
    with pytest.raises(
        ValueError, match=f"synpo_fast_segments' is for rows that several responses share, and {reason}"
    ):
        load_policy(folders(rope), device="cpu", attn_implementation="synpo_fast_segments")
