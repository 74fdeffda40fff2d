"""Imports SynPO's rows: {idx, video_name, question, pos_pre, pos_score, neg_pre, neg_score, long_answers, ..., duration}.

pos_pre and neg_pre are the best and the worst of long_answers. The released scoring counts a judge's reply that could not be
parsed as 0. It starts its search for the best at 0 and for the worst at 100. So a score of 0 or 100 means that a caption was not
scored, and the row is refused. The prompt is the row's question; the authors' trainer shows one fixed instruction instead.
"""

from pathlib import PurePosixPath

from synpo_fast.data.pair import Pair
from synpo_fast.pairs.importers.source_row import (
    VIDEO_SUFFIXES,
    ImportOptions,
    Refused,
    SourceRow,
    clean_prompt,
    make_pair,
)


def import_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    chosen, rejected = row.text("pos_pre"), row.text("neg_pre")
    scores = {key: row.number(key) for key in ("pos_score", "neg_score")}
    for key, score in scores.items():
        if score is None:
            raise Refused(f"no {key}")
        if not 0 < score < 100:
            raise Refused(f"{key} means that the caption was not scored", str(score))
    name = row.text("video_name")
    if options.video_root is None and PurePosixPath(name).suffix.lower() not in VIDEO_SUFFIXES:
        raise Refused("video_name has no suffix: give the video root to find its file", name)
    return [
        make_pair(
            id=row.id("idx"),
            video=options.video(name),
            prompt=clean_prompt(row.text("question"), num_videos=1, tags=("<video>", "<image>")),
            chosen=chosen,
            rejected=rejected,
            chosen_score=scores["pos_score"],
            rejected_score=scores["neg_score"],
        )
    ]
