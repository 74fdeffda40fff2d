"""FusedLinearCrossEntropyLoss against cross entropy of materialised fp64 logits, and sft in the trainer with both terms."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from synpo_fast import FusedLinearCrossEntropyLoss
from synpo_fast.losses.nll import TokenPenalties, token_penalties
from tests.ops.linear_logprobs.problems import device_of, error, make_case
from tests.training.test_pair_module import PAIRS, config, encoded, policy  # noqa: F401 - policy is a fixture


def eager(hidden, weight, target, bias, *, smoothing, scale, reduction, softcap=None):
    """The loss and the z-loss in it, from logits."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, target, ignore_index=-100, label_smoothing=smoothing, reduction="none")
    z_loss = torch.where(target != -100, scale * logits.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss + z_loss, z_loss
    count = (target != -100).sum() if reduction == "mean" else 1
    return (loss + z_loss).sum() / count, z_loss.sum() / count


@pytest.mark.parametrize("backend", ["chunked", "native", "triton", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("smoothing", "scale", "softcap"), [(0.0, 0.0, None), (0.1, 0.0, None), (0.0, 1e-2, 4.0), (0.2, 1e-2, None)]
)
def test_against_torch(backend, reduction, smoothing, scale, softcap):
    device = device_of(backend, torch.float32)
    case = make_case(40, 24, 90, ignored=0.3, bias=True)
    tensors = [case.hidden, case.weight, case.bias]
    leaves = [tensor.to(device, torch.float32).requires_grad_() for tensor in tensors]
    truth = [tensor.clone().requires_grad_() for tensor in tensors]
    module = FusedLinearCrossEntropyLoss(
        lse_square_scale=scale, label_smoothing=smoothing, reduction=reduction, softcap=softcap, backend=backend,
        return_z_loss=True, return_token_accuracy=True,
    )  # fmt: skip
    output = module(leaves[1], leaves[0], case.labels.to(device), leaves[2])
    expected, z_loss = eager(
        truth[0],
        truth[1],
        case.labels,
        truth[2],
        smoothing=smoothing,
        scale=scale,
        reduction=reduction,
        softcap=softcap,
    )
    torch.testing.assert_close(output.loss.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.z_loss.double().cpu(), z_loss, rtol=1e-5, atol=1e-6)
    hits = F.linear(*truth).argmax(-1) == case.labels
    share = hits.double() if reduction == "none" else hits.sum() / (case.labels != -100).sum()
    torch.testing.assert_close(output.token_accuracy.double().cpu(), share.double(), rtol=1e-6, atol=0)
    found = torch.autograd.grad(output.loss.sum(), leaves)
    for ours, true in zip(found, torch.autograd.grad(expected.sum(), truth), strict=True):
        assert error(ours.double().cpu(), true) < 3e-6


def test_a_plain_loss_and_no_valid_target():
    weight, hidden = torch.randn(20, 8), torch.randn(2, 5, 8, requires_grad=True)
    target = torch.full((2, 5), -100)
    loss = FusedLinearCrossEntropyLoss(lse_square_scale=0.1, label_smoothing=0.1)(weight, hidden, target)
    loss.backward()
    assert loss.item() == 0.0 and not hidden.grad.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "max"}, "reduction must be one of mean, sum, none, got 'max'"),
        ({"label_smoothing": 0.1, "softcap": 3.0}, "label_smoothing=0.1 is not possible with softcap=3.0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected less than 1"),
        ({"lse_square_scale": -1.0}, "z_loss is -1.0, expected at least 0"),
        ({"ce_weight": torch.ones(9)}, r"ce_weight must be None, got a tensor \[9\]"),
        ({"ce_weight": -100}, "ce_weight must be None, got -100.*ignore_index is the second"),
        ({"use_token_scaling": True}, "use_token_scaling must be False"),
        ({"return_predicted_tokens": True}, "return_predicted_tokens must be False"),
        ({"keep_bytes": -1}, "keep_bytes must not be negative, got -1"),
        ({"keep_bytes": 1.5}, "keep_bytes must be a number of bytes, got 1.5"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearCrossEntropyLoss(**arguments)


def test_the_arguments_are_ligers_in_its_order():
    liger = pytest.importorskip("liger_kernel.transformers.fused_linear_cross_entropy", reason="Liger is not installed")
    for method in ("__init__", "forward"):
        theirs, ours = (
            [(each.name, each.default) for each in inspect.signature(getattr(owner, method)).parameters.values()]
            for owner in (liger.LigerFusedLinearCrossEntropyLoss, FusedLinearCrossEntropyLoss)
        )
        assert ours[: len(theirs)] == theirs, method
    module = FusedLinearCrossEntropyLoss(
        None, 7, 0.0, 0.0, "sum", 4.0, True, torch.float32, False, True, False, backend="chunked"
    )
    weight, hidden, target = torch.randn(20, 8), torch.randn(6, 8), torch.tensor([1, 7, 3, 7, 0, 19])
    logits = 4.0 * torch.tanh(F.linear(hidden, weight) / 4.0)
    expected = F.cross_entropy(logits, target, ignore_index=7, reduction="sum")
    output = module(weight, hidden, target)
    torch.testing.assert_close(output.loss, expected)
    assert output.z_loss is not None and output.token_accuracy is not None
    for option in ("reduction='sum'", "ignore_index=7", "softcap=4.0", "label_smoothing=0.0", "backend='chunked'"):
        assert option in repr(module)


def test_penalties_pass_gradcheck():
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)

    def total(logits):
        penalties = TokenPenalties(label_smoothing=0.2, z_loss=0.3)
        return token_penalties(logits.log_softmax(1)[:, 3], logits.logsumexp(1), logits.mean(1), penalties)

    assert torch.autograd.gradcheck(total, (logits,))
    weights = torch.full((6, 9), 0.2 / 9, dtype=torch.float64)
    weights[:, 3] += 0.8
    expected = -(weights * logits.log_softmax(1)).sum(1) + logits.log_softmax(1)[:, 3] + 0.3 * logits.logsumexp(1) ** 2
    torch.testing.assert_close(total(logits), expected)


def test_sft_of_the_trainer_with_both_terms(policy):  # noqa: F811
    """The mean over pairs of each chosen response's mean token loss, from logits that the model's own head computes."""
    from synpo_fast.training.pair_module import PairModule

    pairs = encoded(policy, PAIRS[:2])
    module = PairModule(policy, config(loss_type="sft", label_smoothing_factor=0.15, z_loss=1e-2))
    loss, sums = module(pairs, 0.5)
    plain, plain_sums = PairModule(policy, config(loss_type="sft"))(pairs, 0.5)
    logits: dict[tuple[int, ...], torch.Tensor] = {}  # by response
    outputs = policy._outputs

    def noting_logits(hidden, head, inputs, lengths, keep_bytes, **more):
        own = head.logits(hidden[inputs.rows]).detach().double()
        logits.update(
            {tuple(y.tolist()): z for y, z in zip(inputs.labels.split(lengths), own.split(lengths), strict=True)}
        )
        return outputs(hidden, head, inputs, lengths, keep_bytes, **more)

    policy._outputs = noting_logits
    try:
        policy.token_outputs([pair.sample for pair in pairs], share_prefix=False, pack=False)
    finally:
        del policy._outputs
    expected = 0.0
    for pair in pairs:
        chosen = pair.sample.responses[0]
        nll = F.cross_entropy(logits[chosen], torch.tensor(chosen), label_smoothing=0.15)
        expected += (nll + 1e-2 * logits[chosen].logsumexp(-1).square().mean()).item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() > plain.item()
    assert sums["nll_loss"] == plain_sums["nll_loss"]  # the NLL is shown without the terms
