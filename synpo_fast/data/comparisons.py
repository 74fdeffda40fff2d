"""Chooses which responses of a row are compared, and leaves out pairs whose scores are too close.

A row with K scored responses has up to K * (K - 1) / 2 comparisons. `pairs_from` names those that training sees:

    all          every two responses
    best_worst   the best against the worst, as SynPO's authors train
    best_rest    the best against each other response

Two responses with equal scores, or with scores closer than min_score_gap, are never compared. Responses that no comparison uses
are dropped here, so that the model does not run them. The result does not depend on the order in which the responses are given:
they are sorted by score, and equal scores by text.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations

from synpo_fast.data.pair import SCORE_SLACK, Pair, by_score

# For a number of responses, sorted from best to worst, the places that are compared.
PAIRS_FROM: dict[str, Callable[[int], Iterable[tuple[int, int]]]] = {
    "all": lambda num: combinations(range(num), 2),
    "best_worst": lambda num: [(0, num - 1)],
    "best_rest": lambda num: [(0, place) for place in range(1, num)],
}


def compare_responses(pair: Pair, pairs_from: str = "all", min_score_gap: float = 0.0) -> Pair | None:
    """The pair with the comparisons that `pairs_from` names and the responses that they use; None if none is left.

    Raises ValueError for an unknown pairs_from and for a pair without responses.
    """
    if pairs_from not in PAIRS_FROM:
        raise ValueError(f"pairs_from must be one of {', '.join(PAIRS_FROM)}, got {pairs_from!r}")
    if not pair.responses:
        raise ValueError(f"pair {pair.id!r} has no responses to compare")
    ordered = by_score(pair.responses)
    compared = [
        (better, worse)
        for better, worse in PAIRS_FROM[pairs_from](len(ordered))
        if _apart(ordered[better].score - ordered[worse].score, min_score_gap)
    ]
    used = sorted({place for both in compared for place in both})
    if not used:
        return None
    place_of = {place: index for index, place in enumerate(used)}
    return replace(
        pair,
        responses=tuple(ordered[place] for place in used),
        comparisons=tuple((place_of[better], place_of[worse]) for better, worse in compared),
    )


def _apart(gap: float, min_score_gap: float) -> bool:
    return gap > SCORE_SLACK and gap >= min_score_gap - SCORE_SLACK


@dataclass(frozen=True)
class ScoreGapFilter:
    """The result of filter_by_score_gap: the pairs kept, and the number dropped for each reason."""

    kept: list[Pair]
    below: int
    without_scores: int


def filter_by_score_gap(
    pairs: Iterable[Pair], min_score_gap: float | None, *, pairs_from: str | None = None
) -> ScoreGapFilter:
    """Keeps pairs with chosen_score - rejected_score >= min_score_gap (SynPO: 4), and all rows of one response.

    Args:
        min_score_gap: None keeps every pair except a row whose responses have equal scores. A gap that falls short by a
            rounding error still counts.
        pairs_from: the comparisons of a row with several responses (see above); a row without any is dropped. None keeps all
            responses of a row whose best and worst differ enough.
    """
    if min_score_gap is not None and not math.isfinite(min_score_gap):
        raise ValueError(f"min_score_gap must be finite, got {min_score_gap}")
    kept, below, without_scores = [], 0, 0
    for pair in pairs:
        if pair.responses:
            compared = compare_responses(pair, pairs_from or "best_worst", min_score_gap or 0.0)
            if compared is None:
                below += 1
            else:
                kept.append(pair if pairs_from is None else compared)
        elif pair.loss != "preference" or min_score_gap is None:
            kept.append(pair)
        elif pair.chosen_score is None or pair.rejected_score is None:
            without_scores += 1
        elif pair.chosen_score - pair.rejected_score < min_score_gap - SCORE_SLACK:
            below += 1
        else:
            kept.append(pair)
    return ScoreGapFilter(kept, below, without_scores)
