"""Tables that throughput.py prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common import format_bytes, format_seconds, format_table
from synpo_fast.terminal.printable import counted


def title(workload: dict[str, Any], gemm: dict[str, Any]) -> str:
    video = f"{workload['frames']} frames of {workload['size']} px, " if workload["frames"] else ""
    limit = workload["limit_tokens_only"]
    pairs = f"{workload['pairs']} pairs per step"
    predicted = (
        f"the language model's tokens alone predict {limit['shared']:.2f}x over DPO with the adapter off, "
        f"{limit['apart']:.2f}x without prefix sharing: sharing gives {limit['shared'] / limit['apart']:.2f}x"
    )
    if workload["responses"] > 2:
        tokens = workload["language_tokens"]
        pairs = (
            f"{workload['comparisons']} pairs per step, comparisons ({workload['pairs_from']}) of {workload['responses']} "
            f"responses to each of {counted(workload['pairs'], 'video')}"
        )
        predicted = (
            f"a pass of the language model runs {tokens['padded']} tokens in padded rows, {tokens['shared']} in pairs that "
            f"share their prompt, {tokens['responses']} in rows with all responses"
        )
    return (
        f"{workload['name']}: {workload['parameters'] / 1e6:.0f} M parameters, LoRA r={workload['lora_r']}, frozen tower, "
        f"{workload['dtype']}; {pairs}, {video}prefix {workload['prefix']}, completions "
        f"{workload['completion']} (+-{workload['spread']:.0%})\n"
        f"a bare matrix product runs at {gemm['flops_per_s'] / 1e9:.0f} GFLOP/s; {predicted}"
    )


def table(workload: dict[str, Any], run: dict[str, Any]) -> str:
    header = [
        "variant", "step", "(low - high)", "pairs/s", "tokens/s", "peak memory", "GFLOP", "of GEMM", "speed-up", "(low - high)",
        "theory", "loss", "setting",
    ]  # fmt: skip
    lines = []
    for row in run["rows"]:
        if row["skipped"] is not None:
            lines.append([row["name"], *["-"] * 9, "", "-", row["skipped"]])
            continue
        seconds = row["seconds"]
        ratios = ["-", "", "-"]
        if row["ratio"] is not None:
            ratios = [
                f"{row['ratio']:.2f}x",
                f"({row['ratio_low']:.2f} - {row['ratio_high']:.2f})",
                f"{row['limit']:.2f}x",
            ]
        lines.append(
            [
                row["name"],
                format_seconds(seconds["median"]),
                f"({format_seconds(seconds['low'])} - {format_seconds(seconds['high'])})",
                f"{row['pairs_per_s']:.3g}",
                f"{row['tokens_per_s']:.0f}",
                format_bytes(row["peak_memory_bytes"]),
                f"{row['flops'] / 1e9:.0f}",
                f"{row['gemm_share']:.0%}",
                *ratios,
                f"{row['loss']:.5f}",
                row["setting"],
            ]
        )
    return f"{title(workload, run['gemm'])}\n\n{format_table(header, lines)}\n"


def repeats_table(runs: Sequence[dict[str, Any]], baseline: str) -> str:
    """The speed-up of every variant in every run, with the lowest and highest bound of the runs' intervals."""
    header = ["variant", *(f"run {number}" for number in range(1, len(runs) + 1)), "(lowest - highest)"]
    lines = []
    for same in zip(*(run["rows"] for run in runs), strict=True):
        ratios = ["-" if row["ratio"] is None else f"{row['ratio']:.2f}x" for row in same]
        known = [row for row in same if row["ratio"] is not None]
        spread = ""
        if known:
            lowest, highest = min(row["ratio_low"] for row in known), max(row["ratio_high"] for row in known)
            spread = f"({lowest:.2f} - {highest:.2f})"
        lines.append([same[0]["name"], *ratios, spread])
    return f"speed-up over {baseline}, {len(runs)} runs\n\n{format_table(header, lines)}\n"
