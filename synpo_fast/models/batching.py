"""Cuts one rank's step into micro-batches that fit into memory."""

from collections.abc import Sequence

from synpo_fast.models.layout import group_length
from synpo_fast.models.policy import Sample


def packed_tokens(sample: Sample) -> int:
    """The number of tokens that the language model runs for a sample when its responses share the prompt."""
    return group_length(sample.lengths.prompt, sample.lengths.responses)


def micro_batches(samples: Sequence[Sample], *, max_pairs: int, max_tokens: int | None = None) -> list[list[int]]:
    """Returns the sample indices of each batch, in order. Each batch takes as many samples as fit into max_pairs and max_tokens.

    A sample longer than max_tokens gets a batch of its own, because cutting it would cut a response.
    """
    if max_pairs < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"max_pairs and max_tokens must be positive, got {max_pairs} and {max_tokens}")
    batches: list[list[int]] = []
    room = 0.0
    for index, sample in enumerate(samples):
        tokens = packed_tokens(sample)
        if not batches or len(batches[-1]) == max_pairs or tokens > room:
            batches.append([])
            room = float("inf") if max_tokens is None else max_tokens
        batches[-1].append(index)
        room -= tokens
    return batches
