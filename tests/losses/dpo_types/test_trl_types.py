"""DPO's loss types, f-divergences, ld_alpha, sums of losses and WPO, against TRL's own code on the same log-probs."""

import pytest
import torch

from synpo_fast.losses import wpo_weights

from .. import truth

pytest.importorskip("trl", minversion="1.16", reason="TRL is the oracle here and is not installed")

from .trl_oracle import our_dpo, trl_dpo

LENGTHS = [(3, 5), (1, 1), (6, 2), (4, 4)]
PAIRS, REFERENCE = truth.ragged_pairs(LENGTHS), truth.ragged_pairs(LENGTHS, seed=1)
# TRL's name where it differs from ours, and the options; every loss type of DPOTrainer is here.
TYPES = [
    ("dpo", {"beta": 0.3}),
    ("hinge", {"beta": 0.3}),
    ("ipo", {"beta": 0.7}),
    ("sigmoid_norm", {"beta": 2.0}),
    ("robust", {"label_smoothing": 0.2}),
    ("exo_pair", {"label_smoothing": 1e-3}),
    ("exo_pair", {"label_smoothing": 0.2, "beta": 1.0}),
    ("discopop", {"beta": 0.2}),
    ("discopop", {"discopop_tau": 0.5}),
    ("nca_pair", {}),
    ("bco_pair", {"beta": 0.5}),
    ("sppo_hard", {"beta": 0.5}),
    ("apo_zero", {}),
    ("apo_down", {"beta": 0.5}),
    ("aot", {"label_smoothing": 0.1}),
    ("aot_unpaired", {"label_smoothing": 0.1, "beta": 0.4}),
]
DIVERGING = [
    case for case in TYPES if case[0] in ("dpo", "hinge", "ipo", "sigmoid_norm", "robust", "exo_pair", "discopop")
]
IN_TRL = {"dpo": "sigmoid", "f_divergence": "f_divergence_type"}


def compare(name, options, *, rtol=1e-12, atol=1e-14, log_sum_sq_probs=None, pair_weights=None, dtype=torch.float64):
    if "exo_pair" in name:  # TRL rounds epsilon to fp32
        rtol, atol = max(rtol, 1e-6), max(atol, 1e-7)
    types = [IN_TRL.get(member, member) for member in name.split(",")]
    settings = {IN_TRL.get(key, key): value for key, value in options.items()}
    theirs = trl_dpo(PAIRS, REFERENCE, types, dtype=dtype, log_sum_sq_probs=log_sum_sq_probs, **settings)
    ours = our_dpo(name, PAIRS, REFERENCE, dtype=dtype, pair_weights=pair_weights, **options)
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(ours[1], theirs[1], rtol=rtol, atol=atol)
    assert ours[1].abs().sum() > 0
    shared = {key for key in ours[2] if key.startswith(("rewards/", "logps/"))}
    assert {key: ours[2][key] for key in shared} == pytest.approx({key: theirs[2][key] for key in shared}, rel=1e-6)


@pytest.mark.parametrize(("name", "options"), TYPES, ids=str)
def test_a_type(name, options):
    compare(name, options)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("name", "options"), TYPES[::3], ids=str)
def test_ld_alpha(name, options, ld_alpha):
    compare(name, {**options, "ld_alpha": ld_alpha})


@pytest.mark.parametrize("more", [{"f_divergence": "forward_kl"}, {"f_divergence": "js_divergence"}], ids=str)
@pytest.mark.parametrize(("name", "options"), DIVERGING, ids=str)
def test_f_divergence(name, options, more):
    compare(name, {**options, **more})


@pytest.mark.parametrize("coefficient", [0.5, 2.0, 1.0, -0.2])
@pytest.mark.parametrize(("name", "options"), DIVERGING[::2], ids=str)
def test_alpha_divergence(name, options, coefficient):
    more = {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": coefficient}
    # TRL computes this one in fp32 only, as exp - 1.
    compare(name, {**options, **more}, rtol=2e-5, atol=1e-6, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo,bco_pair,sft", {"loss_weights": (0.8, 0.2, 1.0)}),  # MPO
        ("dpo,bco_pair,sft", {"beta": 0.4}),
        ("sft,aot", {"loss_weights": (0.3, 2.0), "label_smoothing": 0.1, "ld_alpha": 0.5}),
        ("ipo,sft,hinge", {"f_divergence": "js_divergence", "loss_weights": (0.5, 0.0, 1.5)}),
    ],
    ids=str,
)
def test_a_weighted_sum(name, options):
    compare(name, options)


@pytest.mark.parametrize(
    # TRL multiplies in place, which autograd refuses for hinge.
    ("name", "options"),
    [case for case in TYPES if "aot" not in case[0] and case[0] != "hinge"] + [("dpo,nca_pair", {})],
    ids=str,
)
def test_wpo(name, options):
    squares = [tuple([0.4 * lp for lp in y] for y in pair) for pair in truth.ragged_pairs(LENGTHS, seed=2)]
    weights = wpo_weights(truth.as_logprobs(PAIRS), truth.as_logprobs(squares))
    assert weights.min() < 0.5 * weights.max()
    compare(name, options, log_sum_sq_probs=squares, pair_weights=weights)
