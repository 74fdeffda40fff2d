"""Measures one table: checks the variants against the truth, measures their memory, times them in turn, counts their FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.contest import Options, Step, run_contest
from benchmarks.steps import BASELINE
from benchmarks.steps.agreement import errors, find_truth, why_wrong
from benchmarks.steps.cost import expected_flops, head_flops, tokens_of, tokens_only_limit, unit_costs
from benchmarks.steps.step_variant import Forward, StepResult, StepVariant, full_step
from benchmarks.steps.workload import Workload
from synpo_fast.profiling.counted_flops import count_flops
from synpo_fast.profiling.rounds import median_interval, median_ratio

GEMM = "gemm"
# Square matrix products that are large enough to reach the machine's full rate.
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


def compare(
    workload: Workload,
    variants: Sequence[StepVariant],
    options: Options,
    *,
    baseline: str = BASELINE,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, Any]:
    """Measures the variants and returns {"workload", "gemm", "rows"} for the JSON, with rows in the order of `variants`.

    baseline: name of the variant that speed-ups compare with. timer(call) -> seconds replaces the clock.
    """
    dtype = workload.policy.base.dtype
    truth = find_truth(workload, sorted({variant.loss for variant in variants}))
    forwards: dict[str, Forward] = {}
    runs: dict[str, Callable[[], StepResult]] = {}
    losses: dict[str, float] = {}

    def prepare(variant: StepVariant) -> Step:
        forwards[variant.name] = variant.prepare(workload)
        run: Any = full_step(workload, variant, forwards[variant.name])
        runs[variant.name] = run
        return Step(run, forwards[variant.name].setting)

    def judge(result: StepResult) -> tuple[dict[str, float], str | None]:
        losses[result.variant.name] = float(result.loss)
        found = errors(result, truth, workload)
        return found, why_wrong(found, dtype)

    contestants: dict[str, Callable[[], Step]] = {variant.name: partial(prepare, variant) for variant in variants}
    records = run_contest(
        contestants | {GEMM: partial(gemm, workload)}, judge, floor=baseline, options=options, timer=timer
    )
    *records, gemm_record = records
    gemm_flops = 2.0 * GEMM_SIZE[options.device.type] ** 3
    rate = gemm_flops / gemm_record["seconds"]["median"]
    by_name = {record["name"]: record for record in records}
    found = by_name.get(baseline)
    baseline_samples = found["seconds"]["samples"] if found and found["seconds"] else None
    static, unit = workload.static_bytes(), unit_costs(workload)
    baseline_cost = next(
        (expected_flops(workload, variant.passes, unit) for variant in variants if variant.name == baseline), None
    )
    rows = []
    for variant in variants:
        record = by_name[variant.name]
        cost = expected_flops(workload, variant.passes, unit)
        held = forwards[variant.name].held_bytes if variant.name in forwards else 0
        row = _row(variant, record, workload, baseline_samples, rate, static + held)
        row["limit"] = baseline_cost / cost if baseline_cost else None
        if row["skipped"] is None:
            row["loss"] = losses[variant.name]
            row["flops"] = count_flops(runs[variant.name])
            if variant.ours and workload.device.type == "cuda":  # products inside a Triton kernel are not counted
                row["flops"] += round(head_flops(workload, variant.passes, unit))
            row["gemm_share"] = row["flops"] / row["seconds"]["median"] / rate
        rows.append(row)
    workload.optimizer.zero_grad(set_to_none=True)
    return {
        "workload": describe(workload),
        "gemm": {"size": GEMM_SIZE[options.device.type], "flops_per_s": rate},
        "rows": rows,
    }


def _row(
    variant: StepVariant,
    record: dict[str, Any],
    workload: Workload,
    baseline: list[float] | None,
    rate: float,
    static_bytes: int,
) -> dict[str, Any]:
    """The JSON row of a variant. The caller adds limit and, if the variant ran, flops, gemm_share and loss."""
    row: dict[str, Any] = {
        "name": variant.name,
        "loss_name": variant.loss,
        "ours": variant.ours,
        "title": variant.title,
        "setting": record["setting"],
        "seconds": record["seconds"],
        "pairs_per_s": None,
        "tokens_per_s": None,
        "peak_memory_bytes": None,
        "flops": None,
        "gemm_share": None,
        "ratio": None,
        "ratio_low": None,
        "ratio_high": None,
        "loss": None,
        "error": record["error"],
        "skipped": record["skipped"],
        "faulty": record["faulty"],
    }
    if record["seconds"] is None:
        return row
    median, samples = record["seconds"]["median"], record["seconds"]["samples"]
    row["pairs_per_s"] = len(workload.samples) / median
    row["tokens_per_s"] = workload.tokens / median
    row["peak_memory_bytes"] = static_bytes + record["peak_extra_bytes"]
    if baseline is not None:
        row["ratio"] = median_ratio(baseline, samples)
        row["ratio_low"], row["ratio_high"] = median_interval([a / b for a, b in zip(baseline, samples, strict=True)])
    return row


def gemm(workload: Workload) -> Step:
    """A square matrix product in the model's dtype, which measures the machine's rate in the same rounds."""
    size = GEMM_SIZE[workload.device.type]
    a, b, out = (torch.randn(size, size, device=workload.device).to(workload.policy.base.dtype) for _ in range(3))

    def run() -> None:
        torch.mm(a, b, out=out)

    return Step(run, f"{size} x {size} x {size}", exact=False)


def describe(workload: Workload) -> dict[str, Any]:
    preset = workload.preset
    parameters = list(workload.policy.parameters())
    ratio = preset.prefix / preset.completion
    return {
        **asdict(preset),
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "tokens": workload.tokens,
        "comparisons": len(workload.samples),
        "language_tokens": {rows: tokens_of(workload, rows) for rows in ("padded", "apart", "shared", "responses")},
        "prefix_over_completion": ratio,
        "limit_tokens_only": {
            "shared": tokens_only_limit(ratio, share_prefix=True),
            "apart": tokens_only_limit(ratio, share_prefix=False),
        },
    }
