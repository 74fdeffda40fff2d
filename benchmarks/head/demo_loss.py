"""Measures the fused SynPO loss beside eager torch on this machine, on generated tensors: time, memory and agreement.

    python benchmarks/head/demo_loss.py [--pairs 2] [--tokens 512] [--valid 0.5] [--rounds 5]

The eager loss computes what a trainer without a fused loss does: logits of every position, fp32 log-softmax, gather, then the
formula. The head is frozen, as in LoRA training. A GPU is used if there is one.
"""

import argparse
import os
import sys
from pathlib import Path

# Hides the memory profiler's warnings about blocks allocated before it started.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch import Tensor

if __package__ in (None, ""):  # started by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.common import environment, format_bytes, format_seconds
from synpo_fast import FusedLinearSynPOLoss
from synpo_fast.losses import PairLogprobs, synpo
from synpo_fast.profiling.peak_memory import peak_extra_memory
from synpo_fast.profiling.rounds import interleave, median_ratio, summarise

IGNORED = -100


def make_batch(num_pairs: int, tokens: int, valid: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden [2B, T, D], head [V, D] and target [2B, T]. The first part of every row is prompt, which is ignored."""
    dim, vocabulary = (3584, 152064) if device.type == "cuda" else (1024, 32000)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * num_pairs, tokens, dim, generator=generator)
    weight = torch.randn(vocabulary, dim, generator=generator) * (2.0 / dim**0.5)
    target = torch.randint(vocabulary, (2 * num_pairs, tokens), generator=generator)
    target[:, : int(tokens * (1 - valid))] = IGNORED
    return hidden.to(device, torch.bfloat16).requires_grad_(), weight.to(device, torch.bfloat16), target.to(device)


def eager_loss(weight: Tensor, hidden: Tensor, target: Tensor) -> Tensor:
    log_probs = torch.log_softmax((hidden @ weight.T).float(), -1)
    mask = target != IGNORED
    logps = log_probs.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1) * mask
    return synpo(PairLogprobs.from_padded(logps, mask)).losses.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2, help="pairs in the batch")
    parser.add_argument("--tokens", type=int, default=512, help="positions in a row, prompt included")
    parser.add_argument("--valid", type=float, default=0.5, help="share of positions that are response tokens")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = environment(device)
    hidden, weight, target = make_batch(options.pairs, options.tokens, options.valid, device)
    module = FusedLinearSynPOLoss()
    print(f"SynPO on {where.get('gpu') or where.get('cpu')}, torch {torch.__version__}")
    print(
        f"{options.pairs} pairs of {options.tokens} positions, {int((target != IGNORED).sum())} response tokens, "
        f"D={weight.shape[1]}, V={weight.shape[0]}, bf16, frozen head, forward and backward\n"
    )

    def step(loss: Tensor) -> tuple[Tensor, Tensor]:
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    calls = {
        "eager": lambda: step(eager_loss(weight, hidden, target)),
        "synpo_fast": lambda: step(module(weight, hidden, target)[0]),
    }
    results = {name: call() for name, call in calls.items()}
    memory = {name: peak_extra_memory(call, device)["peak"] for name, call in calls.items()}
    samples = interleave(calls, rounds=options.rounds, device=device)
    print(f"{'':12} {'median':>9} {'(low - high)':>20} {'peak extra memory':>18} {'loss':>10}")
    for name in calls:
        timing = summarise(samples[name])
        spread = f"({format_seconds(timing.low)} - {format_seconds(timing.high)})"
        loss = results[name][0].item()
        print(
            f"{name:12} {format_seconds(timing.median):>9} {spread:>20} {format_bytes(memory[name]):>18} {loss:>10.6f}"
        )
    difference = (results["eager"][1] - results["synpo_fast"][1]).float().norm() / results["eager"][1].float().norm()
    if not difference < 0.05:
        raise SystemExit(f"the two gradients differ by {difference:.2g} of their size, so no speed is reported")
    speed = median_ratio(samples["eager"], samples["synpo_fast"])
    print(
        f"\nsynpo_fast is {speed:.1f}x as fast, with {memory['eager'] / memory['synpo_fast']:.0f}x less extra memory; "
        f"the gradients differ by {difference:.1%} (both are bf16)."
    )


if __name__ == "__main__":
    main()
