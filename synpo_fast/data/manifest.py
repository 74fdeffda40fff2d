"""Reads and writes manifests: one pair or one prompt with several responses per row, as JSON Lines, Parquet, or a folder of
Hugging Face datasets.

    {"id": "...", "video": "relative/path.mp4", "prompt": "...", "chosen": "...", "rejected": "...",
     "chosen_score": 12.1, "rejected_score": 6.4, "ground_truth": "...", "loss": "preference",
     "clips": [{"path": "...", "start": 0.0, "end": 9.5}], "audio": false, "meta": {...}}
    {"prompt": "...", "video": "...", "responses": [{"text": "...", "score": 12.1}, {"text": "...", "score": 6.4}, ...]}

prompt, chosen and rejected are required, except that a row with loss "sft" needs no rejected. `responses` may replace chosen and
rejected and their scores; data/comparisons.py chooses which of them are compared. One response with a label, true for a desirable
one, may replace them, too: {"prompt": "...", "completion": "...", "label": true}. A row has a video, or clips, or
neither, which makes it a text pair. Video paths are relative to a video root and may not leave it. This file checks only their
text, since the videos may be on another machine. Every row that cannot be right is an error that names file, line and reason,
because training would not notice a wrong pair.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from synpo_fast.data.format_hints import import_hint
from synpo_fast.data.pair import LABELS, Clip, Pair, Response
from synpo_fast.data.row_files import read_rows
from synpo_fast.errors import UserError

logger = logging.getLogger(__name__)

SHOWN_ROWS = 20
INSTEAD = ("chosen", "rejected", "chosen_score", "rejected_score")  # of a row without `responses` and `completion`
NO_SOUND = "sound is not read yet, and the pair would be used as if it were silent"


@dataclass(frozen=True)
class BadRow:
    """A row that is not a valid pair, with the reason."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class ManifestError(UserError):
    """Raised for a manifest with bad rows. `bad_rows` holds all of them; the message quotes the first 20."""

    def __init__(self, path: str | Path, bad_rows: list[BadRow], message: str = "") -> None:
        shown = [str(row) for row in bad_rows[:SHOWN_ROWS]]
        if len(bad_rows) > len(shown):
            shown.append(f"... and {len(bad_rows) - len(shown)} more")
        super().__init__("\n".join([message or f"{path}: {len(bad_rows)} bad rows", *shown]))
        self.path, self.bad_rows = str(path), bad_rows


def read_manifest(
    path: str | Path, *, on_bad: str = "raise", check: Callable[[Pair], None] | None = None
) -> list[Pair]:
    """Reads the pairs of a manifest, in its order.

    Args:
        path: JSON Lines, a JSON list, Parquet, or a folder of the datasets package; FOLDER:train names a split.
        on_bad: "raise" a ManifestError for bad rows, or "skip" them and log a warning for each.
        check: called with each pair; a ValueError that it raises makes the row a bad one.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad must be 'raise' or 'skip', got {on_bad!r}")
    pairs, bad_rows = read_manifest_rows(path, check)
    if bad_rows and (on_bad == "raise" or not pairs):
        raise ManifestError(path, bad_rows, f"{path}: {len(bad_rows)} of {len(pairs) + len(bad_rows)} rows are bad")
    for row in bad_rows:
        logger.warning("skipped %s", row)
    return pairs


def read_manifest_rows(
    path: str | Path, check: Callable[[Pair], None] | None = None
) -> tuple[list[Pair], list[BadRow]]:
    """Reads (pairs, bad rows) from a manifest. A bad row has file, line and reason. check: as in read_manifest.

    Raises ManifestError for a file that is not a manifest: an empty file, a damaged one, or an unknown format.
    """
    pairs: list[Pair] = []
    bad_rows: list[BadRow] = []
    first_use: dict[str, int] = {}
    if Path(path).suffix.lower() == ".csv":
        raise ManifestError(path, [], f"{path}: a manifest cannot be CSV; convert it with `synpo-fast pairs import`")
    try:
        for row in read_rows(path):
            try:
                if row.content is None:
                    raise ValueError(row.error)
                pair = pair_from_row(row.content, default_id=f"{Path(row.file).stem}-{row.line}")
                if pair.id in first_use:
                    raise ValueError(f"id {pair.id!r} is already used in line {first_use[pair.id]}")
                if check is not None:
                    check(pair)
            except ValueError as error:
                # Only the first bad row gets the hint.
                hint = import_hint(row.content) if row.content is not None and not bad_rows else ""
                bad_rows.append(BadRow(row.file, row.line, f"{error}{hint}"))
            else:
                first_use[pair.id] = row.line
                pairs.append(pair)
    except ValueError as error:
        raise ManifestError(path, [], str(error)) from error
    if not pairs and not bad_rows:
        raise ManifestError(path, [], f"{path} has no rows")
    return pairs, bad_rows


def pair_from_row(row: dict[str, Any], *, default_id: str = "") -> Pair:
    """Turns one row into a Pair. Raises ValueError with the reason. A null value counts as a missing key."""
    given = {key: value for key, value in row.items() if value is not None}
    for key in given:
        if key not in PARSERS:
            close = get_close_matches(key, PARSERS, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(PARSERS)}"
            raise ValueError(f"unknown key {key!r}{hint} (other data belongs under 'meta')")
    parsed = {key: PARSERS[key](key, value) for key, value in given.items()}
    values = {key: value for key, value in parsed.items() if value is not None}  # None: the key is checked but not read
    if "completion" in values or "label" in values:
        return _labelled_pair(values, default_id)
    if values.get("loss") in LABELS.values():
        raise ValueError(
            f"a row with loss {values['loss']!r} is written with completion and label, without chosen and rejected"
        )
    both = [key for key in INSTEAD if key in values] if "responses" in values else []
    if both:
        raise ValueError(f"a row with responses has no {both[0]}: leave out one of the two")
    required = {"prompt", "chosen", "rejected"}
    if "responses" in values:
        required = {"prompt"}
    elif values.get("loss") == "sft":
        required = {"prompt", "chosen"}
    missing = [key for key in PARSERS if key in required - values.keys()]
    if missing:
        raise ValueError(f"{' and '.join(repr(key) for key in missing)} missing")
    return Pair(**{"id": default_id, **values})


def _labelled_pair(values: dict[str, Any], default_id: str) -> Pair:
    """The pair of a row of one response with a label."""
    others = [key for key in (*INSTEAD, "responses", "loss") if key in values]
    if others:
        raise ValueError(f"a row with completion and label has no {others[0]}: leave out one of the two")
    missing = [key for key in ("prompt", "completion", "label") if key not in values]
    if missing:
        raise ValueError(f"{' and '.join(repr(key) for key in missing)} missing")
    completion, label = values.pop("completion"), values.pop("label")
    texts = {"chosen": completion if label else "", "rejected": "" if label else completion}
    return Pair(**{"id": default_id, **values, **texts, "loss": LABELS[label]})


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, got {value!r:.60}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} has half a surrogate pair at character {error.start + 1}") from error
    return value


def _id(key: str, value: object) -> str:
    if not _text(key, value).strip():
        raise ValueError("id is empty; leave it out, and it is made from file name and line")
    return str(value)


def _label(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true for a desirable completion or false, got {value!r:.60}")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be a number, got {value!r:.60}")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{key} is too large: a number of {len(str(value))} digits") from error
    if not math.isfinite(number):
        raise ValueError(f"{key} must be finite, got {value}")
    return number


def relative_path(key: str, value: object) -> str:
    """Checks that a path is relative and stays below its root, and returns it. Raises ValueError otherwise."""
    path = _text(key, value)
    if not path.strip() or "\0" in path:
        raise ValueError(f"{key} must be a path, got {path!r:.60}")
    if "://" in path:
        raise ValueError(f"{key} must be a file below the video root, got the address {path!r:.60}")
    parts = path.replace("\\", "/").split("/")  # a path that leaves the root on Windows is refused on every system
    if not parts[0] or (parts[0][1:2] == ":" and parts[0][0].isalpha()):
        raise ValueError(f"{key} must be relative to the video root, got {path!r:.60}")
    if ".." in parts:
        raise ValueError(f"{key} may not leave the video root, got {path!r:.60}")
    return path


def _clips(key: str, value: object) -> tuple[Clip, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list of at least one clip, got {value!r:.60}")
    return tuple(_clip(f"{key}[{index}]", part) for index, part in enumerate(value))


def _clip(key: str, value: object) -> Clip:
    if not isinstance(value, dict) or "path" not in value or not value.keys() <= {"path", "start", "end"}:
        raise ValueError(f"{key} must be an object with path and optionally start and end, got {value!r:.80}")
    times = {name: _number(f"{key}.{name}", value[name]) for name in ("start", "end") if value.get(name) is not None}
    return Clip(relative_path(f"{key}.path", value["path"]), **times)


def _responses(key: str, value: object) -> tuple[Response, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"{key} must be a list of at least two responses, got {value!r:.60}")
    return tuple(_response(f"{key}[{index}]", part) for index, part in enumerate(value))


def _response(key: str, value: object) -> Response:
    wanted = {"text", "score"}
    if not isinstance(value, dict) or any(value.get(name) is None for name in wanted) or value.keys() != wanted:
        raise ValueError(f"{key} must be an object with text and score and nothing else, got {value!r:.80}")
    return Response(_text(f"{key}.text", value["text"]), _number(f"{key}.score", value["score"]))


def _reference_clips(key: str, value: object) -> None:
    if value != []:  # a Parquet column may hold an empty list where other formats leave the key out
        raise ValueError(
            f"{key} is not read yet: a reference model would see every clip. Leave the key out to train so, got "
            f"{value!r:.60}"
        )


def _audio(key: str, value: object) -> None:
    """Refuses rows with sound: a caption about sound that the model does not get teaches it to invent sounds."""
    if value is not False:
        raise ValueError(f"{key} must be false: {NO_SOUND}, got {value!r:.60}")


def _meta(key: str, value: object) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, got {value!r:.60}")


PARSERS: dict[str, Callable[[str, object], Any]] = {
    "id": _id,
    "video": relative_path,
    "prompt": _text,
    "chosen": _text,
    "rejected": _text,
    "completion": _text,
    "label": _label,
    "chosen_score": _number,
    "rejected_score": _number,
    "ground_truth": _text,
    "responses": _responses,
    "clips": _clips,
    "reference_clips": _reference_clips,
    "audio": _audio,
    "loss": _text,
    "meta": _meta,
}


def row_from_pair(pair: Pair) -> dict[str, Any]:
    """The row from which pair_from_row makes the same pair. Raises ValueError for frames held in memory: they have no path."""
    if isinstance(pair.video, Tensor):
        raise ValueError(f"pair {pair.id!r} holds frames {list(pair.video.shape)}; a manifest names video files")
    row: dict[str, Any] = {"id": pair.id or None, "video": None if pair.video is None else Path(pair.video).as_posix()}
    row |= {"prompt": pair.prompt}
    if pair.has_label:
        row |= {"completion": pair.chosen or pair.rejected, "label": pair.loss == LABELS[True]}
    elif pair.responses:
        row |= {"responses": [{"text": each.text, "score": each.score} for each in pair.responses]}
    else:
        row |= {key: getattr(pair, key) for key in INSTEAD}
    row |= {"ground_truth": pair.ground_truth, "loss": "sft" if pair.loss == "sft" else None}
    clips = [{"path": clip.path, "start": clip.start, "end": clip.end} for clip in pair.clips]
    row["clips"] = [{name: value for name, value in clip.items() if value is not None} for clip in clips] or None
    return {key: value for key, value in row.items() if value is not None}


def write_manifest(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Writes JSON Lines: all rows or, after an error, none. Raises ValueError for a pair that could not be read back."""
    path, lines, seen = Path(path), [], set[str]()
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"a manifest is written as .jsonl, got {path}")
    for pair in pairs:
        row = row_from_pair(pair)
        pair_from_row(row)
        if pair.id and pair.id in seen:
            raise ValueError(f"id {pair.id!r} is used twice")
        seen.add(pair.id)
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    if not lines:
        raise ValueError(f"{path}: no pairs to write")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text("".join(lines), encoding="utf-8", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
