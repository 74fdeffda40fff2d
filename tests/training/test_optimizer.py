"""The learning rate by step, and AdamW's states."""

import math

import pytest
import torch
from torch import nn

from synpo_fast.training.optimizer import AdamW, learning_rate_at, make_optimizer, warmup_steps


def rates(num_steps, shape, ratio=0.1, steps=0, peak=1.0):
    warmup = warmup_steps(num_steps=num_steps, steps=steps, ratio=ratio, shape=shape)
    return [
        learning_rate_at(step, peak=peak, num_steps=num_steps, num_warmup=warmup, shape=shape)
        for step in range(num_steps)
    ]


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 100])
def test_every_step_of_a_run_however_short_learns_and_the_peak_is_reached(num_steps, shape):
    values = rates(num_steps, shape)
    assert len(values) == num_steps and min(values) > 0
    assert max(values) == 1.0


def test_shapes():
    assert rates(10, "linear", ratio=0.2) == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert rates(4, "constant", ratio=0.5) == [1, 1, 1, 1]
    assert rates(4, "constant_with_warmup", ratio=0.5) == [0.5, 1, 1, 1]
    cosine = rates(5, "cosine", ratio=0.2)
    assert cosine == pytest.approx([1, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4))])


def test_warmup_steps_replace_the_ratio_and_never_exceed_the_run():
    assert warmup_steps(num_steps=100, steps=7, ratio=0.5, shape="linear") == 7
    assert warmup_steps(num_steps=3, steps=7, ratio=0.5, shape="linear") == 3
    assert warmup_steps(num_steps=11, steps=0, ratio=0.1, shape="linear") == 2  # rounded up


def test_matrices_decay_and_vectors_do_not():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter trains"):
        make_optimizer(
            nn.Linear(1, 1).requires_grad_(False), learning_rate=1, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=1
        )
    module[0].weight.requires_grad_(True)
    optimizer = make_optimizer(module, learning_rate=0.5, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.1)
    before = [p.detach().clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert changed == [True, False, False, False]


def test_states_made_beforehand_change_no_step():
    """Our AdamW with states created in advance equals torch's own."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    a = AdamW(ours.parameters(), lr=0.1, weight_decay=0.01)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.01)
    a.make_states(ours.parameters())
    assert a.steps_taken == 0
    for step in range(4):
        x = torch.randn(2, 5, generator=torch.Generator().manual_seed(step))
        for module, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert a.steps_taken == 4
