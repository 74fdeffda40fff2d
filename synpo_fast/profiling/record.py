"""Makes profile.json and the printed table from a profile's rounds: the median of each number, with its lowest and highest value.

The spread is the whole range because rounds are not independent samples: the speed of a shared machine drifts over minutes. An
interval that treats rounds as independent is too narrow to contain the result of the next profile.

A variant's ratio is the time of the baseline (unshared DPO with the adapter off) divided by its own time in the same round, so a
machine that slows down affects both. The limit beside it counts forward passes of the language model per token:

    shared     d 2(P + C) / (s (P + 2C))
    unshared   d / s

d and s are the numbers of passes of DPO and of SynPO; a prompt has P tokens, a response C. s is 2 with an adapter (a forward, and
a backward through frozen layers that costs as much) and 3 if all weights train, plus 1 with gradient checkpointing. d = s + 1,
because DPO runs the reference too.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.profiling.rounds import Spread, ratios_by_round, spread
from synpo_fast.profiling.stage_clock import STAGES, StageTimes
from synpo_fast.profiling.variants import Variant
from synpo_fast.terminal.printable import counted

# Ratios compare with the first of these that was measured.
BASELINES = ("dpo-adapter-off-unshared", "dpo-frozen-copy-unshared", "dpo-precomputed-unshared")


def stage_spreads(times: Sequence[StageTimes]) -> dict[str, Spread]:
    """Seconds of each stage in the median step.

    If rounds differ, the medians of the stages' seconds do not sum to the median step. So we take the median of each stage's
    share of its step, and scale these shares to sum to 1.
    """
    median = statistics.median(each.seconds for each in times)
    shares = {stage: spread([each.stages[stage] / each.seconds for each in times]) for stage in STAGES}
    scale = median / sum(share["median"] for share in shares.values())
    return {stage: {name: scale * value for name, value in share.items()} for stage, share in shares.items()}


def baseline_of(times: Mapping[str, object]) -> str | None:
    """The variant that ratios compare with; None if no baseline was measured."""
    return next((name for name in BASELINES if name in times), None)


def limit(
    config: TrainConfig, prompt_tokens: float, response_tokens: float, responses_of_a_pair: float = 2.0
) -> dict[str, Any]:
    """The ratios that passes of the language model alone predict.

    prompt_tokens: each pair's prompt counted once. response_tokens: of all responses; a ground truth counts as a third response.
    """
    own = (2 if config.use_peft else 3) + int(bool(config.gradient_checkpointing))
    apart, shared = responses_of_a_pair * prompt_tokens + response_tokens, prompt_tokens + response_tokens
    return {
        "formula": f"{own + 1} * 2(P + C) / ({own} * (P + 2C)); unshared {own + 1} / {own}",
        "dpo_over_synpo_shared": (own + 1) * apart / (own * shared),
        "unshared": (own + 1) / own,
    }


def variant_record(
    variant: Variant,
    times: Sequence[StageTimes],
    base: Sequence[StageTimes] | None,
    tokens: Sequence[int],
    costs: Mapping[str, Any],
) -> dict[str, Any]:
    """A variant's entry in profile.json. costs: its loss, peak_memory_bytes, flops and amortised_s, if it was measured."""
    record: dict[str, Any] = {"name": variant.name, "loss_type": variant.loss_type, "reference": variant.reference}
    record |= {"shared": variant.shared, "skipped": variant.skipped}
    measured = ("seconds", "stages", "stages_over_step", "tokens_per_s", "ratio")
    if variant.skipped is not None:
        return record | dict.fromkeys((*measured, "peak_memory_bytes", "flops", "loss", "amortised_s"))
    seconds = [each.seconds for each in times]
    record["seconds"] = {**spread(seconds), "samples": seconds}
    record["stages"] = stage_spreads(times)
    record["stages_over_step"] = spread([sum(each.stages.values()) / each.seconds for each in times])
    record["tokens_per_s"] = statistics.median(count / second for count, second in zip(tokens, seconds, strict=True))
    record["ratio"] = None
    if base is not None:
        record["ratio"] = spread(ratios_by_round([each.seconds for each in base], seconds))
    return record | dict(costs)


def table(record: Mapping[str, Any]) -> str:
    """The printed table: a row for each variant, then each variant's time by stage."""
    variants = [variant for variant in record["variants"] if variant["skipped"] is None]
    lines = [_title(record), ""]
    rows = [["variant", "step", "", "ratio", "", "limit", "tokens/s", "peak memory", "GFLOP", "loss"]]
    for variant in variants:
        rows.append(
            [
                variant["name"],
                *_cells(variant["seconds"], "{:.4g} s"),
                *(["-", ""] if variant["ratio"] is None else _cells(variant["ratio"], "{:.2f}x")),
                _limit_cell(record, variant),
                f"{variant['tokens_per_s']:.0f}",
                f"{variant['peak_memory_bytes'] / 2**20:,.0f} MiB",
                _gflop(variant["flops"]),
                f"{variant['loss_type']} {variant['loss']:.5f}",  # named, because values of different losses are not comparable
            ]
        )
    lines += [*_aligned(rows), "", "milliseconds by stage in the median step"]
    stages = [stage for stage in STAGES if any(variant["stages"][stage]["median"] > 0 for variant in variants)]
    rows = [["variant", *stages]]
    rows += [
        [variant["name"], *(f"{variant['stages'][stage]['median'] * 1e3:.1f}" for stage in stages)]
        for variant in variants
    ]
    lines += _aligned(rows)
    for variant in variants:
        if variant["amortised_s"] is not None:
            lines.append(
                f"{variant['name']}: computing the log-probs beforehand takes {variant['amortised_s']:.4g} s per step, "
                "once per training run; this is not in the table"
            )
    lines += [
        f"{variant['name']}: not measured, {variant['skipped']}"
        for variant in record["variants"]
        if variant["skipped"] is not None
    ]
    return "\n".join(lines)


def _title(record: Mapping[str, Any]) -> str:
    batch, base = record["batch"], record["ratio_base"]
    return (
        f"{counted(record['rounds'], 'round')} of one step each: {batch['pairs']:.4g} pairs, "
        f"{batch['prompt_tokens']:.0f} prompt and {batch['response_tokens']:.0f} response tokens, "
        f"prefix/completion {batch['prefix_to_completion']:.2f}\n"
        f"medians [lowest - highest]; ratio: time of {base} divided by the variant's time, per round; "
        "limit: the ratio that passes of the language model alone predict"
    )


def _limit_cell(record: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
    """The predicted ratio of a variant; "" for DPO's variants, which the formula does not cover."""
    if variant["loss_type"] == "dpo" or record["ratio_base"] != BASELINES[0]:
        return ""
    return f"{record['limit']['dpo_over_synpo_shared' if variant['shared'] else 'unshared']:.2f}x"


def _cells(values: Spread, form: str) -> list[str]:
    low, high = (form.format(values[name]).split(" ")[0].removesuffix("x") for name in ("low", "high"))
    return [form.format(values["median"]), f"[{low} - {high}]"]


def _gflop(flops: float) -> str:
    return f"{flops / 1e9:,.0f}" if flops >= 1e12 else f"{flops / 1e9:.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with its first column aligned left and all others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        rest = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *rest]).rstrip())
    return lines
