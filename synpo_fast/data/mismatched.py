"""Gives each row a response that belongs to another row, for kto's reference point.

kto estimates how far the policy has moved from the reference on responses that do not belong to the prompt (losses/kto.py). The
mismatched response of a row is one of the next row's, and of the last row one of the first's. Rows that show the same video with
the same prompt are passed over. A row with several responses gives its chosen one to every second row and its rejected one to the
others, so that both kinds count alike.

The choice depends on the list of rows alone. A precomputed reference, a resumed run and any split of a step into micro-batches
therefore see the same mismatched responses.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace

from torch import Tensor

from synpo_fast.data.pair import Pair
from synpo_fast.errors import UserError


def with_mismatched(pairs: Sequence[Pair]) -> list[Pair]:
    """Returns the pairs with their `mismatched` response. Rows with loss "sft" get none.

    Raises UserError if all pairs show the same video with the same prompt.
    """
    contexts = [_context(pair) for pair in pairs]
    if pairs and len(set(contexts)) < 2:
        raise UserError(
            f"kto compares with responses to other prompts, but all {len(pairs)} rows have the same video and prompt: give it "
            "rows of several videos or prompts, or use loss_type=apo_zero_unpaired, which needs none"
        )
    result = []
    for place, (pair, other) in enumerate(zip(pairs, _next_with_other_context(contexts), strict=True)):
        given = [text for text in (pairs[other].chosen, pairs[other].rejected) if text]
        result.append(pair if pair.loss == "sft" else replace(pair, mismatched=given[place % len(given)]))
    return result


def _next_with_other_context(contexts: Sequence[Hashable]) -> list[int]:
    """For each place, the next place with another context; after the last place comes the first."""
    count = len(contexts)
    following = [0] * count
    for place in reversed(range(2 * count)):  # the second round knows what follows the last place
        after = (place + 1) % count
        here = place % count
        following[here] = after if contexts[after] != contexts[here] else following[after]
    return following


def _context(pair: Pair) -> Hashable:
    """The video and the prompt of a pair. Frames in memory count as different videos unless they are the same tensor."""
    video = id(pair.video) if isinstance(pair.video, Tensor) else str(pair.video)
    return video, pair.clips, pair.prompt
