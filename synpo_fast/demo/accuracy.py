"""Exact-attribute accuracy: the share of a video's attributes that its caption states with exactly the right word.

Each true event has five attributes, and a scene of two or more events also has an order. The caption's events are matched to the
true events so that as many attributes as possible agree. All attributes of an omitted event count as wrong, and so do those of an
extra event:

    accuracy = correct attributes and orders / (5 * max(true events, events of the caption) + scenes with an order)

Both sums run over all videos. The accuracy of a single attribute is its share of the true events. The order is correct if the
caption has all events in the true order, each with the right colour or the right shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

from synpo_fast.demo.captions import plural
from synpo_fast.demo.world import WORDS, Event, Scene

ParsedEvent = dict[str, str | None]  # attribute -> the caption's word for it
SINGULAR = {plural(shape): shape for shape in WORDS["shape"]}
MAX_MATCHED = 6  # later events of a caption are not matched; they only count as extra events


def parse_events(text: str) -> list[ParsedEvent]:
    """The events of a caption, one per sentence. A missing attribute is None; of two words for an attribute the first counts."""
    parsed = []
    for sentence in text.split("."):
        words = [SINGULAR.get(word, word) for word in sentence.split()]
        if words:
            parsed.append({name: next((w for w in words if w in known), None) for name, known in WORDS.items()})
    return parsed


def match_events(scene: Scene, parsed: Sequence[ParsedEvent]) -> list[tuple[ParsedEvent | None, int]]:
    """For each true event, its match in the caption (or None) and the match's index (or -1).

    Of equally good matchings it takes the one that keeps the caption's order.
    """
    places = [*range(min(len(parsed), MAX_MATCHED))] + [-1] * len(scene)
    best: tuple[int, tuple[int, ...]] = (-1, ())
    for chosen in permutations(places, len(scene)):
        correct = sum(
            parsed[place][name] == getattr(event, name)
            for event, place in zip(scene, chosen, strict=True)
            if place >= 0
            for name in WORDS
        )
        best = (correct, chosen) if correct > best[0] else best
    return [(parsed[place] if place >= 0 else None, place) for place in best[1]]


@dataclass
class Accuracy:
    """Counts over videos: correct and total numbers for each attribute and for "order", and the number of extra events."""

    correct: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*WORDS, "order"), 0))
    total: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*WORDS, "order"), 0))
    extra_events: int = 0

    def add(self, scene: Scene, text: str) -> None:
        """Counts the caption `text` of a video that shows `scene`."""
        parsed = parse_events(text)
        matches = match_events(scene, parsed)
        for event, (match, _) in zip(scene, matches, strict=True):
            for name in WORDS:
                self.total[name] += 1
                self.correct[name] += match is not None and match[name] == getattr(event, name)
        self.extra_events += max(0, len(parsed) - len(scene))
        if len(scene) > 1:
            places = [place for _, place in matches]
            self.total["order"] += 1
            recognised = all(
                match is not None and _is_same_group(event, match)
                for event, (match, _) in zip(scene, matches, strict=True)
            )
            self.correct["order"] += recognised and places == sorted(places)

    @property
    def overall(self) -> float:
        """The accuracy over all videos, in [0, 1]."""
        return sum(self.correct.values()) / (sum(self.total.values()) + len(WORDS) * self.extra_events)

    def per_attribute(self) -> dict[str, float]:
        """The accuracy of each attribute and of "order", in [0, 1]."""
        return {name: self.correct[name] / max(1, total) for name, total in self.total.items()}


def _is_same_group(event: Event, match: ParsedEvent) -> bool:
    """True if colour or shape agree: the events of a scene differ in both."""
    return match["colour"] == event.colour or match["shape"] == event.shape
