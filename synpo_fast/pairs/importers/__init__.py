"""Imports pairs from the formats of other trainers and data sets. docs/manifest.md shows a row of each format.

An importer turns one row into pairs, or refuses it with a reason. It never guesses: if a role or field could mean two things,
the row is refused. A format is detected only if exactly one importer accepts all of the first rows.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from synpo_fast.data.manifest import NO_SOUND, BadRow, pair_from_row, row_from_pair
from synpo_fast.data.pair import Pair
from synpo_fast.data.row_files import FileRow, read_rows
from synpo_fast.pairs.importers import chat, flat, synpo, trl, video_salmonn2
from synpo_fast.pairs.importers.source_row import ImportOptions, Refused, SourceRow

__all__ = ["IMPORTERS", "ImportOptions", "ImportResult", "Refused", "detect_format", "import_pairs"]

Importer = Callable[[SourceRow, ImportOptions], list[Pair]]
DETECTION_ROWS = 50


def import_manifest_row(row: SourceRow, options: ImportOptions) -> list[Pair]:
    """Imports rows of a manifest: to filter them, to check that their videos exist, or to turn Parquet into JSON Lines."""
    row.used.update(row.content.keys() - {"meta"})
    try:
        pair = pair_from_row(row.content)
    except ValueError as error:
        raise Refused("not a row of a manifest", str(error)) from error
    clips = tuple(replace(clip, path=options.video(clip.path)) for clip in pair.clips)
    return [replace(pair, video=None if pair.video is None else options.video(pair.video), clips=clips)]


IMPORTERS: dict[str, Importer] = {
    "synpo": synpo.import_row,
    "longvpo": flat.import_longvpo_row,
    "video-salmonn2-v1": video_salmonn2.import_v1_row,
    "video-salmonn2-plus": video_salmonn2.import_plus_row,
    "trl": trl.import_row,
    "trl-unpaired": trl.import_unpaired_row,
    "llama-factory": chat.import_llama_factory_row,
    "ms-swift": chat.import_ms_swift_row,
    "llava-hound": flat.import_llava_hound_row,
    "vistadpo": flat.import_vistadpo_row,
    "tpo": flat.import_tpo_row,
    "rrpo": flat.import_rrpo_row,
    "manifest": import_manifest_row,
}


@dataclass
class ImportResult:
    """The imported pairs, the refused rows and the number for each reason, and the number of rows with each unused key."""

    pairs: list[Pair] = field(default_factory=list)
    num_rows: int = 0
    refused: list[BadRow] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    unused_keys: Counter[str] = field(default_factory=Counter)


def import_pairs(path: str | Path, format: str, options: ImportOptions | None = None) -> ImportResult:
    """Imports all rows of a file or folder. Raises ValueError for an unknown format or an unreadable file.

    format: a key of IMPORTERS, or "auto". A pair keeps its row's id; a repeated id gets "#row" appended. A row without id gets
    one from file name and row number.
    """
    options = options or ImportOptions()
    name = detect_format(path, options) if format == "auto" else format
    if name not in IMPORTERS:
        raise ValueError(f"unknown format {format!r}; known formats are auto, {', '.join(IMPORTERS)}")
    result, used_ids = ImportResult(), set[str]()
    for row in read_rows(path):
        result.num_rows += 1
        source = SourceRow(row.content or {})
        try:
            pairs = _import_row(row, source, IMPORTERS[name], options)
        except Refused as error:
            result.refused.append(BadRow(row.file, row.line, str(error)))
            result.reasons[error.reason] += 1
            continue
        result.unused_keys.update(source.unused)
        for pair in pairs:
            pair_id = _unused_id(pair.id, row, used_ids)
            used_ids.add(pair_id)
            result.pairs.append(replace(pair, id=pair_id))
    return result


def _import_row(row: FileRow, source: SourceRow, importer: Importer, options: ImportOptions) -> list[Pair]:
    if row.content is None:
        raise Refused("not a readable row", row.error)
    if importer is not import_manifest_row:  # that importer has its own message
        source.refuse("audio", "audios", "use_audio", because=NO_SOUND)
    pairs = importer(source, options)
    for pair in pairs:
        try:
            pair_from_row(row_from_pair(pair))  # raises what a manifest cannot hold
        except ValueError as error:
            raise Refused("cannot be written to a manifest", str(error)) from error
    return pairs


def _unused_id(wanted: str, row: FileRow, used: set[str]) -> str:
    name = wanted or f"{Path(row.file).stem}-{row.line}"
    candidates = [name, f"{name}#{row.line}"]
    number = 2
    while candidates[-1] in used:
        candidates.append(f"{name}#{row.line}.{number}")
        number += 1
    return next(candidate for candidate in candidates if candidate not in used)


def detect_format(path: str | Path, options: ImportOptions | None = None) -> str:
    """The only importer that accepts all of the first rows. Raises ValueError with the candidates if several or none do."""
    options = options or ImportOptions()
    rows = [row for row in islice(read_rows(path), DETECTION_ROWS) if row.content is not None]
    if not rows:
        raise ValueError(f"{path} has no readable rows, so its format cannot be detected")
    fits, closest = [], (0, "", "")
    for name, importer in IMPORTERS.items():
        taken, why = 0, ""
        for row in rows:
            try:
                _import_row(row, SourceRow(row.content or {}), importer, options)
                taken += 1
            except Refused as error:
                why = why or f"{row.file}:{row.line}: {error}"
        if taken == len(rows):
            fits.append(name)
        closest = max(closest, (taken, name, why))
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ValueError(f"{path} fits several formats: {', '.join(fits)}; give the right one with --format")
    hint = f"; {closest[1]} accepts {closest[0]} of {len(rows)} rows, but not {closest[2]}" if closest[0] else ""
    raise ValueError(f"{path} fits no format: give one with --format to see why rows are refused{hint}")
