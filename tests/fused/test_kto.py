"""FusedLinearKTOLoss: against Liger's class and against logits in fp64, and what it refuses."""

import copy
import pickle

import pytest
import torch

from synpo_fast import FusedLinearKTOLoss
from synpo_fast.losses import PairLogprobs, kto

B, T, D, V = 5, 7, 16, 60
LENGTHS = [7, 3, 1, 0, 4]
IGNORED = -100
KL = torch.tensor(0.4)


def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(2, B, T, D, generator=g) * 0.5).to(dtype)
    weight, ref_weight = (torch.randn(2, V, D, generator=g) * 0.5).to(dtype)
    bias, ref_bias = (torch.randn(2, V, generator=g) * 0.5).to(dtype)
    target = torch.randint(V, (B, T), generator=g)
    for row, length in enumerate(LENGTHS):
        target[row, length:] = IGNORED
    leaves = [each.clone().requires_grad_() for each in (hidden, weight, bias)]
    labels = torch.tensor([True, False, True, False, False])
    return leaves, target, labels, (ref_hidden, ref_weight, ref_bias)


def run(module, kl=KL, with_reference=True, dtype=torch.float32):
    (hidden, weight, bias), target, labels, reference = batch(dtype)
    refs = dict(zip(("ref_input", "ref_weight", "ref_bias"), reference, strict=True)) if with_reference else {}
    loss, aux = module(hidden, weight, target, bias, preference_labels=labels, kl=kl, **refs)
    return loss, aux, torch.autograd.grad(loss * 3, (hidden, weight, bias))


@pytest.mark.parametrize(
    ("options", "kl"),
    [
        ({"use_ref_model": True, "beta": 0.3}, KL),
        ({"use_ref_model": True}, None),
        ({"use_ref_model": False, "beta": 0.2}, torch.tensor(0.1)),
    ],
)
def test_liger(options, kl):
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is the oracle here and is not installed")
    theirs = run(liger.LigerFusedLinearKTOLoss(compiled=False, **options), kl, options["use_ref_model"])
    ours = run(FusedLinearKTOLoss(**options), kl, options["use_ref_model"])
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    for got, expected in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert len(ours[1]) == len(theirs[1]) == 6
    for got, expected in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
        assert not got.requires_grad


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_in_fp64(average, dtype):
    options = {"beta": 0.3, "desirable_weight": 0.8, "undesirable_weight": 1.5}
    module = FusedLinearKTOLoss(use_ref_model=True, average_log_prob=average, **options)
    loss, _, gradients = run(module, dtype=dtype)
    (hidden, weight, bias), target, labels, reference = batch(dtype)

    def values(hidden, weight, bias):
        logps = (hidden.double() @ weight.double().t() + bias.double()).log_softmax(-1)
        logps = torch.where(target != IGNORED, logps.gather(-1, target.clamp(min=0)[..., None])[..., 0], 0.0)
        scale = torch.tensor(LENGTHS).clamp(min=1) if average else 1
        return list((logps.sum(1) / scale)[:, None])

    point = KL.double()
    policy = PairLogprobs.from_unpaired(values(hidden, weight, bias), labels.tolist(), kl=point)
    expected = kto(policy, PairLogprobs.from_unpaired(values(*reference), labels.tolist()), **options).losses.mean()
    wanted = torch.autograd.grad(expected * 3, (hidden, weight, bias))
    # bf16: the head's tiles round, and gradients are returned in bf16, of 8 bits.
    value_bar, gradient_bar = (1e-5, 1e-5) if dtype == torch.float32 else (5e-4, 2e-2)
    assert loss.item() == pytest.approx(expected.item(), rel=value_bar)
    for got, each in zip(gradients, wanted, strict=True):
        assert float((got.double() - each.double()).norm()) <= gradient_bar * float(each.double().norm())
    assert module.last_output is not None and module.last_output.metrics["desirable_responses"] == 2
    assert not module.last_output.losses.requires_grad
    assert pickle.loads(pickle.dumps(module)).last_output is None and copy.deepcopy(module).options == module.options


def test_what_is_refused():
    (hidden, weight, _), target, labels, _ = batch()
    module = FusedLinearKTOLoss()
    cases = [
        ((hidden, weight, target), {}, r"preference_labels must be bool \[5\].*got None"),
        ((hidden, weight, target), {"preference_labels": labels.long()}, r"got torch\.int64 \[5\]"),
        ((hidden[0], weight, target), {"preference_labels": labels}, r"_input must be \[B, T, D\]"),
        (
            (hidden, weight, target),
            {"preference_labels": labels, "kl": torch.zeros(B)},
            r"kl must be one number.*\[5\]",
        ),
        (
            (hidden, weight, target),
            {"preference_labels": labels.tolist()},
            r"preference_labels must be bool \[5\], a tensor .*got \[True",
        ),
        ((hidden, weight, target), {"preference_labels": labels, "kl": float("nan")}, "kl is nan"),
        ((hidden, weight, target), {"preference_labels": labels, "kl": [0.3]}, r"kl is \[0.3\]"),
    ]
    for arguments, more, message in cases:
        with pytest.raises(ValueError, match=message):
            module(*arguments, **more)
    with pytest.raises(ValueError, match="use_ref_model=True needs ref_input and ref_weight"):
        FusedLinearKTOLoss(use_ref_model=True)(hidden, weight, target, preference_labels=labels)
    for more, message in (
        ({"beta": 0.0}, "beta is 0.0"),
        ({"softcaps": 3.0}, "unknown argument softcaps"),
        ({"keep_bytes": -1}, "keep_bytes must not be negative, got -1"),
        ({"backend": "nope"}, "backend must be one of .*'nope'"),
        ({"softcap": -1.0}, "softcap must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedLinearKTOLoss(**more)


def test_a_reference_without_use_ref_model_is_ignored():
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is the oracle here and is not installed")
    theirs = run(liger.LigerFusedLinearKTOLoss(compiled=False), with_reference=True)
    with_one, without = run(FusedLinearKTOLoss()), run(FusedLinearKTOLoss(), with_reference=False)
    torch.testing.assert_close(with_one[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(with_one[0], without[0])


@pytest.mark.parametrize("kl", [0.4, torch.tensor([0.4]), torch.tensor(0.4)])
def test_kl_is_a_number_or_a_tensor_with_one(kl):
    expected = run(FusedLinearKTOLoss(use_ref_model=True), KL)[0]
    assert torch.equal(run(FusedLinearKTOLoss(use_ref_model=True), kl)[0], expected)
    assert not torch.equal(run(FusedLinearKTOLoss(use_ref_model=True), 0)[0], expected)


def test_means_of_an_empty_response():
    """The documented difference: Liger divides by 0 tokens."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is the oracle here and is not installed")
    settings = {"use_ref_model": True, "average_log_prob": True}
    assert run(liger.LigerFusedLinearKTOLoss(compiled=False, **settings))[0].isnan()
    assert run(FusedLinearKTOLoss(**settings))[0].isfinite()


def test_options_are_shown():
    shown = repr(FusedLinearKTOLoss(beta=0.25, use_ref_model=True, softcap=5.0))
    assert "beta=0.25" in shown and "use_ref_model=True" in shown and "softcap=5.0" in shown
