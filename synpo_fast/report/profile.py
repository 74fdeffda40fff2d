"""The report sections made from profile.json (step times of several variants) and from demo.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from synpo_fast.report.captions import labelled_texts_markup
from synpo_fast.report.colours import series_colour
from synpo_fast.report.data import number_in
from synpo_fast.report.formats import NO_NUMBER, duration, memory, percent, short
from synpo_fast.report.frames import frames_markup
from synpo_fast.report.tables import table, table_card

MAX_EXAMPLES = 6
NAMES = {
    "warm_up": "warm-up",
    "synpo": "SynPO",
    "dpo": "DPO",
    "truth": "true caption",
    "before": "before SynPO",
    "after": "after SynPO",
}


def profile_markup(profile: Mapping[str, Any]) -> str:
    """A bar of stage times for each variant, all to one scale, and tables of the numbers."""
    variants = [variant for variant in _list(profile.get("variants", profile.get("ways"))) if isinstance(variant, dict)]
    if not variants and isinstance(profile.get("stages"), dict):
        variants = [{"name": "this run", "stages": profile["stages"]}]
    if not variants:
        return '<p class="note">profile.json names no variants.</p>'
    timed = [variant for variant in variants if variant.get("skipped") is None]
    names = list({name: None for variant in timed for name in _dict(variant.get("stages"))})
    parts = [_bars(timed, names), _variants_table(timed), _explained(profile, variants), _stages_table(timed, names)]
    return "".join(parts) + _environment(profile)


def demo_markup(demo: Mapping[str, Any], folder: Path) -> str:
    """Accuracy by attribute before and after training, the NLL of true captions, and example captions."""
    parts = []
    rows = {"all attributes": demo.get("accuracy"), **_by_attribute(demo)}
    tables = [
        ("Exact-attribute accuracy on unseen videos", rows, True),
        ("NLL of the true captions of unseen videos", {"NLL": demo.get("nll")}, False),
    ]
    for title, found, share in tables:
        good = {name: value for name, value in found.items() if isinstance(value, dict)}
        if good:
            parts.append(f"<h3>{title}</h3>{_table_of(good, share)}")
    for example in [row for row in _list(demo.get("examples")) if isinstance(row, dict)][:MAX_EXAMPLES]:
        parts.append(_example(example, folder))
    seconds = {str(name): number_in(value) for name, value in _dict(demo.get("seconds")).items()}
    times = ", ".join(
        f"{escape(NAMES.get(name, name))} {short(value)} s" for name, value in seconds.items() if value is not None
    )
    speeds = {str(name): number_in(value) for name, value in _dict(demo.get("pairs_per_s")).items()}
    rates = ", ".join(f"{escape(NAMES.get(name, name))} {short(rate)}" for name, rate in speeds.items())
    notes = [f"Pairs per second in training, median: {rates}." if rates else "", f"Time: {times}." if times else ""]
    return "".join(parts) + "".join(f'<p class="note">{note}</p>' for note in notes if note)


def _bars(variants: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    spans = [{name: _median(_dict(variant.get("stages")).get(name)) or 0.0 for name in names} for variant in variants]
    longest = max((sum(span.values()) for span in spans), default=0.0)
    if longest <= 0:
        return ""
    rows = []
    for variant, span in zip(variants, spans, strict=True):
        pieces = "".join(
            f'<span style="width:{100 * seconds / longest:.3f}%;background:{series_colour(number)}" '
            f'title="{escape(name)} {duration(seconds)}"></span>'
            for number, (name, seconds) in enumerate(span.items())
        )
        rows.append(
            f'<div>{_name(variant)}</div><div class="bar" role="img" aria-label="{_aria_label(span)}">{pieces}</div>'
        )
    key = "".join(
        f'<span><b class="swatch" style="background:{series_colour(number)}"></b>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<div class="card"><div class="bars">{"".join(rows)}</div><p class="key" style="margin-top:10px">{key}</p></div>'


def _variants_table(variants: Sequence[dict[str, Any]]) -> str:
    # The ratio comes first: it is the purpose of a profile, and a phone hides the columns at the right.
    head = ["", "ratio", "step time", "spread", "tokens/s", "peak memory", "FLOPs"]
    rows = []
    for variant in variants:
        rows.append(
            [
                _name(variant),
                _with_spread(variant.get("ratio"), lambda ratio: short(ratio, "x", 3)),
                duration(_median(variant.get("seconds"))),
                _spread(variant.get("seconds"), duration),
                short(_median(variant.get("tokens_per_s"))),
                memory(number_in(variant.get("peak_memory_bytes"))),
                short(_median(variant.get("flops"))),
            ]
        )
    return table_card(head, rows, "numbers several")


def _explained(profile: Mapping[str, Any], variants: Sequence[dict[str, Any]]) -> str:
    """Notes about the batch, the ratio and its limit, and the variants that were not measured."""
    batch, limit = _dict(profile.get("batch")), _dict(profile.get("limit"))
    facts = [f"{short(number_in(profile.get('rounds')))} rounds"] if "rounds" in profile else []
    for name, what in (("pairs", "pairs"), ("prompt_tokens", "prompt tokens"), ("response_tokens", "response tokens")):
        facts += [f"{short(number_in(batch[name]), digits=3)} {what}"] if name in batch else []
    lines = (
        [", ".join(facts) + " per step. Bars: median step by stage. Spread: lowest to highest of the rounds."]
        if facts
        else []
    )
    if isinstance(profile.get("ratio_base"), str):
        lines.append(
            f"Ratio, per round: time of {profile['ratio_base']} divided by the variant's time; higher is faster."
        )
    shared, apart = (short(number_in(limit.get(name)), digits=3) for name in ("dpo_over_synpo_shared", "unshared"))
    if limit:
        lines.append(
            f"Passes of the language model alone predict a ratio of {shared} for SynPO, {apart} without prefix sharing."
        )
    for variant in variants:
        seconds = number_in(variant.get("amortised_s"))
        if seconds is not None:
            lines.append(
                f"{variant.get('name')}: computing the log-probs beforehand takes {duration(seconds)} per step, "
                "once per training run. This is not in the table."
            )
        if variant.get("skipped") is not None:
            lines.append(f"{variant.get('name')}: not measured, {variant['skipped']}.")
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def _stages_table(variants: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    if not names:
        return ""
    rows = [
        [escape(name), *(_with_spread(_dict(variant.get("stages")).get(name), duration) for variant in variants)]
        for name in names
    ]
    inner = table(["stage", *map(_name, variants)], rows, "numbers several")
    return f"<details><summary>All stages: median and spread</summary>{inner}</details>"


def _environment(profile: Mapping[str, Any]) -> str:
    facts = _dict(profile.get("environment"))
    text = " · ".join(f"{name} {value}" for name, value in facts.items() if isinstance(value, (str, int, float)))
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _by_attribute(demo: Mapping[str, Any]) -> dict[str, Any]:
    """Returns attribute -> model -> accuracy; the file may be grouped by attribute or by model."""
    found = _dict(demo.get("per_attribute"))
    models = _dict(demo.get("accuracy"))
    if models and set(found) <= set(models):
        names = list({name: None for value in found.values() for name in _dict(value)})
        return {name: {model: _dict(found[model]).get(name) for model in found} for name in names}
    return found


def _table_of(rows: Mapping[str, Mapping[str, Any]], share: bool) -> str:
    columns = list({name: None for row in rows.values() for name in row})
    cells = {name: [number_in(row.get(column)) for column in columns] for name, row in rows.items()}
    fractions = share and all(value is None or abs(value) <= 1 for row in cells.values() for value in row)

    def shown(value: float | None) -> str:
        if value is None or not share:
            return short(value)
        return percent(100 * value if fractions else value)

    body = [[escape(str(name)), *map(shown, row)] for name, row in cells.items()]
    head = ["", *(escape(NAMES.get(column, str(column).replace("_", " "))) for column in columns)]
    return table_card(head, body, "numbers")


def _example(example: Mapping[str, Any], folder: Path) -> str:
    video = example.get("video")
    frames = frames_markup(str(folder / video), None) if isinstance(video, str) else ""
    names = [name for name in example if name != "video"]
    items = [(NAMES.get(name, str(name)), example[name], series_colour(0) if name == "after" else "") for name in names]
    title = f"<h3>{escape(video)}</h3>" if isinstance(video, str) else ""
    body = f"{title}{labelled_texts_markup(items)}"
    return f'<article class="card video"><div class="frames">{frames}</div><div>{body}</div></article>'


def _median(value: Any) -> float | None:
    return number_in(value.get("median") if isinstance(value, dict) else value)


def _spread(value: Any, shown: Any = short) -> str:
    low, high = (number_in(_dict(value).get(name)) for name in ("low", "high"))
    return NO_NUMBER if low is None or high is None else f"{shown(low)} to {shown(high)}"


def _with_spread(value: Any, shown: Any = short) -> str:
    spread = _spread(value, shown)
    median = shown(_median(value))
    return median if "to" not in spread else f'{median}<br><span class="soft">{spread}</span>'


def _aria_label(span: Mapping[str, float]) -> str:
    return escape(", ".join(f"{name} {duration(seconds)}" for name, seconds in span.items() if seconds))


def _name(variant: Mapping[str, Any]) -> str:
    return escape(str(variant.get("name", "unnamed")))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
