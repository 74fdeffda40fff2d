"""Recognises rows of other trainers' files by their keys, so that an error message can name the importer they need.

The result is only a hint. A format with the same keys as a manifest (LLaVA-Hound) is not recognised.
"""

from collections.abc import Callable
from typing import Any

LISTS_OF_ROWS = ("data", "rows", "train", "samples", "examples", "instances", "items")
Row = dict[str, Any]


def import_hint(row: Row) -> str:
    """The end of an error message that says how to import such a row; "" if the format is not recognised."""
    for key in LISTS_OF_ROWS:
        value = row.get(key)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = import_hint(value[0])
            return f"; the rows are a list under {key!r}: write that list alone into the file{inner}"
    name = next((name for name, fits in FORMATS.items() if fits(row)), None)
    return "" if name is None else f"; this looks like {name}: `synpo-fast pairs import --format {name}`"


def _has(*keys: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(key) is not None for key in keys)


def _is_trl(row: Row) -> bool:
    return all(
        isinstance(turns := row.get(key), list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
        for key in ("chosen", "rejected")
    )


def _is_trl_unpaired(row: Row) -> bool:
    turns = row.get("completion")
    return (
        _has("label")(row)
        and isinstance(turns, list)
        and bool(turns)
        and isinstance(turns[0], dict)
        and "role" in turns[0]
    )


def _has_roles(*roles: str) -> Callable[[Row], bool]:
    def fits(row: Row) -> bool:
        turns = row.get("conversations")
        found = {turn.get("from") for turn in turns if isinstance(turn, dict)} if isinstance(turns, list) else set()
        return found.issuperset(roles)

    return fits


FORMATS: dict[str, Callable[[Row], bool]] = {
    "trl": _is_trl,
    "trl-unpaired": _is_trl_unpaired,
    "ms-swift": lambda row: _has("messages")(row) and not {"rejected_response", "rejected_messages"}.isdisjoint(row),
    "llama-factory": lambda row: _has("conversations")(row) and isinstance(row.get("chosen"), (dict, list)),
    "video-salmonn2-v1": _has_roles("gpt", "reject_gpt"),
    "video-salmonn2-plus": _has_roles("chosen", "reject"),
    "synpo": _has("pos_pre", "neg_pre"),
    "longvpo": _has("task_type", "question", "chosen", "rejected"),
    "rrpo": _has("question", "answer", "pred"),
    "vistadpo": _has("prompt", "chosen", "rejected", "rejected_2"),
    "tpo": _has("prompt", "answer", "chosen", "rejected"),
}
