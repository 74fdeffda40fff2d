"""A SynPO step with the prompt run once a pair beside the same step with the prompt run for each response.

    python benchmarks/prefix_sharing.py [--prefix 1024] [--completion 128] [--pairs 2] [--rounds 5] [--hidden_size 512] ...

A random text model with LoRA, so that nothing but sharing differs. Prints the ratio of the times and of the counted FLOPs
beside the limit 2(r+1)/(r+2), r = prefix / completion, and where the time goes.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import environment, format_seconds, write_json
from synpo_fast.losses import PairLogprobs, synpo
from synpo_fast.models import Policy, Sample, load_policy
from synpo_fast.models.lora import add_lora
from synpo_fast.profiling.counted_flops import count_flops
from synpo_fast.profiling.rounds import interleave, median_ratio, summarise


def make_policy(hidden_size: int, layers: int, vocabulary: int, lora_r: int) -> Policy:
    sizes = {
        "hidden_size": hidden_size,
        "num_layers": layers,
        "intermediate_size": 3 * hidden_size,
        "vocab_size": vocabulary,
    }
    policy = load_policy("tiny:text", tiny_options=sizes)
    return add_lora(policy, r=lora_r, alpha=lora_r, dropout=0.0).train()


def make_samples(pairs: int, prefix: int, completion: int, vocabulary: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(5, vocabulary, (n,), generator=generator).tolist())  # noqa: E731
    return [Sample(draw(prefix), (draw(completion), draw(completion))) for _ in range(pairs)]


def step(policy: Policy, samples: list[Sample], *, share: bool) -> None:
    policy.zero_grad(set_to_none=True)
    logps = policy(samples, share_prefix=share)
    synpo(PairLogprobs.from_pairs([(chosen, rejected) for chosen, rejected in logps])).losses.mean().backward()


def profile(policy: Policy, samples: list[Sample], *, share: bool) -> dict[str, float]:
    """Seconds of one step in matrix products, attention, and everything else."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(policy, samples, share=share)
    parts = {"products": 0.0, "attention": 0.0, "softmax pass": 0.0, "rest": 0.0}
    for event in profiler.key_averages():
        name = event.key
        if "linear_logprobs" in name:
            part = "softmax pass"
        elif name in ("aten::mm", "aten::addmm", "aten::bmm"):
            part = "products"
        elif "scaled_dot_product_flash_attention_for_cpu" in name:
            part = "attention"
        else:
            part = "rest"
        parts[part] += event.self_cpu_time_total / 1e6
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    policy = make_policy(options.hidden_size, options.layers, options.vocabulary, options.lora_r)
    samples = make_samples(options.pairs, options.prefix, options.completion, options.vocabulary)
    parameters = sum(p.numel() for p in policy.parameters())
    calls = {
        "shared": lambda: step(policy, samples, share=True),
        "unshared": lambda: step(policy, samples, share=False),
    }
    for call in calls.values():
        call()
    flops = {name: count_flops(call) for name, call in calls.items()}
    samples_of = interleave(calls, rounds=options.rounds, device=policy.device)
    parts = {name: profile(policy, samples, share=name == "shared") for name in calls}
    ratio = median_ratio(samples_of["unshared"], samples_of["shared"])
    r = options.prefix / options.completion
    print(
        f"{parameters / 1e6:.1f}M parameters, {options.pairs} pairs, prefix {options.prefix}, completions {options.completion}"
    )
    for name in calls:
        timing = summarise(samples_of[name])
        where = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts[name].items())
        print(
            f"{name:9} {format_seconds(timing.median):>8} ({format_seconds(timing.low)} - {format_seconds(timing.high)}), "
            f"{flops[name] / 1e9:.0f} GFLOP; profile: {where}"
        )
    print(
        f"shared is {ratio:.2f}x as fast; counted FLOPs say {flops['unshared'] / flops['shared']:.2f}x, "
        f"tokens alone 2(r+1)/(r+2) = {2 * (r + 1) / (r + 2):.2f}x at r = {r:.1f}"
    )
    if options.json:
        record = {
            "environment": environment(policy.device), "parameters": parameters, "flops": flops, "ratio": ratio,
            "seconds": samples_of, "profile": parts, "limit": 2 * (r + 1) / (r + 2),
        }  # fmt: skip
        write_json(options.json, record)


if __name__ == "__main__":
    main()
