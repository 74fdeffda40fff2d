"""Where everything stands in a packed row: prompts once, responses behind them, many prompts a row, no padding.

A group is a prompt and its responses. In the row it is  [ prefix | branch 1 | branch 2 | ... ]  and attention is causal,
except that a branch sees its own prefix and itself, never its siblings or another group. Token k of a response is predicted
by the row before it: the first one by the last row of the prefix, for every response alike. So a response of T tokens has a
branch of T - 1 rows (its last token predicts nothing) and T predicting rows.

Without sharing, each response is a group of its own behind a copy of the prefix: the same layout with one branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows that attend causally to themselves and, if they are a branch, to all of their prefix."""

    start: int
    length: int
    prefix_start: int
    prefix_length: int  # 0 for a prefix

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Group:
    """A prompt of one sample with some of its responses, placed in a row."""

    sample: int
    responses: tuple[int, ...]
    prefix: Segment
    branches: tuple[Segment, ...]

    def predicting_rows(self, branch: int) -> list[int]:
        """The rows whose hidden states predict the tokens of one response, in order."""
        segment = self.branches[branch]
        return [self.prefix.end - 1, *range(segment.start, segment.end)]


@dataclass(frozen=True)
class RowLayout:
    """One packed row."""

    length: int
    groups: tuple[Group, ...]

    @property
    def segments(self) -> list[Segment]:
        """In the order of the row, empty ones left out: a response of one token has no rows of its own."""
        return [segment for group in self.groups for segment in (group.prefix, *group.branches) if segment.length > 0]


@dataclass(frozen=True)
class SampleLengths:
    """Tokens of a sample's prompt and of each of its responses."""

    prompt: int
    responses: tuple[int, ...]


def group_length(prompt: int, responses: Sequence[int]) -> int:
    return prompt + sum(response - 1 for response in responses)


def plan_rows(
    samples: Sequence[SampleLengths], *, share_prefix: bool = True, pack: bool = True, row_tokens: int | None = None
) -> list[RowLayout]:
    """Places every response of every sample, first-fit by falling length; the same input gives the same plan.

    row_tokens bounds a row; a group longer than that gets a row to itself, since cutting it would cut a response. None
    packs everything into one row. pack=False gives each group its own row.
    """
    _check_samples(samples, row_tokens)
    wanted: list[tuple[int, tuple[int, ...]]] = []
    for index, sample in enumerate(samples):
        every = tuple(range(len(sample.responses)))
        wanted += [(index, every)] if share_prefix else [(index, (response,)) for response in every]
    lengths = [group_length(samples[i].prompt, [samples[i].responses[r] for r in chosen]) for i, chosen in wanted]
    rows: list[list[int]] = []
    room: list[float] = []
    bound = float("inf") if row_tokens is None else row_tokens
    for item in sorted(range(len(wanted)), key=lambda k: (-lengths[k], k)):
        fits = [row for row, left in enumerate(room) if lengths[item] <= left] if pack else []
        if fits:
            rows[fits[0]].append(item)
            room[fits[0]] -= lengths[item]
        else:
            rows.append([item])
            room.append(bound - lengths[item])
    return [_place([wanted[item] for item in sorted(row)], samples) for row in rows]


def _place(items: Sequence[tuple[int, tuple[int, ...]]], samples: Sequence[SampleLengths]) -> RowLayout:
    groups: list[Group] = []
    at = 0
    for sample, responses in items:
        prompt = samples[sample].prompt
        prefix = Segment(at, prompt, at, 0)
        at += prompt
        branches = []
        for response in responses:
            length = samples[sample].responses[response] - 1
            branches.append(Segment(at, length, prefix.start, prompt))
            at += length
        groups.append(Group(sample, responses, prefix, tuple(branches)))
    return RowLayout(at, tuple(groups))


def _check_samples(samples: Sequence[SampleLengths], row_tokens: int | None) -> None:
    if row_tokens is not None and row_tokens < 1:
        raise ValueError(f"row_tokens must be positive, got {row_tokens}")
    for index, sample in enumerate(samples):
        if sample.prompt < 1:
            raise ValueError(f"sample {index} has an empty prompt: nothing would predict the first token of a response")
        if not sample.responses or min(sample.responses) < 1:
            raise ValueError(f"sample {index} has an empty response: lengths {list(sample.responses)}")
