"""Exact-attribute accuracy: which share of what a caption should say it says, word for word.

A true event has five attributes to get right, and a scene of two or more events has an order. The caption's events are paired
with the true ones so that most attributes agree. What is left out counts as wrong in all its attributes, and so does every event
the caption tells too much:

    accuracy = attributes and orders right / (5 * max(true events, told events) + scenes with an order)

summed over all videos.
An attribute alone: its share among the true events. Order: all events are told, each known by its colour or its
shape, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

from synpo_fast.demo.captions import plural
from synpo_fast.demo.world import WORDS, Event, Scene

Told = dict[str, str | None]  # attribute -> the word the caption has for it
SINGULAR = {plural(shape): shape for shape in WORDS["shape"]}
MOST_TOLD = 6  # a caption that goes on and on: what comes later only counts as too much


def told_events(text: str) -> list[Told]:
    """One a sentence; an attribute without a word is None, and of two words the first counts."""
    told = []
    for sentence in text.split("."):
        words = [SINGULAR.get(word, word) for word in sentence.split()]
        if words:
            told.append({name: next((w for w in words if w in known), None) for name, known in WORDS.items()})
    return told


def agreements(scene: Scene, told: Sequence[Told]) -> list[tuple[Told | None, int]]:
    """For each true event the told one that is paired with it, and its place; of equally good pairings the one in order."""
    places = [*range(min(len(told), MOST_TOLD))] + [-1] * len(scene)
    best: tuple[int, tuple[int, ...]] = (-1, ())
    for chosen in permutations(places, len(scene)):
        right = sum(
            told[place][name] == getattr(event, name)
            for event, place in zip(scene, chosen, strict=True)
            if place >= 0
            for name in WORDS
        )
        best = (right, chosen) if right > best[0] else best
    return [(told[place] if place >= 0 else None, place) for place in best[1]]


@dataclass
class Accuracy:
    """Counts over videos: of each attribute, and of "order", how often it was right and how often it was asked for."""

    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*WORDS, "order"), 0))
    asked: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*WORDS, "order"), 0))
    too_much: int = 0

    def add(self, scene: Scene, text: str) -> None:
        told = told_events(text)
        paired = agreements(scene, told)
        for event, (said, _) in zip(scene, paired, strict=True):
            for name in WORDS:
                self.asked[name] += 1
                self.right[name] += said is not None and said[name] == getattr(event, name)
        self.too_much += max(0, len(told) - len(scene))
        if len(scene) > 1:
            places = [place for _, place in paired]
            self.asked["order"] += 1
            known = all(
                said is not None and _same_things(event, said) for event, (said, _) in zip(scene, paired, strict=True)
            )
            self.right["order"] += known and places == sorted(places)

    @property
    def overall(self) -> float:
        """In [0, 1]."""
        return sum(self.right.values()) / (sum(self.asked.values()) + len(WORDS) * self.too_much)

    def per_attribute(self) -> dict[str, float]:
        return {name: self.right[name] / max(1, asked) for name, asked in self.asked.items()}


def _same_things(event: Event, said: Told) -> bool:
    """Events of a scene differ in both."""
    return said["colour"] == event.colour or said["shape"] == event.shape
