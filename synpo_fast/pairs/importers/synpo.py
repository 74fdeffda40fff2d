"""Imports SynPO's rows: {idx, video_name, question, pos_pre, pos_score, neg_pre, neg_score, long_answers, ..., duration}.

pos_pre and neg_pre are the best and the worst of long_answers. The released scoring counts a judge's reply that could not be
parsed as 0. It starts its search for the best at 0 and for the worst at 100. So a score of 0 or 100 means that a caption was not
scored, and the row is refused. The prompt is the row's question; the authors' trainer shows one fixed instruction instead.

With the option responses="all" every scored caption of long_answers is kept. Its score is

    1.1 * hallu_scores[i] + harmo_scores[i] + consi_scores[i]        factuality, fluency, consistency

A caption with a 0 or without a number in one of the three lists is left out, because 0 may mean that the judge's reply was not
read. A caption that occurs several times is kept once, with the mean of its scores. The best score must be pos_score.
"""

from pathlib import PurePosixPath
from statistics import fmean

from synpo_fast.data.pair import Pair, Response
from synpo_fast.pairs.importers.source_row import (
    VIDEO_SUFFIXES,
    ImportOptions,
    Refused,
    SourceRow,
    clean_prompt,
    make_pair,
)

WEIGHTS = {"hallu_scores": 1.1, "harmo_scores": 1.0, "consi_scores": 1.0}
ROUNDING = 0.01  # a stored score may be rounded to two decimals


def import_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    captions = _responses(row) if options.responses == "all" else _best_and_worst(row)
    name = row.text("video_name")
    if options.video_root is None and PurePosixPath(name).suffix.lower() not in VIDEO_SUFFIXES:
        raise Refused("video_name has no suffix: give the video root to find its file", name)
    return [
        make_pair(
            id=row.id("idx"),
            video=options.video(name),
            prompt=clean_prompt(row.text("question"), num_videos=1, tags=("<video>", "<image>")),
            **captions,
        )
    ]


def _best_and_worst(row: SourceRow) -> dict[str, object]:
    """The fields of a pair."""
    chosen, rejected = row.text("pos_pre"), row.text("neg_pre")
    scores = {name: _score(row, key) for name, key in (("chosen_score", "pos_score"), ("rejected_score", "neg_score"))}
    return {"chosen": chosen, "rejected": rejected, **scores}


def _score(row: SourceRow, key: str) -> float:
    score = row.number(key)
    if score is None:
        raise Refused(f"no {key}")
    if not 0 < score < 100:
        raise Refused(f"{key} means that the caption was not scored", str(score))
    return score


def _responses(row: SourceRow) -> dict[str, object]:
    """The field of a row with several responses."""
    best, best_score = row.text("pos_pre"), _score(row, "pos_score")
    row.get("neg_pre"), row.get("neg_score")  # one of long_answers
    texts = row.get("long_answers")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refused("long_answers is not a list of texts", f"{texts!r:.60}")
    parts = {key: row.numbers(key, len(texts)) for key in WEIGHTS}
    scores: dict[str, list[float]] = {}
    for place, text in enumerate(texts):
        own = {key: values[place] for key, values in parts.items()}
        if not text.strip() or not all(own.values()):  # a part is None or 0
            row.left.add("long_answers without a score")
            continue
        scores.setdefault(text, []).append(sum(WEIGHTS[key] * (value or 0.0) for key, value in own.items()))
    if len(scores) < 2:
        raise Refused("fewer than two of long_answers were scored", f"{len(scores)} of {len(texts)}")
    if abs(max(scores.get(best, [0.0])) - best_score) > ROUNDING:
        raise Refused("pos_score is not the score of pos_pre in long_answers", f"{best_score:g}")
    return {"responses": tuple(Response(text, round(fmean(values), 9)) for text, values in scores.items())}
