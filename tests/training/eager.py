"""A training run in plain torch, to compare with: each response in a row of its own, dense logits, the loss as in the papers,
torch's own AdamW, one process, one backward per step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from synpo_fast.data import read_manifest
from synpo_fast.data.order import epoch_order
from synpo_fast.data.video.decode import decode_frames, probe_video
from synpo_fast.models import load_policy
from synpo_fast.models.layout import plan_rows
from synpo_fast.models.lora import add_lora
from synpo_fast.models.policy import Sample
from synpo_fast.scoring import PairEncoder


def eager_run(values: dict[str, Any], *, pairs_per_step: int = 4) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """Returns each step's loss, the trained weights after the last step, and gradient norms before clipping. values: as in
    world.options."""
    pairs = read_manifest(values["train_file"])
    root = values["train_file"].rsplit("/", 1)[0]
    policy = load_policy(values["model_name_or_path"], device="cpu", attn_implementation="sdpa")
    if values.get("use_peft", True):
        torch.manual_seed(values.get("seed", 42))
        add_lora(policy, r=values["lora_r"], alpha=values["lora_alpha"], dropout=0.0)
    encoder = PairEncoder.of(policy)
    encoded = []
    for pair in pairs:
        info = probe_video(pair.video, root=root)
        at = [int(x) for x in torch.linspace(0, info.num_frames - 1, values["num_frames"], dtype=torch.float64)]
        frames, _ = decode_frames(pair.video, indices=at, root=root)
        seconds = (info.timestamps[at[-1]] - info.timestamps[at[0]]) / (len(at) - 1)
        encoded.append(encoder(pair, frames, seconds).sample)
    with torch.no_grad():
        first = [both_logps(policy, sample) for sample in encoded]  # the reference is the untrained model
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": values["weight_decay"]},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=values["learning_rate"])
    losses, norms, steps = [], [], values["max_steps"]
    warmup = math.ceil(values["warmup_ratio"] * steps)
    order = [i for epoch in range(99) for i in epoch_order(len(pairs), seed=values.get("seed", 42), epoch=epoch)]
    for step in range(steps):
        chosen = order[step * pairs_per_step : (step + 1) * pairs_per_step]
        loss = torch.stack([pair_loss(values, policy, encoded[i], first[i]) for i in chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, values["max_grad_norm"])))
        rate = (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * values["learning_rate"]
        optimizer.step()
        losses.append(float(loss))
    return losses, {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}, norms


def pair_loss(values: dict[str, Any], policy: Any, sample: Sample, first: tuple[Tensor, Tensor]) -> Tensor:
    kind = values.get("loss_type", "synpo")
    chosen, rejected = both_logps(policy, sample)
    if kind == "synpo":
        contrast = torch.sigmoid(30 * (chosen.mean().exp() - rejected.mean().exp()))
        return -contrast - 0.2 * chosen.exp().mean()
    if kind == "sft":
        return -chosen.mean()
    shared, tail = min(len(chosen), len(rejected)), values.get("ld_alpha", 1.0)
    x, y = (
        0.1 * (each[:shared].sum() + tail * each[shared:].sum()) for each in (chosen - first[0], rejected - first[1])
    )
    log_sigmoid = torch.nn.functional.logsigmoid
    parts = {"dpo": -log_sigmoid(x - y), "bco_pair": -log_sigmoid(x) - log_sigmoid(-y), "sft": -chosen.mean()}
    names = kind.split(",")
    if values.get("use_weighting"):
        parts["dpo"] = parts["dpo"] * own_probability(policy, sample, 0) * own_probability(policy, sample, 1)
    return sum(w * parts[name] for w, name in zip(values.get("loss_weights", [1.0] * len(names)), names, strict=True))


def both_logps(policy: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    return token_logps(policy, sample, 0), token_logps(policy, sample, 1)


@torch.no_grad()
def own_probability(policy: Any, sample: Sample, which: int) -> Tensor:
    """WPO's weight of a response: exp of the mean of log p(token) - log sum_v p(v)^2."""
    log_probs, labels = token_log_softmax(policy, sample, which)
    return (log_probs.gather(1, labels)[:, 0] - log_probs.exp().square().sum(-1).log()).mean().exp()


def token_logps(policy: Any, sample: Sample, which: int) -> Tensor:
    log_probs, labels = token_log_softmax(policy, sample, which)
    return log_probs.gather(1, labels)[:, 0]


def token_log_softmax(policy: Any, sample: Sample, which: int) -> tuple[Tensor, Tensor]:
    """The log-probs of all words, [T, V], and the labels, [T, 1]."""
    alone = Sample(sample.prompt, (sample.responses[which],), sample.video)
    (row,) = plan_rows([alone.lengths])
    hidden = policy.hidden_states(row, [alone], policy.encode_videos([alone]))
    logits = policy.base.get_output_embeddings()(hidden[len(sample.prompt) - 1 :]).double()
    return logits.log_softmax(-1), torch.tensor(alone.responses[0])[:, None]
