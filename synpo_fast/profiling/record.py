"""profile.json and the table on the screen: medians of what the rounds of a profile measured, and the lowest and highest of them.

The spread is the whole range, since rounds are no independent draws: the speed of a shared machine wanders over minutes, and an
interval that takes rounds for draws is too narrow to hold what the next profile finds.

A variant's ratio is the time of the slowest baseline (DPO with the adapter off, without the gains of sharing) over its own, round
by round, so that a machine that slows down slows both. The limit beside it counts forward passes of the language model per token:

    shared     d 2(P + C) / (s (P + 2C))            d, s: passes of DPO and of SynPO; P prompt and C response tokens of a pair
    unshared   d / s

s = 2 with an adapter (a forward, and a backward through frozen layers that costs as much), 3 when all weights train, one more
with gradient checkpointing; d = s + 1, the reference.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.profiling.rounds import Spread, ratios_by_round, spread
from synpo_fast.profiling.stage_clock import STAGES, StageTimes
from synpo_fast.profiling.variants import Variant

# The first of them that was measured is what ratios are against.
BASELINES = ("dpo-adapter-off-unshared", "dpo-frozen-copy-unshared", "dpo-precomputed-unshared")


def stage_spreads(times: Sequence[StageTimes]) -> dict[str, Spread]:
    """Seconds of each stage in the median step. Medians of seconds would not sum to the median step where rounds differ: so
    a stage's share of its step is taken round by round, and the median shares are brought to sum to 1."""
    median = statistics.median(each.seconds for each in times)
    shares = {stage: spread([each.stages[stage] / each.seconds for each in times]) for stage in STAGES}
    scale = median / sum(share["median"] for share in shares.values())
    return {stage: {name: scale * value for name, value in share.items()} for stage, share in shares.items()}


def baseline_of(times: Mapping[str, object]) -> str | None:
    return next((name for name in BASELINES if name in times), None)


def limit(
    config: TrainConfig, prompt_tokens: float, response_tokens: float, responses_of_a_pair: float = 2.0
) -> dict[str, Any]:
    """prompt_tokens: each pair's once. response_tokens: of all responses; a ground truth is a third one."""
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
    """costs: loss, peak_memory_bytes, flops and amortised_s of a variant that was measured."""
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
    """The table on the screen: the variants, then where their time goes."""
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
                f"{variant['loss_type']} {variant['loss']:.5f}",  # the numbers of two losses are no quantities of one kind
            ]
        )
    lines += [*_aligned(rows), "", "milliseconds by stage of the median step"]
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
                f"{variant['name']}: log-probs made beforehand, {variant['amortised_s']:.4g} s a step, once a training run"
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
        f"{record['rounds']} rounds of one step each: {batch['pairs']:.4g} pairs, {batch['prompt_tokens']:.0f} prompt and "
        f"{batch['response_tokens']:.0f} response tokens, prefix/completion {batch['prefix_to_completion']:.2f}\n"
        f"medians [lowest - highest]; ratio: time of {base} over the variant's own, round by round; "
        "limit: what passes of the language model predict"
    )


def _limit_cell(record: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
    """SynPO's two figures are all that the formula speaks of."""
    if variant["loss_type"] == "dpo" or record["ratio_base"] != BASELINES[0]:
        return ""
    return f"{record['limit']['dpo_over_synpo_shared' if variant['shared'] else 'unshared']:.2f}x"


def _cells(values: Spread, form: str) -> list[str]:
    low, high = (form.format(values[name]).split(" ")[0].removesuffix("x") for name in ("low", "high"))
    return [form.format(values["median"]), f"[{low} - {high}]"]


def _gflop(flops: float) -> str:
    return f"{flops / 1e9:,.0f}" if flops >= 1e12 else f"{flops / 1e9:.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        rest = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *rest]).rstrip())
    return lines
