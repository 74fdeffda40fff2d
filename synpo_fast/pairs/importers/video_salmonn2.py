"""Imports the two formats of video-SALMONN 2, which give the same role names different meanings.

    v1:    human = prompt, gpt = CHOSEN,       reject_gpt = rejected, gt = ground truth
    plus:  human = prompt, gpt = GROUND TRUTH, chosen = chosen,       reject = rejected

A row with gpt and none of the roles that only one format has fits both, and is refused by both. v1 may mark a row "ce_only": it
then trains on cross-entropy alone, with gt as the target if it exists and gpt otherwise, as in the code of v1. In v1,
"timestamps": [start, end] selects a clip of the video. In plus they are refused, since their meaning there is not known. Rows
with sound are refused until sound is supported.
"""

from synpo_fast.data.pair import Clip, Pair
from synpo_fast.pairs.importers.conversations import read_turns, split_system
from synpo_fast.pairs.importers.source_row import ImportOptions, Refused, SourceRow, clean_prompt, make_pair

V1_ONLY = {"reject_gpt", "gt", "history_gpt"}
PLUS_ONLY = {"chosen", "reject"}


def import_v1_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    roles, prompt = _roles_and_prompt(row, options)
    ce_only = row.get("ce_only") or False
    if not isinstance(ce_only, bool):
        raise Refused("ce_only is neither true nor false", f"{ce_only!r:.60}")
    if roles.keys() & PLUS_ONLY:
        raise Refused("roles of video-salmonn2-plus in a v1 row", ", ".join(sorted(roles.keys() & PLUS_ONLY)))
    if "history_gpt" in roles:
        raise Refused("the prompt is not one user turn")
    if "gpt" not in roles:
        raise Refused("no gpt (v1's chosen response)")
    if "reject_gpt" not in roles and "gt" not in roles and not ce_only:
        raise Refused("only human and gpt: fits both formats, where gpt means different things")
    fields = {"id": row.id(), "prompt": prompt, **_video_or_clip(row, options)}
    if ce_only:
        return [make_pair(**fields, chosen=roles.get("gt", roles["gpt"]), rejected="", loss="sft")]
    if "reject_gpt" not in roles:
        raise Refused("no reject_gpt")
    return [make_pair(**fields, chosen=roles["gpt"], rejected=roles["reject_gpt"], ground_truth=roles.get("gt"))]


def import_plus_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    roles, prompt = _roles_and_prompt(row, options)
    row.refuse("timestamps", because="they select a clip in v1, but their meaning in plus is not known")
    if roles.keys() & V1_ONLY or "ce_only" in row.content:
        marks = sorted((roles.keys() & V1_ONLY) | ({"ce_only"} & row.content.keys()))
        raise Refused("marks of video-salmonn2-v1 in a plus row", ", ".join(marks))
    if not roles.keys() & PLUS_ONLY:
        raise Refused("only human and gpt: fits both formats, where gpt means different things")
    missing = sorted(PLUS_ONLY - roles.keys())
    if missing:
        raise Refused(f"no {missing[0]}")
    fields = {"id": row.id(), "prompt": prompt, "video": options.video(row.get("video"))}
    return [make_pair(**fields, chosen=roles["chosen"], rejected=roles["reject"], ground_truth=roles.get("gpt"))]


def _roles_and_prompt(row: SourceRow, options: ImportOptions) -> tuple[dict[str, str], str]:
    """Returns the text of each role, and the prompt."""
    row.refuse("image", because="images are not supported")
    if not row.get("video"):
        raise Refused("no video")
    system, turns = split_system(read_turns(row, "conversations"), options)
    known = {"human", "gpt"} | V1_ONLY | PLUS_ONLY
    names = [turn.role for turn in turns]
    if set(names) - known:
        raise Refused("unknown role in the conversation", ", ".join(sorted(set(names) - known)))
    if names[:1] != ["human"] or names.count("human") != 1:
        raise Refused("the prompt is not one user turn", ", ".join(names))
    if len(set(names)) < len(names):
        raise Refused("a role is given twice", ", ".join(names))
    tags = ("<video>", "<image>")  # their loaders treat both as the video
    prompt = clean_prompt(turns[0].text, num_videos=1, tags=tags, system=system)
    return {turn.role: turn.text for turn in turns[1:]}, prompt


def _video_or_clip(row: SourceRow, options: ImportOptions) -> dict[str, object]:
    video, times = options.video(row.get("video")), row.get("timestamps")
    if times is None:
        return {"video": video}
    numbers = isinstance(times, list) and all(type(time) in (int, float) for time in times)
    if not numbers or len(times) != 2:
        raise Refused("timestamps are not [start, end]", f"{times!r:.60}")
    try:
        return {"clips": (Clip(video, float(times[0]), float(times[1])),)}
    except ValueError as error:
        raise Refused("timestamps are not [start, end]", str(error)) from error
