"""A loop written for Liger's SimPO runs with ours after a change of the import: the losses agree for 30 steps."""

import pytest
import torch

from synpo_fast import FusedLinearSimPOLoss
from synpo_fast.integrations.hf_trainer import PairCollator

from . import tiny

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is what is swapped")
ROWS = tiny.token_rows(tiny.pairs(8))


def training(loss_class, **options) -> list[list[float]]:
    """Loss, and everything else that comes back, of every step. The code is the same for both classes."""
    policy = tiny.model()
    loss_function = loss_class(compiled=False, **options)
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-3)
    steps = []
    for rows in tiny.batches_of(ROWS, 2, tiny.STEPS):
        batch = PairCollator(tiny.VOCABULARY[tiny.PAD])(rows)
        hidden = policy.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        loss, aux = loss_function(policy.lm_head.weight, hidden[:, :-1], batch["pair_labels"][:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append([loss.item(), *(value for tensor in aux for value in torch.as_tensor(tensor).flatten().tolist())])
    return steps


@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 2.0, "gamma": 1.1, "label_smoothing": 0.1, "compute_nll_loss": False}],
    ids=["defaults", "options"],
)
def test_thirty_steps(options):
    theirs = training(chunked_loss.LigerFusedLinearSimPOLoss, **options)
    ours = training(FusedLinearSimPOLoss, **options)
    assert ours[-1][0] < ours[0][0] - 0.05
    losses = [[step[0] for step in steps] for steps in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    if options.get("compute_nll_loss", True):
        for step_ours, step_theirs in zip(ours, theirs, strict=True):
            assert step_ours == pytest.approx(step_theirs, rel=1e-3, abs=1e-4)
