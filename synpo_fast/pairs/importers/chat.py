"""Imports rows of LLaMA-Factory and ms-swift: a <video> tag in the text, and the paths in a list `videos`.

Both trainers replace the tags by the videos one by one, in place. A pair shows one video before its prompt, so a row may have
one video and at most one tag; more are refused. A row without videos becomes a text pair.
"""

from synpo_fast.data.pair import Pair
from synpo_fast.pairs.importers.conversations import Turn, read_turns, single_answer, single_prompt
from synpo_fast.pairs.importers.source_row import ImportOptions, Refused, SourceRow, clean_prompt, make_pair


def import_llama_factory_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    """Imports {conversations: [one user turn], chosen: turn, rejected: turn, videos: [path], system}."""
    row.refuse("images", because="only videos are supported")
    row.refuse("tools", because="tools are not supported")
    turns = read_turns(row, "conversations")
    if row.get("system"):
        turns = [Turn("system", row.text("system")), *turns]
    answers = {}
    for key in ("chosen", "rejected"):
        value = row.get(key)
        if value is None:
            raise Refused(f"no {key}")
        if not isinstance(value, (dict, list)):
            raise Refused(f"{key} is not a turn", f"{value!r:.60}")
        answers[key] = single_answer(read_turns(row, key), key)
    return [make_pair(id=row.id(), **_video_and_prompt(row, single_prompt(turns, options), options), **answers)]


def import_ms_swift_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    """Imports {messages: [user turn, chosen turn], rejected_response: text or rejected_messages: [user turn, turn], videos}."""
    row.refuse("images", "rejected_images", "rejected_audios", because="only videos are supported")
    row.refuse("tools", "rejected_tools", because="tools are not supported")
    turns = read_turns(row, "messages")
    given = [key for key in ("rejected_response", "rejected_messages") if row.get(key) is not None]
    if len(given) != 1:
        raise Refused("has both rejected_response and rejected_messages" if given else "no rejected_response")
    if given == ["rejected_response"]:
        rejected = row.text("rejected_response")
        row.refuse("rejected_videos", because="it may only be used with rejected_messages")
    else:
        rejected_turns = read_turns(row, "rejected_messages")
        if rejected_turns[:-1] != turns[:-1]:
            raise Refused("rejected_messages and messages have different prompts")
        if (row.get("rejected_videos") or row.get("videos")) != row.get("videos"):
            raise Refused("rejected_videos differ from videos")
        rejected = single_answer(rejected_turns[-1:], "rejected_messages")
    prompt = _video_and_prompt(row, single_prompt(turns[:-1], options), options)
    return [make_pair(id=row.id(), **prompt, chosen=single_answer(turns[-1:], "messages"), rejected=rejected)]


def _video_and_prompt(row: SourceRow, prompt: Turn, options: ImportOptions) -> dict[str, str | None]:
    videos = row.get("videos") or []
    num_videos = len(videos) if isinstance(videos, list) else 1
    text = clean_prompt(prompt.text, num_videos=num_videos, system=prompt.system)
    return {"prompt": text, "video": options.video(videos) if videos else None}
