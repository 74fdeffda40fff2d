"""Reads conversations of other formats: turns {from, value} or {role, content}, where content is a text or a list of parts.

A video part is {type: "video", video | path | url: ...}. Qwen's tools add video_start and video_end to it, in seconds, which
make a clip. All other keys in turns and parts (fps, max_pixels, loss, ...) are listed as not used.
"""

from dataclasses import dataclass, replace
from typing import Any

from synpo_fast.pairs.importers.source_row import ImportOptions, Refused, SourceRow

PATH_KEYS = ("video", "path", "url")
# Keys that may also select a part, in unknown units. If one were ignored, a clip's caption would belong to the whole video.
OTHER_SPANS = {
    "start",
    "end",
    "start_time",
    "end_time",
    "start_sec",
    "end_sec",
    "start_frame",
    "end_frame",
    "timestamps",
    "clip",
}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class VideoPart:
    """A video in a turn. path: None if the row names the video elsewhere. start, end: the part to show, in seconds."""

    path: Any = None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Turn:
    """One turn. role: as written in the row. videos: its parts of type video. system: a system message to put before the text."""

    role: str
    text: str
    videos: tuple[VideoPart, ...] = ()
    system: str = ""

    @property
    def speaker(self) -> str:
        """The role as user, assistant or system, whatever the format calls it."""
        if self.role not in ROLES:
            raise Refused("unknown role in the conversation", repr(self.role))
        return ROLES[self.role]


def read_turns(row: SourceRow, key: str, *, may_hold_videos: bool = False) -> list[Turn]:
    """Reads the turns under a key of the row. may_hold_videos: turns may name videos, as in TRL; otherwise only the row may."""
    value = row.get(key)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise Refused(f"{key} is not a list of turns", f"{value!r:.60}")
    turns = [_turn(part, key, row) for part in value]
    if not may_hold_videos and any(turn.videos for turn in turns):
        raise Refused("a video inside the turns; this format names it outside of them")
    return turns


def _turn(turn: object, name: str, row: SourceRow) -> Turn:
    if not isinstance(turn, dict):
        raise Refused(f"{name} has a turn that is not an object", f"{turn!r:.60}")
    role_key, text_key = ("from", "value") if turn.get("from") is not None else ("role", "content")
    role, content = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str):
        raise Refused(f"{name} has a turn without a role", f"{turn!r:.60}")
    if turn.get("tool_calls"):
        raise Refused("the conversation calls tools")
    row.leave(name, turn, role_key, text_key, "tool_calls")
    if isinstance(content, str):
        return Turn(role, content)
    if not isinstance(content, list):
        raise Refused(f"{name} has a turn without text", f"{turn!r:.60}")
    texts, videos = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            row.leave(f"{name}.{text_key}", part, "type", "text")
        elif kind == "video":
            videos.append(_video_part(part))
            row.leave(f"{name}.{text_key}", part, "type", "video_start", "video_end", *PATH_KEYS)
        elif kind in ("image", "image_url"):
            raise Refused("images are not supported")
        else:
            raise Refused("unknown part in a turn", f"{part!r:.60}")
    return Turn(role, "".join(texts), tuple(videos))


def _video_part(part: dict[str, Any]) -> VideoPart:
    paths = [part[key] for key in PATH_KEYS if part.get(key)]
    if any(path != paths[0] for path in paths):
        raise Refused("a part of type video names several videos", f"{part!r:.60}")
    unclear = sorted(key for key in OTHER_SPANS & part.keys() if part[key] is not None)
    if unclear:
        raise Refused("a video part is cut only by video_start and video_end, in seconds", ", ".join(unclear))
    times = [part.get(key) for key in ("video_start", "video_end")]
    if any(isinstance(at, bool) or not isinstance(at, (int, float, type(None))) for at in times):
        raise Refused("video_start and video_end are not seconds", f"{times!r:.60}")
    start, end = (None if at is None else float(at) for at in times)
    return VideoPart(paths[0] if paths else None, start, end)


def single_prompt(turns: list[Turn], options: ImportOptions) -> Turn:
    """Returns the only user turn. More turns are refused: a pair has one prompt, and joining turns would need a chat template."""
    system, turns = split_system(turns, options)
    speakers = [turn.speaker for turn in turns]
    if speakers != ["user"]:
        raise Refused("the prompt is not one user turn", ", ".join(speakers) or "no turn")
    return replace(turns[0], system=system)


def split_system(turns: list[Turn], options: ImportOptions) -> tuple[str, list[Turn]]:
    """Returns (system message to put before the prompt, the remaining turns)."""
    if turns[:1] and turns[0].role == "system":
        if options.system == "refuse":
            raise Refused("has a system message: choose --system fold or --system drop")
        return (turns[0].text.strip() if options.system == "fold" else ""), turns[1:]
    return "", turns


def single_answer(turns: list[Turn], name: str) -> str:
    if len(turns) != 1 or turns[0].speaker != "assistant":
        raise Refused(f"{name} is not one assistant turn", ", ".join(turn.role for turn in turns))
    if turns[0].videos:
        raise Refused(f"{name} holds a video")
    return turns[0].text
