"""Imports data sets with a video, a question and answers in plain fields: LongVPO, LLaVA-Hound, VistaDPO, TPO, RRPO.

They differ in the names of the fields. A field that belongs to another of these formats means that the format is wrong.
"""

import re

from synpo_fast.data.pair import Pair
from synpo_fast.pairs.importers.conversations import read_turns, single_answer, single_prompt
from synpo_fast.pairs.importers.source_row import ImportOptions, Refused, SourceRow, clean_prompt, make_pair

TAGS = ("<video>", "<image>")  # their loaders replace either tag with the frames


def import_longvpo_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    """Imports stage 2: {video, task_type, question, chosen, rejected}. How stage 1 stores its composites is not published."""
    row.text("task_type")
    return [_pair(row, options, prompt=row.text("question"), chosen=row.text("chosen"), rejected=row.text("rejected"))]


def import_llava_hound_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    """Imports {id, video, prompt, chosen, rejected, chosen_score, rejected_score}; video is a folder of frames or a file.

    The prompt may instead be one human turn in conversations, and the answers may be turns.
    """
    _refuse_foreign(row, "rejected_2", "task_type", "question")
    if row.get("conversations") is not None:
        turn = single_prompt(read_turns(row, "conversations"), options)
        prompt, system = turn.text, turn.system
        if row.get("prompt") not in (None, prompt):
            raise Refused("prompt and conversations differ")
    else:
        prompt, system = row.text("prompt"), ""
    answers = {}
    for key in ("chosen", "rejected"):
        value = row.get(key)
        answers[key] = single_answer(read_turns(row, key), key) if isinstance(value, (dict, list)) else row.text(key)
    return [_pair(row, options, prompt=prompt, system=system, **answers)]


def import_vistadpo_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    """Imports {id, video, prompt, chosen, rejected, rejected_2, ...}. Clips, frames and boxes of other levels are not used."""
    row.text("rejected_2")
    prompt, chosen = row.text("prompt"), row.text("chosen")
    others = sorted((key for key in row.content if re.fullmatch(r"rejected_[0-9]+", key)), key=lambda key: int(key[9:]))
    keys = ["rejected", *others] if options.rejected == "all" else ["rejected"]
    return [_pair(row, options, prompt=prompt, chosen=chosen, rejected=row.text(key)) for key in keys]


def import_tpo_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    """Imports {prompt, answer, chosen, rejected, video}. Its authors do not document answer, so it is not used."""
    _refuse_foreign(row, "rejected_2", "task_type", "question")
    row.text("answer")
    return [_pair(row, options, prompt=row.text("prompt"), chosen=row.text("chosen"), rejected=row.text("rejected"))]


def import_rrpo_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    """Imports {question, answer: chosen, pred: rejected, video, sample_id, src}. The masked copies of answers are not used."""
    _refuse_foreign(row, "chosen", "rejected")
    row.get("answer_masked"), row.get("pred_masked")
    chosen, rejected = row.text("answer"), row.text("pred")
    if "<MASK>" in chosen or "<MASK>" in rejected:
        raise Refused("<MASK> tags in answer or pred: they belong in answer_masked and pred_masked")
    return [_pair(row, options, id_key="sample_id", prompt=row.text("question"), chosen=chosen, rejected=rejected)]


def _pair(
    row: SourceRow,
    options: ImportOptions,
    *,
    prompt: str,
    chosen: str,
    rejected: str,
    system: str = "",
    id_key: str = "id",
) -> Pair:
    if row.get("video") is None:
        raise Refused("no video")
    return make_pair(
        id=row.id(id_key),
        video=options.video(row.get("video")),
        prompt=clean_prompt(prompt, num_videos=1, tags=TAGS, system=system),
        chosen=chosen,
        rejected=rejected,
        chosen_score=row.number("chosen_score"),
        rejected_score=row.number("rejected_score"),
    )


def _refuse_foreign(row: SourceRow, *keys: str) -> None:
    for key in keys:
        if key in row.content:
            raise Refused(f"has {key}, which this format does not have")
