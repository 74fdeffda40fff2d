"""KTO: single responses and pairs, its gradient in closed form, TRL's and Liger's values and gradients, and what is refused."""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from synpo_fast.losses import PairLogprobs, apo_zero_unpaired, kl_reference_point, kto, nll, preference_loss
from tests.losses import truth

LABELS = [True, False, False, True, False]
LENGTHS = [3, 5, 1, 6, 2]


def draw(seed=0, lengths=LENGTHS):
    return [chosen for chosen, _ in truth.ragged_pairs([(n, 1) for n in lengths], seed=seed)]


def tensors(responses, dtype=torch.float64):
    return [torch.tensor(y, dtype=dtype) for y in responses]


def unpaired(responses, kl=truth.KL, dtype=torch.float64, labels=LABELS):
    return PairLogprobs.from_unpaired(tensors(responses, dtype), labels, kl=torch.tensor(kl, dtype=dtype))


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.4)])
def test_single_responses_and_their_gradients_in_closed_form(dtype, rel, weights):
    responses, reference, beta = draw(), draw(seed=1), 0.4
    policy, chosen, rejected = truth.with_grad(unpaired(responses, dtype=dtype))
    options = {"beta": beta, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    output = kto(policy, unpaired(reference, dtype=dtype), **options)
    both = list(zip(responses, reference, LABELS, strict=True))
    expected = [truth.kto_response(*each, kl=truth.KL, **options) for each in both]
    assert output.losses.tolist() == pytest.approx(expected, rel=rel)
    output.losses.sum().backward()
    slopes = {True: [], False: []}
    for y, ref, label in both:
        z = beta * (math.fsum(y) - math.fsum(ref) - truth.KL)
        slope = beta * truth.sigmoid(z) * truth.sigmoid(-z)
        slopes[label] += [-weights[0] * slope if label else weights[1] * slope] * len(y)
    assert chosen.grad.tolist() == pytest.approx(slopes[True], rel=rel)
    assert rejected.grad.tolist() == pytest.approx(slopes[False], rel=rel)


@pytest.mark.parametrize("loss", [kto, apo_zero_unpaired])
def test_gradcheck_of_a_mixed_batch(loss):
    couples = [tuple(tensors(pair)) for pair in truth.ragged_pairs([(3, 2), (4, 0), (0, 5), (2, 2)])]
    mixed = {"unpaired": [False, True, True, False], "kl": torch.tensor(truth.KL)}
    policy, chosen, rejected = truth.with_grad(PairLogprobs.from_pairs(couples, **mixed))
    reference = PairLogprobs.from_pairs([(y * 1.2, z * 0.9) for y, z in couples], **mixed)
    assert torch.autograd.gradcheck(
        lambda *logps: loss(replace(policy, chosen=logps[0], rejected=logps[1]), reference).losses, (chosen, rejected)
    )


def test_pairs_and_single_responses_mix_as_a_mean_over_responses():
    responses, reference = draw(), draw(seed=1)
    alone = kto(unpaired(responses), unpaired(reference))

    # Rows: the pair (0, 1), then 2, 3 and 4 by themselves.
    def mixed(given):
        y = tensors(given)
        couples = [(y[0], y[1]), (y[2][:0], y[2]), (y[3], y[3][:0]), (y[4][:0], y[4])]
        return PairLogprobs.from_pairs(
            couples, unpaired=[False, True, True, True], kl=torch.tensor(truth.KL, dtype=torch.float64)
        )

    together = kto(mixed(responses), mixed(reference))
    torch.testing.assert_close(together.losses.mean(), alone.losses.mean(), rtol=1e-12, atol=0)
    same = set(alone.metrics) - {"preference_pairs"}
    assert {key: together.metrics[key].item() for key in same} == pytest.approx(
        {key: alone.metrics[key].item() for key in same}
    )
    assert together.metrics["preference_pairs"] == 4 and alone.metrics["preference_pairs"] == 5


def test_the_saturated_gradient_is_not_rounded_away():
    for label in (True, False):
        given = PairLogprobs.from_unpaired([torch.tensor([-400.0])], [label], kl=torch.tensor(0.0))
        for sign in (1.0, -1.0):
            policy, chosen, rejected = truth.with_grad(given)
            reference = PairLogprobs.from_unpaired([torch.tensor([-400.0 - sign * 400.0])], [label])
            kto(policy, reference).losses.sum().backward()
            gradient = (chosen if label else rejected).grad.item()
            assert abs(gradient) == pytest.approx(0.1 * math.exp(-40), rel=1e-4)


def trl_kto(responses, reference, mismatched, loss_type, options):
    """TRL's loss, its gradient with respect to the padded log-probs [B, L - 1], and its metrics."""
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer", reason="TRL is the oracle here and is not installed")
    prompt, width = 2, 2 + max(map(len, responses))
    logps = torch.zeros(len(responses), width - 1, dtype=torch.float64)
    mask = torch.zeros(len(responses), width, dtype=torch.int64)
    for row, response in enumerate(tensors(responses)):
        logps[row, prompt - 1 : prompt - 1 + len(response)] = response
        mask[row, prompt : prompt + len(response)] = 1
    logps.requires_grad_()
    ones = torch.ones_like(logps)
    policy_sums, reference_sums = (torch.tensor([math.fsum(y) for y in each]).double() for each in mismatched)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        _compute_kl_logps=lambda *_: policy_sums,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{"desirable_weight": 1.0, "undesirable_weight": 1.0, "beta": 0.1, **options},
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor(LABELS),
        "ref_logps": torch.tensor([math.fsum(y) for y in reference]).double(),
        "ref_KL_logps": reference_sums,
    }

    def model(**_):
        return SimpleNamespace(log_probs=logps * mask[:, 1:], entropy=ones, mean_logits=ones)

    loss = kto_trainer.KTOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    gradients = [logps.grad[i, prompt - 1 : prompt - 1 + len(y)] for i, y in enumerate(responses)]
    return loss.detach(), gradients, {key: value[0] for key, value in trainer._metrics["train"].items()}


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.6}])
@pytest.mark.parametrize("seeds", [(3, 2), (2, 3)], ids=["a positive point", "a negative mean"])
def test_trl(loss_type, options, seeds):
    responses, reference = draw(), draw(seed=1)
    mismatched = [draw(seed=seed) for seed in seeds]
    their_loss, their_gradients, their_metrics = trl_kto(responses, reference, mismatched, loss_type, options)

    ratios = torch.tensor([math.fsum(y) - math.fsum(ref) for y, ref in zip(*mismatched, strict=True)]).double()
    kl = kl_reference_point(ratios.sum(), len(ratios))
    assert (kl > 0) == (seeds == (3, 2))
    leaves = [y.requires_grad_() for y in tensors(responses)]
    policy = PairLogprobs.from_unpaired(leaves, LABELS, kl=kl)
    output = preference_loss(loss_type, policy, unpaired(reference), **options)
    output.losses.mean().backward()
    torch.testing.assert_close(output.losses.mean(), their_loss, rtol=1e-6, atol=0)
    for leaf, gradient in zip(leaves, their_gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-6, atol=1e-15)
    shared = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    ours = {key: output.metrics[key].item() for key in shared}
    assert ours == pytest.approx({key: their_metrics[key] for key in shared}, rel=1e-6)


def test_liger():
    chunked_loss = pytest.importorskip(
        "liger_kernel.chunked_loss", reason="Liger is the oracle here and is not installed"
    )
    torch.manual_seed(0)
    T, D, V, ignored = max(LENGTHS), 16, 50, -100
    hidden, ref_hidden = torch.randn(2, len(LABELS), T, D).double() * 0.5
    weight, ref_weight = torch.randn(2, V, D).double() * 0.3
    target = torch.randint(V, (len(LABELS), T))
    for row, length in enumerate(LENGTHS):
        target[row, length:] = ignored
    labels, kl = torch.tensor(LABELS), torch.tensor(0.4).double()

    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    module = chunked_loss.LigerFusedLinearKTOLoss(beta=0.3, compiled=False, use_ref_model=True)
    their_loss, aux = module(
        *theirs,
        target,
        preference_labels=labels,
        ref_input=ref_hidden,
        ref_weight=ref_weight,
        kl=kl,  # Liger counts the loss B times for a kl of shape [B],
    )
    their_loss.backward()

    def logps(hidden, weight):
        every = (hidden @ weight.t()).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return [row[:length] for row, length in zip(every, LENGTHS, strict=True)]

    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    reference = PairLogprobs.from_unpaired(logps(ref_hidden, ref_weight), LABELS)
    output = preference_loss("kto", PairLogprobs.from_unpaired(logps(*ours), LABELS, kl=kl), reference, beta=0.3)
    output.losses.mean().backward()

    def close(got, expected):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-6)  # Liger rounds logits to fp32

    close(output.losses.mean(), their_loss)
    close(ours[0].grad, theirs[0].grad)
    close(ours[1].grad, theirs[1].grad)
    close(output.chosen_logps.sum(), aux[0])
    close(output.rejected_logps.sum(), aux[1])
    close(output.chosen_rewards.sum(), aux[4])
    close(output.rejected_rewards.sum(), aux[5])


def test_sft_rows_beside_undesirable_ones():
    y = tensors(draw())
    couples = [(y[0], y[0][:0]), (y[1][:0], y[1])]
    policy = PairLogprobs.from_pairs(couples, preference=[False, True], unpaired=[False, True], kl=torch.tensor(0.0))
    reference = PairLogprobs.from_pairs(couples, preference=[False, True], unpaired=[False, True])
    losses = preference_loss("kto", policy, reference).losses
    assert losses.tolist() == pytest.approx([-truth.mean(draw()[0]), 0.5])
    assert nll(policy).tolist() == pytest.approx([-truth.mean(draw()[0]), 0.0])


def test_empty_single_responses_where_the_host_cannot_look(blind_host):
    responses = [*draw()[:4], []]
    policy, chosen, rejected = truth.with_grad(unpaired(responses))
    output = kto(policy, unpaired([*draw(seed=1)[:4], []]))
    output.losses.sum().backward()
    assert output.losses[4] == 0 and output.metrics["empty_pairs"] == 1 and output.metrics["preference_pairs"] == 4
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


def test_the_reference_point():
    assert kl_reference_point(torch.tensor(6.0), 4).item() == 1.5
    assert kl_reference_point(torch.tensor(-6.0), torch.tensor(4)).item() == 0.0
    assert kl_reference_point(torch.tensor(0.0), 0).item() == 0.0
    assert not kl_reference_point(torch.tensor(1.0, requires_grad=True), 1).requires_grad


def test_what_is_refused():
    y = tensors([[-1.0, -2.0]])
    with pytest.raises(ValueError, match=r"kto needs policy.kl.*apo_zero_unpaired is the loss without it"):
        kto(PairLogprobs.from_unpaired(y, [True]), PairLogprobs.from_unpaired(y, [True]))
    policy = PairLogprobs.from_unpaired(y, [True], kl=torch.tensor(0.0))
    for loss in (kto, apo_zero_unpaired):
        with pytest.raises(ValueError, match=f"{loss.__name__} needs a reference"):
            loss(policy)
        for name in ("desirable_weight", "undesirable_weight"):
            with pytest.raises(ValueError, match=f"{name} is -1.0, expected at least 0"):
                loss(policy, policy, **{name: -1.0})
    with pytest.raises(ValueError, match="1 responses, but 2 labels"):
        PairLogprobs.from_unpaired(y, [True, False])
    with pytest.raises(ValueError, match="unpaired row 0 has 2 chosen and 2 rejected tokens, expected one response"):
        PairLogprobs.from_pairs([(y[0], y[0])], unpaired=[True])
    with pytest.raises(ValueError, match="rejected response of pair 0 is empty"):
        PairLogprobs.from_pairs([(y[0], y[0][:0])])
    with pytest.raises(ValueError, match=r"kl is \(1,\) on cpu, expected a scalar"):
        PairLogprobs.from_unpaired(y, [True], kl=torch.zeros(1))
    with pytest.raises(ValueError, match=r"unpaired is torch\.int64"):
        replace(policy, unpaired=torch.ones(1, dtype=torch.int64))
