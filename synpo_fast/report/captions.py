"""The captions section: captions of held-out videos, next to frames of each video and the pair's two responses.

For one run it shows the first and the last caption of each pair. For several runs it shows the last caption of each run and the
video once. Pairs of the same video share a card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from synpo_fast.report.colours import QUIET, RESPONSE_COLOURS
from synpo_fast.report.data import Row, RunRecord
from synpo_fast.report.formats import whole_number
from synpo_fast.report.frames import frames_markup

MAX_VIDEOS, MAX_OPEN, MAX_PAIRS = 12, 4, 4
MAX_TEXT = 3000


@dataclass
class _CaptionedPair:
    """A pair, which is the same in every run, and (label, text, colour) of each caption of its video."""

    row: Row
    captions: list[tuple[str, Any, str]] = field(default_factory=list)


def captions_markup(runs: Sequence[RunRecord], colours: Sequence[str]) -> str:
    """The cards of the section, or a note if no run has captions."""
    videos: dict[tuple[str, str], dict[str, _CaptionedPair]] = {}
    for run, colour in zip(runs, colours, strict=True):
        for row, captions in _captions_of(run, colour, several=len(runs) > 1):
            video = row.get("video")
            place = (str(video_root(run)), video) if isinstance(video, str) else ("", "")
            pairs = videos.setdefault(place, {})
            key = f"{row.get('id')} {row.get('prompt')}"
            pairs.setdefault(key, _CaptionedPair(row)).captions += captions
    if not videos:
        return '<p class="note">No captions: the run held out no pairs, or num_eval_captions is 0.</p>'
    shown = list(videos.items())[:MAX_VIDEOS]
    cards = [_card(video, Path(root), list(pairs.values())) for (root, video), pairs in shown]
    left = len(videos) - len(shown)
    rest = "".join(cards[MAX_OPEN:]) + (f'<p class="note">{left} more videos are in metrics.jsonl.</p>' if left else "")
    more = f"<details><summary>{len(videos) - MAX_OPEN} more videos</summary>{rest}</details>" if rest else ""
    return "".join(cards[:MAX_OPEN]) + more


def video_root(run: RunRecord) -> Path:
    """The folder that video paths are relative to, by the same rule as in training."""
    given = run.config.get("video_root")
    if isinstance(given, str) and given:
        return Path(given)
    file = run.config.get("eval_file") or run.config.get("train_file")
    return Path(file).parent if isinstance(file, str) else run.folder


def labelled_texts_markup(items: Sequence[tuple[str, Any, str]]) -> str:
    """A list of (label, text, colour); a text with a colour gets a bar of that colour at its left."""
    parts = []
    for label, text, colour in items:
        style = f' class="barred" style="border-color:{colour}"' if colour else ""
        parts.append(f"<dt>{escape(label)}</dt><dd{style}>{text_markup(text)}</dd>")
    return f'<dl class="said">{"".join(parts)}</dl>'


def text_markup(text: Any) -> str:
    """Text that was read from a file, escaped and cut after MAX_TEXT characters."""
    if not isinstance(text, str):
        return '<span class="soft">not recorded</span>'
    if not text.strip():
        return '<span class="soft">(empty)</span>'
    cut = f"… ({whole_number(len(text) - MAX_TEXT)} more characters)" if len(text) > MAX_TEXT else ""
    return escape(text[:MAX_TEXT] + cut)


def _captions_of(run: RunRecord, colour: str, *, several: bool) -> list[tuple[Row, list[tuple[str, Any, str]]]]:
    """Each captioned pair of a run, with (label, text, colour) of its captions to show."""
    found: dict[str, tuple[Row, list[tuple[int, Any]]]] = {}
    for evaluation in run.evaluations:
        rows = evaluation.get("eval_captions")
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict):
                key = f"{row.get('id')} {row.get('prompt')}"
                found.setdefault(key, (row, []))[1].append((evaluation["step"], row.get("caption")))
    result: list[tuple[Row, list[tuple[str, Any, str]]]] = []
    for row, captions in found.values():
        (first, first_caption), (last, last_caption) = captions[0], captions[-1]
        label = f"{run.name}, step" if several else "at step"
        shown = [(f"{label} {whole_number(last)}", last_caption, colour if several else "")]
        if len(captions) > 1 and not several:
            shown.insert(0, (f"at step {whole_number(first)}" if first else "before training", first_caption, ""))
        result.append((row, shown))
    return result


def _card(video: str, root: Path, pairs: Sequence[_CaptionedPair]) -> str:
    frames = (
        frames_markup(video, root)
        if video
        else '<p class="note">No frames: this is a text pair, or a pair made of clips.</p>'
    )
    title = f"<h3>{escape(video)}</h3>" if video else ""
    blocks = []
    for pair in pairs[:MAX_PAIRS]:
        plain = any(colour for _, _, colour in pair.captions)  # here colours mean runs
        responses = [
            (name, pair.row.get(name), QUIET if plain else colour) for name, colour in RESPONSE_COLOURS.items()
        ]
        prompt = text_markup(pair.row.get("prompt"))
        blocks.append(
            f'<div class="pair"><p class="soft">{prompt}</p>{labelled_texts_markup([*pair.captions, *responses])}</div>'
        )
    left = len(pairs) - MAX_PAIRS
    more = f'<p class="note">{left} more pairs of this video are in metrics.jsonl.</p>' if left > 0 else ""
    return (
        f'<article class="card video"><div class="frames">{frames}</div>'
        f"<div>{title}{''.join(blocks)}{more}</div></article>"
    )
