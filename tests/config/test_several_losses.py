"""`--loss_type a,b --loss_weights x,y`, WPO's weights and sorted batches: how they are given, kept, and refused."""

import pytest
import torch
from torch import nn

from synpo_fast.config.sources import dump_config, resolve_config
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoded import EncodedPair
from synpo_fast.errors import UserError
from synpo_fast.losses import PairLogprobs, preference_loss, wpo_weights
from synpo_fast.training.pair_module import PairModule

NEEDED = {"model_name_or_path": "tiny:text", "train_file": "pairs.jsonl", "output_dir": "out"}
PAIRS = [EncodedPair(None, "a")] * 2
LOGPS = [
    [torch.tensor([-0.5, -1.0, -0.3]), torch.tensor([-2.0, -0.7])],
    [torch.tensor([-0.2]), torch.tensor([-0.4, -0.6, -1.5, -0.1])],
]
REFERENCE = [[values * 1.3 - 0.1 for values in pair] for pair in LOGPS]


def config(*words):
    return resolve_config([*(f"--{name}={value}" for name, value in NEEDED.items()), *words])


def test_the_command_line_and_yaml_give_the_same_config(tmp_path):
    given = config("--loss_type", "sigmoid, bco_pair,sft", "--loss_weights", "0.8,0.2,1")
    assert given.loss_type == "dpo,bco_pair,sft" and given.loss_weights == (0.8, 0.2, 1.0)
    assert given.needs_reference and given.reference_kind == "adapter_off"
    file = tmp_path / "run.yaml"
    file.write_text("loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1]\n")  # as TRL's files have it
    assert config("--config", str(file)) == given
    file.write_text(dump_config(given))
    assert resolve_config(["--config", str(file)]) == given
    assert config("--loss_type", "sigmoid") == config("--loss_type", "dpo")


def test_a_recipe_of_one_of_the_losses_keeps_its_options_to_itself(capsys):
    result = config("--recipe", "dpo", "--loss_type", "dpo,sft")
    assert result.loss_options == {} and "belong to its loss dpo and are left out" in capsys.readouterr().err
    assert config("--recipe", "dpo", "--loss_type", "sigmoid").loss_options == config("--recipe", "dpo").loss_options


def test_the_trainer_takes_an_inner_nll_pair_by_pair():
    given = TrainConfig(**NEEDED, loss_type="dpo,sft", loss_weights=(0.5, 2.0), beta=0.3)
    found = PairModule(nn.Identity(), given).loss_of_logps(PAIRS, LOGPS, REFERENCE).losses
    dpo = preference_loss("dpo", PairLogprobs.from_pairs(LOGPS), PairLogprobs.from_pairs(REFERENCE), beta=0.3).losses
    expected = 0.5 * dpo - 2 * torch.stack([chosen.mean() for chosen, _ in LOGPS])
    torch.testing.assert_close(found, expected)


def test_weights_of_wpo_reach_the_loss():
    squares = [[values * 0.4 for values in pair] for pair in LOGPS]
    module = PairModule(nn.Identity(), TrainConfig(**NEEDED, loss_type="dpo", use_weighting=True))
    policy, reference = PairLogprobs.from_pairs(LOGPS), PairLogprobs.from_pairs(REFERENCE)
    weights = wpo_weights(policy, PairLogprobs.from_pairs(squares))
    expected = preference_loss("dpo", policy, reference, pair_weights=weights).losses
    found = module.loss_of_logps(PAIRS, LOGPS, REFERENCE, log_sum_sq_probs=squares).losses
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found.equal(module.loss_of_logps(PAIRS, LOGPS, REFERENCE).losses)
    with pytest.raises(ValueError, match=r"log_sum_sq_probs has .* \(1, 3, 2\), the policy \(2, 4, 6\)"):
        wpo_weights(policy, PairLogprobs.from_pairs(squares[:1]))


def test_evaluations_can_be_compared_by_a_member():
    best = ["--early_stopping_patience=1", "--eval_split=0.1", "--eval_steps=1"]
    named = config("--loss_type=dpo,bco_pair", "--metric_for_best_model=loss/bco_pair", *best)
    assert named.best_metric == "eval_loss/bco_pair" and not named.best_is_greater
    with pytest.raises(UserError, match=r"writes: loss, .*, loss/dpo, loss/sft$"):
        config("--loss_type=dpo,sft", "--metric_for_best_model=loss/bco_pair", *best)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss_type=dpo,ppo"], "loss_type must be one of synpo, dpo, .*, sft, got 'dpo,ppo'"),
        (["--loss_type=dpo,dpo"], "names dpo more than once"),
        (
            ["--loss_type=dpo,sigmoid"],
            r"^loss_type: loss 'dpo,dpo' names dpo more than once \(sigmoid is another name of dpo\)",
        ),
        (["--loss_type=dpo,"], "loss_type must be one of .*, got 'dpo,': one of its names is empty$"),
        (["--loss_type=dpo,bco-pair"], "did you mean bco_pair\\?$"),
        (["--loss_type=SimPO"], "did you mean simpo\\?$"),
        (
            ["--loss_type=sft", "--label_smoothing=0.1"],
            "it has none; label_smoothing_factor is the label smoothing of sft$",
        ),
        (["--loss_type=cpo", "--cpo_alpha=0.5"], "nll_weight is the weight of the NLL in loss_type cpo"),
        (
            ["--loss_type=aot", "--per_device_train_batch_size=4", "--max_batch_tokens=8000"],
            "max_batch_tokens=8000 may leave one pair in it, which has nothing to sort: leave it unset",
        ),
        (
            ["--loss_type=kto", "--desirable_weight=0", "--undesirable_weight=0"],
            "desirable_weight and undesirable_weight are both 0",
        ),
        (
            ["--loss_type=dpo,sft", "--alpha=3"],
            "loss_type=dpo,sft has no option alpha; it has nll_reduce, beta, ",
        ),
        (
            ["--loss_type=dpo,sft", "--loss_weights=1"],
            "loss_weights is .*, expected 2 numbers, one for each of dpo, sft",
        ),
        (["--loss_type=dpo,sft", "--loss_weights=1,x"], "loss_weights must be numbers separated by commas, got '1,x'"),
        (
            ["--loss_type=dpo", "--loss_weights=1"],
            "has no option loss_weights; .*; weights need several losses, ",
        ),
        (["--loss_type=dpo,bco_pair", "--f_divergence=forward_kl"], "bco_pair has no form with another divergence"),
        (
            ["--loss_type=aot"],
            "per_device_train_batch_size=1 leaves nothing to sort, unless its row has several",
        ),
        (["--loss_type=dpo,aot_unpaired"], "loss_type=dpo,aot_unpaired sorts the pairs of a micro-batch"),
        (["--loss_type=sft", "--use_weighting"], "loss_type=sft has none: leave use_weighting unset"),
        (["--loss_type=aot", "--per_device_train_batch_size=2", "--use_weighting"], "compares sorted values"),
        (["--loss_type=sft", "--z_loss=1e-4", "--profile=2"], "leave label_smoothing_factor and z_loss unset"),
        (["--loss_type=synpo,sft", "--reference=frozen_copy"], "reads no reference"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        config(*words)


def test_losses_of_single_responses_compare_best_and_worst_unless_told_otherwise(tmp_path):
    assert {loss: config(f"--loss_type={loss}").pairs_from for loss in ("dpo", "sft", "kto", "apo_zero_unpaired", "kto,sft")} == {
        "dpo": "all", "sft": "all", "kto": "best_worst", "apo_zero_unpaired": "best_worst", "kto,sft": "best_worst",
    }  # fmt: skip
    assert config("--loss_type=kto", "--pairs_from=best_rest").pairs_from == "best_rest"
    assert config("--loss_type=kto", "--undesirable_weight=0").undesirable_weight == 0
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config("--loss_type=kto", "--pairs_from=all")))
    assert resolve_config(["--config", str(file)]).pairs_from == "all"
