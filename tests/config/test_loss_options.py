"""Every option that a loss takes can be given to the trainer, reaches the loss, and is refused beside a loss without it."""

import pytest
import torch
from torch import nn

from synpo_fast.config.option_help import groups
from synpo_fast.config.options import LOSS_OPTIONS
from synpo_fast.config.sources import TYPES, resolve_config
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoded import EncodedPair
from synpo_fast.losses import LOSSES, PairLogprobs, preference_loss
from synpo_fast.training.pair_module import PairModule

NEEDED = {"model_name_or_path": "tiny:text", "train_file": "pairs.jsonl", "output_dir": "out"}
NEEDED["per_device_train_batch_size"] = 2  # aot and aot_unpaired sort a batch
# An option that has an effect only beside another one.
BESIDE = {"f_alpha_divergence_coef": {"f_divergence": "alpha_divergence"}}
OPTIONS_OF_LOSSES = [(loss, name) for loss, spec in LOSSES.items() for name in spec.options]
PAIRS = [EncodedPair(None, "a")] * 2
LABELLED = [EncodedPair(None, "a", (), labels=((0, True), (1, False)))] * 2
KL = torch.tensor(0.2)
LOGPS = [  # lengths differ, so that sums, means of responses and means of tokens do
    [torch.tensor([-0.5, -1.0, -0.3]), torch.tensor([-2.0, -0.7])],
    [torch.tensor([-0.2]), torch.tensor([-0.4, -0.6, -1.5, -0.1])],
]
REFERENCE = [[values * 1.3 - 0.1 for values in pair] for pair in LOGPS]


def of_the_trainer(config):
    """The losses of two pairs as the trainer computes them under this config."""
    reference = REFERENCE if config.needs_reference else None
    pairs = LABELLED if config.reads_single_responses else PAIRS
    return PairModule(nn.Identity(), config).loss_of_logps(pairs, LOGPS, reference, KL).losses


def of_the_loss(loss, **options):
    """The losses of the same two pairs, from the loss itself. The trainer takes an inner NLL pair by pair by default."""
    spec = LOSSES[loss]
    if spec.has_nll:
        options = {"nll_reduce": "token_mean", **options}
    reference = None
    if spec.needs_reference and not options.get("reference_free"):
        reference = _logprobs(spec, REFERENCE)
    return preference_loss(loss, _logprobs(spec, LOGPS), reference, **options).losses


def _logprobs(spec, pairs):
    if not spec.unpaired:
        return PairLogprobs.from_pairs(pairs)
    return PairLogprobs.from_unpaired([logps for pair in pairs for logps in pair], [True, False] * len(pairs), kl=KL)


def other_values(loss, name):
    """Values that are not the default and that the loss accepts."""
    spec = LOSSES[loss]
    default = spec.options[name]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, str):
        return [word for word in spec.choices[name] if word != default]
    taken = []
    for value in (default + 0.25, default - 0.25, default / 2):
        try:
            of_the_loss(loss, **{name: value}, **BESIDE.get(name, {}))
        except ValueError:
            continue
        taken.append(value)
    return taken


@pytest.mark.parametrize(("loss", "name"), OPTIONS_OF_LOSSES)
def test_an_option_reaches_its_loss(loss, name):
    beside = BESIDE.get(name, {})
    default = of_the_trainer(TrainConfig(**NEEDED, loss_type=loss, **beside))
    torch.testing.assert_close(default, of_the_loss(loss, **beside), rtol=0, atol=0)
    values, changed = other_values(loss, name), False
    assert values
    for value in values:
        words = [f"--{key}={word}" for key, word in {**NEEDED, "loss_type": loss, name: value, **beside}.items()]
        found = of_the_trainer(resolve_config(words))
        torch.testing.assert_close(found, of_the_loss(loss, **{name: value}, **beside), rtol=0, atol=0)
        changed |= not torch.equal(found, default)
    assert changed


@pytest.mark.parametrize("loss", LOSSES)
def test_an_option_of_another_loss_is_refused(loss):
    known = LOSSES[loss].options
    for name in set(LOSS_OPTIONS) - set(known):
        value = next((spec.options[name] for spec in LOSSES.values() if name in spec.options), (1.0,))
        with pytest.raises(
            ValueError, match=f"^loss_type={loss} has no option {name}; it has {', '.join(known)}($|; weights)"
        ):
            TrainConfig(**NEEDED, loss_type=loss, **{name: value})


def test_options_py_has_a_line_for_every_option_of_a_loss_and_no_other():
    assert set(LOSS_OPTIONS) == {name for _, name in OPTIONS_OF_LOSSES} | {"loss_weights"}, (
        "add a line to synpo_fast/config/options.py"
    )
    for loss, name in OPTIONS_OF_LOSSES:
        assert TYPES[name] == type(LOSSES[loss].options[name]) | None, f"{name} of {loss}"
        assert getattr(TrainConfig(**NEEDED), name) is None


@pytest.mark.parametrize(("loss", "name"), OPTIONS_OF_LOSSES)
def test_the_words_an_option_takes_are_those_its_loss_takes(loss, name):
    spec = LOSSES[loss]
    if not isinstance(spec.options[name], str):
        assert name not in spec.choices
        return
    words = spec.choices[name]
    assert spec.options[name] in words
    with pytest.raises(ValueError, match=f"expected one of {', '.join(map(repr, words))}$"):
        of_the_loss(loss, **{name: "nonsense"})
    text = {option: text for _, options in groups() for option, _, text in options}[name]
    assert loss in text and all(word in text for word in words)


@pytest.mark.parametrize(
    ("loss", "more", "reason"),
    [
        ("kto", {"diagnostics": 5}, "diagnostics compares pairs"),
        ("apo_zero_unpaired", {"profile": 3}, "profile compares pairs"),
        ("kto", {"oom_policy": "skip"}, "oom_policy=skip is not possible with loss_type=kto"),
        ("kto,sft", {"use_weighting": True}, "use_weighting=true weighs pairs"),
        ("kto,dpo", {}, r"mixes losses of single responses \(kto\)"),
        ("dpo", {"metric_for_best_model": "kl"}, "metric_for_best_model is 'kl'"),
    ],
)
def test_what_single_responses_exclude(loss, more, reason):
    best = {"load_best_model_at_end": True, "eval_split": 0.1, "eval_steps": 5}
    with pytest.raises(ValueError, match=reason):
        TrainConfig(**{**NEEDED, **best, "loss_type": loss, **more})
    if "metric_for_best_model" in more:
        assert TrainConfig(**{**NEEDED, **best, "loss_type": "kto", **more}).best_metric == "eval_kl"
