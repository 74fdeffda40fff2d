"""Conversations as the formats write them: {from, value} or {role, content}, content a text or a list of parts."""

from dataclasses import dataclass, replace
from typing import Any

from synpo_fast.data.importers.source_row import ImportOptions, Refused

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """role as written; videos: one entry for each part of type video, its path or None; system: what to fold in before it."""

    role: str
    text: str
    videos: tuple[Any, ...] = ()
    system: str = ""

    @property
    def speaker(self) -> str:
        """user, assistant or system, whichever way the format calls them."""
        if self.role not in ROLES:
            raise Refused("unknown role in the conversation", repr(self.role))
        return ROLES[self.role]


def read_turns(value: object, name: str) -> list[Turn]:
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise Refused(f"{name} is not a list of turns", f"{value!r:.60}")
    return [_turn(part, name) for part in value]


def _turn(turn: object, name: str) -> Turn:
    if not isinstance(turn, dict):
        raise Refused(f"{name} has a turn that is not an object", f"{turn!r:.60}")
    role_key, text_key = ("from", "value") if turn.get("from") is not None else ("role", "content")
    role, content = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str):
        raise Refused(f"{name} has a turn without a role", f"{turn!r:.60}")
    if turn.get("tool_calls"):
        raise Refused("the conversation calls tools")
    if isinstance(content, str):
        return Turn(role, content)
    if not isinstance(content, list):
        raise Refused(f"{name} has a turn without text", f"{turn!r:.60}")
    texts, videos = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "video":
            videos.append(next((part[key] for key in ("video", "path", "url") if part.get(key)), None))
        elif kind in ("image", "image_url"):
            raise Refused("images are not supported")
        else:
            raise Refused("unknown part in a turn", f"{part!r:.60}")
    return Turn(role, "".join(texts), tuple(videos))


def single_prompt(turns: list[Turn], options: ImportOptions) -> Turn:
    """The one user turn. More turns are refused: a pair has one prompt, and joining them would invent a chat template."""
    system, turns = split_system(turns, options)
    speakers = [turn.speaker for turn in turns]
    if speakers != ["user"]:
        raise Refused("the prompt is not one user turn", ", ".join(speakers) or "no turn")
    return replace(turns[0], system=system)


def split_system(turns: list[Turn], options: ImportOptions) -> tuple[str, list[Turn]]:
    """(what to fold into the prompt, the turns after a system message)."""
    if turns[:1] and turns[0].role == "system":
        if options.system == "refuse":
            raise Refused("has a system message: choose to fold or to drop it")
        return (turns[0].text.strip() if options.system == "fold" else ""), turns[1:]
    return "", turns


def single_answer(turns: list[Turn], name: str) -> str:
    if len(turns) != 1 or turns[0].speaker != "assistant":
        raise Refused(f"{name} is not one assistant turn", ", ".join(turn.role for turn in turns))
    if turns[0].videos:
        raise Refused(f"{name} holds a video")
    return turns[0].text
