"""Every number among the options has bounds, and nothing outside them, nor nan nor infinity, gets as far as a model."""

import math
from dataclasses import fields

import pytest

from synpo_fast.config.option import facts_of
from synpo_fast.config.options import LOSS_OPTIONS
from synpo_fast.config.sources import TYPES, resolve_config
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.losses import LOSSES, AuxiliaryNLL, check_options
from synpo_fast.train import main

NEEDED = {"model_name_or_path": "tiny:text", "train_file": "pairs.jsonl", "output_dir": "out"}
NUMBERS = [item for item in fields(TrainConfig) if {"int", "float"} & set(str(item.type).replace("|", " ").split())]
BOUNDED = [item for item in NUMBERS if item.name not in LOSS_OPTIONS]
# The losses have a say in these: (loss, option, a value at its bound or beyond, whether the loss takes it).
OF_LOSSES = [
    ("synpo", "alpha", 0.0, False), ("synpo", "alpha", 1e-3, True), ("synpo", "beta", -1.0, False),
    ("synpo", "beta", 0.0, True), ("dpo", "beta", 0.0, False), ("dpo", "beta", 1e-3, True), ("dpo", "beta", -1.0, False),
    ("dpo", "label_smoothing", 0.5, False), ("dpo", "label_smoothing", 0.49, True), ("dpo", "label_smoothing", -0.1, False),
    ("simpo", "beta", 0.0, False), ("simpo", "gamma", -2.0, True), ("simpo", "label_smoothing", 0.5, False),
    ("orpo", "beta", -0.1, False), ("orpo", "beta", 0.0, True), ("cpo", "beta", 0.0, False),
    ("synpo", "link", "tanh", False), ("dpo", "variant", "robust", False), ("dpo", "variant", "ipo", True),
]  # fmt: skip


def words(**values):
    return [f"--{name}={value}" for name, value in {**NEEDED, **values}.items()]


def config(**values):
    return resolve_config(words(**values))


def refused_for_its_bounds(name, value):
    """True if the one-line error names the option, its value and the expected range, and no other rule refused it first."""
    try:
        config(**{name: value})
    except ValueError as error:
        return str(error).startswith(f"{name} is {value!r}, expected")
    return False


def test_the_walk_below_sees_every_number():
    kinds = {name for name, kind in TYPES.items() if str(kind) not in ("<class 'bool'>",) and _is_number(kind)}
    assert {item.name for item in NUMBERS} == kinds
    assert {"learning_rate", "seed", "num_frames", "min_score_gap", "beta"} <= kinds


def _is_number(kind):
    return kind in (int, float) or {int, float} & set(getattr(kind, "__args__", ()))


@pytest.mark.parametrize("name", [item.name for item in NUMBERS])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_refused_by_name(name, value):
    loss = {"gamma": "simpo", "label_smoothing": "dpo"}.get(name, "synpo")
    with pytest.raises(
        ValueError, match=rf"\b{name} (is|must be) .*{value}|{name} must be a whole number, got '{value}'"
    ):
        config(loss_type=loss, **{name: value})
    with pytest.raises(ValueError, match=f"{name} is {value}, expected a finite number"):
        TrainConfig(**NEEDED, loss_type=loss, **{name: float(value)})


@pytest.mark.parametrize("item", BOUNDED, ids=lambda item: item.name)
def test_beyond_a_bound_is_refused_and_within_it_is_not(item):
    bounds = facts_of(item).bounds
    assert {"above", "at_least"} & set(bounds), f"{item.name} has no lower bound"
    whole = "int" in str(item.type)
    for kind, bound in bounds.items():
        if kind in ("above", "at_least"):
            beyond = bound - 1 if whole else math.nextafter(bound, -math.inf)
            inside = bound + 1 if whole else math.nextafter(bound, math.inf)
        else:
            beyond = bound + 1 if whole else math.nextafter(bound, math.inf)
            inside = bound - 1 if whole else math.nextafter(bound, -math.inf)
        number = int if whole else float
        assert refused_for_its_bounds(item.name, number(beyond)), f"{item.name}={beyond}"
        assert not refused_for_its_bounds(item.name, number(inside)), f"{item.name}={inside}"
        at_bound = refused_for_its_bounds(item.name, number(bound))
        assert at_bound == (kind in ("above", "below")), f"{item.name}={bound}"
    if whole:
        assert refused_for_its_bounds(item.name, 10**400)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0), ("learning_rate", 1.1), ("lora_r", 0), ("warmup_ratio", 1.5), ("eval_split", 1.0),
        ("adam_beta2", 1.0), ("adam_epsilon", 1e-60), ("seed", -1), ("zero_stage", 4), ("max_bad_share", -0.1),
        ("lora_dropout", 1.0), ("min_score_gap", -1.0), ("num_train_epochs", 1e308), ("local_rank", -2),
    ],
)  # fmt: skip
def test_values_no_run_can_use_are_refused(name, value):
    assert refused_for_its_bounds(name, value)


def test_the_values_that_mean_something_stay():
    config(warmup_ratio=1, max_bad_share=1, max_grad_norm=0, weight_decay=0, zero_stage=3, max_steps=-1, eval_split=0.5)
    config(learning_rate=1, max_bad_share=0, save_steps=0, num_eval_captions=0, dataloader_num_workers=0)


def test_a_decay_that_leaves_nothing_of_the_weights_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate=0\.1 x weight_decay=10\.0 is 1 or more"):
        config(learning_rate=0.1, weight_decay=10)


@pytest.mark.parametrize(("loss", "name", "value", "taken"), OF_LOSSES)
def test_a_losses_own_bounds_hold_at_the_start(loss, name, value, taken):
    if taken:
        assert getattr(config(loss_type=loss, **{name: value}), name) == value
    else:
        with pytest.raises(ValueError, match=rf"loss_type={loss}: {name} is {value!r}, expected"):
            config(loss_type=loss, **{name: value})


def test_smoothing_beside_a_form_that_has_none_is_refused_at_the_start():
    with pytest.raises(ValueError, match="variant 'hinge' has no smoothed form"):
        config(loss_type="dpo", variant="hinge", label_smoothing=0.1)


@pytest.mark.parametrize(
    "values",
    [{"alpha": 1e300}, {"loss_type": "dpo", "beta": 1e300}, {"auxiliary_nll": 1e300}, {"loss_type": "simpo", "gamma": 1e39}],
    ids=str,
)  # fmt: skip
def test_finite_numbers_that_fp32_cannot_hold_are_refused(values):
    with pytest.raises(ValueError, match="is not finite with"):
        config(**values)


@pytest.mark.parametrize("name", LOSSES)
def test_trying_a_loss_accepts_its_defaults(name):
    check_options(name, **LOSSES[name].options)
    check_options(name, auxiliary=AuxiliaryNLL("ground_truth", 0.1))


def test_the_command_ends_with_one_line_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option, told in (("learning_rate=inf", "learning_rate is inf"), ("beta=-1", "loss_type=synpo: beta is -1.0")):
        assert main([*words(), f"--{option}"]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"synpo-fast train: error: {told}, expected")
    assert not list(tmp_path.iterdir())
