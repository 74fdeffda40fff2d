"""Imports TRL's preference rows: prompt, chosen and rejected, each a text ("standard") or messages ("conversational"); and its
unpaired preference rows: prompt, completion and a label, which is true for a desirable completion.

Without a prompt, chosen and rejected are whole conversations that share all but their last turn. A video is a content part
{"type": "video"} of the user turn. Its path is in the part, or in a column video or videos. video_start and video_end in the
part make a clip. Standard rows are text pairs.
"""

from typing import Any

from synpo_fast.data.pair import LABELS, Clip, Pair
from synpo_fast.pairs.importers.conversations import Turn, read_turns, single_answer, single_prompt
from synpo_fast.pairs.importers.source_row import ImportOptions, Refused, SourceRow, clean_prompt, make_pair


def import_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    _refuse_what_is_not_supported(row)
    scores = {"chosen_score": row.number("score_chosen"), "rejected_score": row.number("score_rejected")}
    values = [row.get(key) for key in ("prompt", "chosen", "rejected")]
    if any(isinstance(value, str) for value in values):
        prompt = _text_prompt(row)
        chosen, rejected = row.text("chosen"), row.text("rejected")
        return [make_pair(id=row.id(), prompt=prompt, chosen=chosen, rejected=rejected, **scores)]
    for key, value in zip(("chosen", "rejected"), values[1:], strict=True):
        if value is None:
            raise Refused(f"no {key}")
    chosen_turns, rejected_turns = (read_turns(row, key, may_hold_videos=True) for key in ("chosen", "rejected"))
    if values[0] is None:
        prompt_turns = chosen_turns[:-1]
        if prompt_turns != rejected_turns[:-1] or not prompt_turns:
            raise Refused("no prompt, and chosen and rejected do not start with the same messages")
        chosen_turns, rejected_turns = chosen_turns[-1:], rejected_turns[-1:]
    else:
        prompt_turns = read_turns(row, "prompt", may_hold_videos=True)
    turn = single_prompt(prompt_turns, options)
    return [
        make_pair(
            id=row.id(),
            **_shown(turn, _video(turn, row), options),
            prompt=clean_prompt(turn.text, num_videos=0, system=turn.system),
            chosen=single_answer(chosen_turns, "chosen"),
            rejected=single_answer(rejected_turns, "rejected"),
            **scores,
        )
    ]


def import_unpaired_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    _refuse_what_is_not_supported(row)
    row.refuse("chosen", "rejected", because="it belongs to pairs, use --format trl")
    label, values = row.get("label"), [row.get(key) for key in ("prompt", "completion")]
    if not isinstance(label, bool):
        raise Refused("label is neither true nor false", f"{label!r:.60}")
    for key, value in zip(("prompt", "completion"), values, strict=True):
        if value is None:
            raise Refused(f"no {key}")
    fields: dict[str, Any] = {"id": row.id()}
    if any(isinstance(value, str) for value in values):
        fields["prompt"], completion = _text_prompt(row), row.text("completion")
    else:
        turn = single_prompt(read_turns(row, "prompt", may_hold_videos=True), options)
        completion = single_answer(read_turns(row, "completion", may_hold_videos=True), "completion")
        fields |= _shown(turn, _video(turn, row), options)
        fields["prompt"] = clean_prompt(turn.text, num_videos=0, system=turn.system)
    texts = {"chosen": completion, "rejected": ""} if label else {"chosen": "", "rejected": completion}
    return [make_pair(**fields, **texts, loss=LABELS[label])]


def _refuse_what_is_not_supported(row: SourceRow) -> None:
    row.refuse("images", "image", because="images are not supported")
    row.refuse("tools", because="tools are not supported")
    row.refuse("clips", because="it belongs to rows of a manifest")


def _text_prompt(row: SourceRow) -> str:
    """The prompt of a standard row."""
    row.refuse("video", "videos", because="a standard row of TRL is text; use messages for a video")
    return clean_prompt(row.text("prompt"), num_videos=0)


def _shown(turn: Turn, video: Any, options: ImportOptions) -> dict[str, Any]:
    """The pair's video or clip, as arguments of make_pair."""
    if video is None:
        return {}
    part, path = turn.videos[0], options.video(video)
    if part.start is None and part.end is None:
        return {"video": path}
    try:
        return {"clips": (Clip(path, part.start, part.end),)}
    except ValueError as error:
        raise Refused("video_start and video_end are not a valid part of a video", str(error)) from error


def _video(turn: Turn, row: SourceRow) -> Any:
    """The path of the only video; None for a text pair."""
    columns = [value for key in ("video", "videos") if (value := row.get(key))]
    if len(columns) > 1:
        raise Refused("has both video and videos")
    column = (
        columns[0][0] if columns and isinstance(columns[0], list) and len(columns[0]) == 1 else (columns or [None])[0]
    )
    if not turn.videos:
        if column is not None:
            raise Refused('a video without a part {"type": "video"} in the prompt')
        return None
    if len(turn.videos) > 1:
        raise Refused("several videos in a row: a pair shows only one")
    part = turn.videos[0].path
    if part is None and column is None:
        raise Refused('a part {"type": "video"} without a path')
    if part is not None and column is not None and part != column:
        raise Refused("the part and the column name different videos", f"{part!r:.60} and {column!r:.60}")
    return column if part is None else part
