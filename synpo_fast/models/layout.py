"""The layout of packed rows: each prompt once, its responses after it, several prompts per row, no padding.

A group is a prompt and its responses. In the row it is  [ prefix | branch 1 | branch 2 | ... ]. Attention is causal, and a
branch attends only to its own prefix and to itself, never to its siblings or to another group. A response token is predicted
at the position before it; the first token of every response is predicted at the last position of the prefix. So a response
of T tokens has a branch of T - 1 positions (its last token predicts nothing) and T predicting positions.

Without prefix sharing, each response is a group of its own with a copy of the prefix: the same layout with one branch.

"Row" has two meanings here: a packed row is one sequence of the language model; a row inside it is one of its positions, that
is a row of the matrix of hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Neighbouring positions that attend causally to themselves and, in a branch, to all of their prefix."""

    start: int
    length: int
    prefix_start: int
    prefix_length: int  # 0 for a prefix

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Group:
    """The prompt of one sample and some of its responses, placed in a packed row."""

    sample: int
    responses: tuple[int, ...]
    prefix: Segment
    branches: tuple[Segment, ...]

    def predicting_rows(self, branch: int) -> list[int]:
        """The rows whose hidden states predict the tokens of one response, in the order of the tokens."""
        segment = self.branches[branch]
        return [self.prefix.end - 1, *range(segment.start, segment.end)]


@dataclass(frozen=True)
class RowLayout:
    """One packed row: its length and its groups."""

    length: int
    groups: tuple[Group, ...]

    @property
    def segments(self) -> list[Segment]:
        """All segments in the order of the row, without empty ones (a response of one token has no rows of its own)."""
        return [segment for group in self.groups for segment in (group.prefix, *group.branches) if segment.length > 0]


@dataclass(frozen=True)
class SampleLengths:
    """The number of tokens in a sample's prompt and in each of its responses."""

    prompt: int
    responses: tuple[int, ...]


def group_length(prompt: int, responses: Sequence[int]) -> int:
    return prompt + sum(response - 1 for response in responses)


def plan_rows(
    samples: Sequence[SampleLengths], *, share_prefix: bool = True, pack: bool = True, row_tokens: int | None = None
) -> list[RowLayout]:
    """Places every response of every sample in a row: first-fit, longest group first. The same input gives the same plan.

    row_tokens is the maximum length of a row; a longer group gets a row to itself, because cutting it would cut a response.
    None packs everything into one row. pack=False gives each group its own row.
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
