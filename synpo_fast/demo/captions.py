"""What can be said of a scene, rightly and wrongly, and how wrong it is.

A caption is one sentence an event: "First two large red rings move left. Then one small blue cross moves up." It is made of
events, so an error is an edit of the events and its weight is known; the score of a caption is 10 less the weights of its errors.

Errors are of two kinds. Slips happen to anybody, at random. Habits are systematic: the careless captioner takes crosses for
squares and three for two more often than not, so a model that learned from it does so always when it writes the likeliest word,
although it sees the difference. That is what preference training is to mend.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from random import Random

from synpo_fast.demo.world import WORDS, Event, Scene, random_scene

PROMPT = "Describe the video."
BEST_SCORE = 10.0
WEIGHTS = {**dict.fromkeys(WORDS, 1), "omission": 2, "order": 2, "repetition": 1, "invented": 2}

CAREFUL_SLIPS = 0.2  # of the careful captioner's captions have one
HABITS = {"three": "two", "small": "large", "purple": "blue", "cross": "square", "up": "down"}
HABIT_SHARE = 0.6


@dataclass(frozen=True)
class Caption:
    """What a caption tells, and its errors, keys of WEIGHTS: each that was made, a wrong attribute as often as it was."""

    events: Scene
    errors: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return caption_text(self.events)

    @property
    def score(self) -> float:
        return BEST_SCORE - sum(WEIGHTS[error] for error in self.errors)


def careful_caption(scene: Scene, random: Random) -> Caption:
    """The truth, with one slip in an attribute now and then."""
    slips = [random.choice(list(WORDS))] if random.random() < CAREFUL_SLIPS else []
    return told_with(scene, random, slips=slips)


def careless_caption(scene: Scene, random: Random, *, num_slips: int = 0) -> Caption:
    """Habits, and so many slips of different kinds."""
    return told_with(scene, random, slips=random.sample(list(WEIGHTS), num_slips), habits=HABIT_SHARE)


def told_with(scene: Scene, random: Random, *, slips: Collection[str], habits: float = 0.0) -> Caption:
    """A caption with one slip of each kind named; habits: how likely each is where it can show.

    Slips are made in an order in which none undoes another. One that can not be made, such as two events in the wrong order
    where there is one, is left out and is not among the errors.
    """
    truth, errors = scene, []
    if "omission" in slips and len(scene) > 1:
        at = random.randrange(len(scene))
        truth = scene[:at] + scene[at + 1 :]
        errors.append("omission")
    events = list(truth)
    for at, event in enumerate(truth):
        for name in WORDS:
            if getattr(event, name) in HABITS and random.random() < habits:
                events[at] = replace(events[at], **{name: HABITS[getattr(event, name)]})
                errors.append(name)
    for name in WORDS:
        right = [at for at, event in enumerate(truth) if getattr(events[at], name) == getattr(event, name)]
        if name in slips and right:
            at = random.choice(right)
            others = [word for word in WORDS[name] if word != getattr(truth[at], name)]
            events[at] = replace(events[at], **{name: random.choice(others)})
            errors.append(name)
    return Caption(*_in_another_way(events, errors, slips, random))


def _in_another_way(
    events: list[Event], errors: list[str], slips: Collection[str], random: Random
) -> tuple[Scene, tuple[str, ...]]:
    """Slips in what is told when."""
    if "order" in slips and len(set(events)) == len(events) > 1:
        at = random.randrange(len(events) - 1)
        events = [*events[:at], events[at + 1], events[at], *events[at + 2 :]]
        errors = [*errors, "order"]
    if "repetition" in slips:
        at = random.randrange(len(events))
        events = [*events[: at + 1], *events[at:]]
        errors = [*errors, "repetition"]
    if "invented" in slips:
        at = random.randint(0, len(events))
        events = [*events[:at], random_scene(random)[0], *events[at:]]
        errors = [*errors, "invented"]
    return tuple(events), tuple(errors)


def caption_text(events: Sequence[Event]) -> str:
    last = len(events) - 1
    begins = ["First" if i == 0 else "Finally" if i == last and i > 1 else "Then" for i in range(len(events))]
    return " ".join(f"{begin} {_clause(event)}." for begin, event in zip(begins, events, strict=True))


def _clause(event: Event) -> str:
    many = event.count != "one"
    shape = plural(event.shape) if many else event.shape
    return f"{event.count} {event.size} {event.colour} {shape} {'move' if many else 'moves'} {event.motion}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def vocabulary() -> list[str]:
    """Every word of captions and prompt, and the full stop."""
    attributes = [word for words in WORDS.values() for word in words]
    rest = ["First", "Then", "Finally", "move", "moves", ".", *PROMPT.removesuffix(".").split()]
    return [*attributes, *map(plural, WORDS["shape"]), *rest]
