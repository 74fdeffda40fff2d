"""One rank's step cut into micro-batches that fit the memory."""

from collections.abc import Sequence

from synpo_fast.models.layout import group_length
from synpo_fast.models.policy import Sample


def packed_tokens(sample: Sample) -> int:
    """Rows of the language model that a sample takes with its prompt shared."""
    return group_length(sample.lengths.prompt, sample.lengths.responses)


def micro_batches(samples: Sequence[Sample], *, max_pairs: int, max_tokens: int | None = None) -> list[list[int]]:
    """Indices of the samples in order, each batch as long as it can be with at most max_pairs samples and max_tokens tokens.

    A sample that alone is above max_tokens gets a batch of its own, since cutting it would cut a response.
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
