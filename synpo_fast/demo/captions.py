"""True and false captions of a scene, with the errors of each.

A caption has one sentence per event: "First two large red rings move left. Then one small blue cross moves up." It is made from
events, so an error is an edit of the events and its weight is known. A caption's score is 10 minus the weights of its errors.

There are two kinds of errors. Slips are random. Habits are systematic: the careless captioner calls crosses squares and three
two in more than half of the cases. A model trained on its captions always makes these errors when it writes the likeliest word,
although it can see the difference. Preference training is to correct them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from random import Random

from synpo_fast.demo.world import WORDS, Event, Scene, random_scene

PROMPT = "Describe the video."
BEST_SCORE = 10.0
WEIGHTS = {**dict.fromkeys(WORDS, 1), "omission": 2, "order": 2, "repetition": 1, "invented": 2}

CAREFUL_SLIPS = 0.2  # share of the careful captioner's captions that have a slip
HABITS = {"three": "two", "small": "large", "purple": "blue", "cross": "square", "up": "down"}
HABIT_SHARE = 0.6  # how likely a habit shows where it can


@dataclass(frozen=True)
class Caption:
    """The events a caption states, and its errors: a key of WEIGHTS for each, the same key several times if repeated."""

    events: Scene
    errors: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return caption_text(self.events)

    @property
    def score(self) -> float:
        return BEST_SCORE - sum(WEIGHTS[error] for error in self.errors)


def careful_caption(scene: Scene, random: Random) -> Caption:
    """The true caption, in CAREFUL_SLIPS of the cases with one wrong attribute."""
    slips = [random.choice(list(WORDS))] if random.random() < CAREFUL_SLIPS else []
    return caption_with_slips(scene, random, slips=slips)


def careless_caption(scene: Scene, random: Random, *, num_slips: int = 0) -> Caption:
    """A caption with habits and with num_slips slips of different kinds."""
    return caption_with_slips(scene, random, slips=random.sample(list(WEIGHTS), num_slips), habits=HABIT_SHARE)


def caption_with_slips(scene: Scene, random: Random, *, slips: Collection[str], habits: float = 0.0) -> Caption:
    """A caption with one slip of each given kind. habits: the probability of each habit where it can show.

    Slips are made in an order in which none undoes another. A slip that cannot be made, such as a wrong order of a single event,
    is left out and does not count as an error.
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
    return Caption(*_with_event_slips(events, errors, slips, random))


def _with_event_slips(
    events: list[Event], errors: list[str], slips: Collection[str], random: Random
) -> tuple[Scene, tuple[str, ...]]:
    """Adds the slips that move, repeat or invent a whole event."""
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
    """The caption that states these events in this order."""
    last = len(events) - 1
    begins = ["First" if i == 0 else "Finally" if i == last and i > 1 else "Then" for i in range(len(events))]
    return " ".join(f"{begin} {_clause(event)}." for begin, event in zip(begins, events, strict=True))


def _clause(event: Event) -> str:
    many = event.count != "one"
    shape = plural(event.shape) if many else event.shape
    return f"{event.count} {event.size} {event.colour} {shape} {'move' if many else 'moves'} {event.motion}"


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def vocabulary() -> list[str]:
    """All words of captions and prompt, and the full stop."""
    attributes = [word for words in WORDS.values() for word in words]
    rest = ["First", "Then", "Finally", "move", "moves", ".", *PROMPT.removesuffix(".").split()]
    return [*attributes, *map(plural, WORDS["shape"]), *rest]
