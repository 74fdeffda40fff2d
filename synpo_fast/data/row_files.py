"""Reads rows with their file and line from JSON Lines, a JSON list, CSV, Parquet, or a folder of Hugging Face datasets.

A row that cannot be read becomes a FileRow with an error in place of content. So one bad line does not hide the next, and a
message can name file and line. Parquet and Arrow have no lines: there `line` counts rows from 1. They need pyarrow, but not the
datasets package.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synpo_fast.data.row_folders import named_split, split_files
from synpo_fast.errors import MissingPackage, UserError

BOM = b"\xef\xbb\xbf"
BATCH_ROWS = 1024
TEXT_SUFFIXES = (".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class FileRow:
    """One row and its origin. If content is None, error gives the reason."""

    file: str
    line: int
    content: dict[str, Any] | None
    error: str = ""


def read_rows(path: str | Path) -> Iterator[FileRow]:
    """Yields rows in the order of the file. path: a file, a folder, or FOLDER:SPLIT.

    Raises ValueError for a file that cannot be read at all, and FileNotFoundError for a missing one.
    """
    if named_split(path)[0].is_dir():
        files = files_with_rows(path)  # here, so that errors are raised before the first row
        return (row for file in files for row in _read_file(file))
    return _read_file(Path(path))


def files_with_rows(path: str | Path) -> list[Path]:
    """The files that read_rows reads. path: as there. Raises ValueError if a folder has several splits and none is named."""
    folder, split = named_split(path)
    return split_files(folder, split) if folder.is_dir() else [folder]


def _read_file(path: Path) -> Iterator[FileRow]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot tell its format by its name; expected {', '.join(READERS)} or a folder")
    if path.suffix.lower() in TEXT_SUFFIXES:
        _check_encoding(path)
    return reader(path)


def _check_encoding(path: Path) -> None:
    """Refuses UTF-16, which Windows programs write. Otherwise every line would be a bad row, without the reason."""
    with path.open("rb") as file:
        start = file.read(2)
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (len(start) == 2 and start.count(0) == 1):
        raise UserError(f"{path} is UTF-16 text: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 does it)")


def _read_json(path: Path) -> Iterator[FileRow]:
    """Reads JSON Lines or one list of objects. Both may be called .json, so the first character decides.

    If a .json file holds one object over several lines, that object is one row, and an error in it is reported once.
    """
    with path.open("rb") as file:
        for raw in file:
            start = raw.removeprefix(BOM).strip()
            if start.startswith(b"["):
                yield from _read_json_list(path)
                return
            if start:
                whole = _whole_object(path) if not _is_json(start) and path.suffix.lower() == ".json" else None
                yield from _read_json_lines(path) if whole is None else [FileRow(str(path), 1, whole)]
                return


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _whole_object(path: Path) -> dict[str, Any] | None:
    """The object that is the whole content of a file; None if the content is something else."""
    try:
        content = _loads(path.read_bytes().removeprefix(BOM).decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _read_json_lines(path: Path) -> Iterator[FileRow]:
    with path.open("rb") as file:  # as bytes: only "\n" ends a line, and bad UTF-8 spoils only its own line
        for line, raw in enumerate(file, 1):
            raw = (raw.removeprefix(BOM) if line == 1 else raw).strip()
            if raw:
                yield _json_row(path, line, raw)


def _json_row(path: Path, line: int, raw: bytes) -> FileRow:
    try:
        content = _loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return FileRow(str(path), line, None, f"not UTF-8: byte {error.start + 1} is {raw[error.start]:#04x}")
    except json.JSONDecodeError as error:
        return FileRow(str(path), line, None, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a key given twice, a number too long, nesting too deep
        return FileRow(str(path), line, None, f"not usable JSON: {error}")
    return _object_row(path, line, content)


def _object_row(path: Path, line: int, content: object) -> FileRow:
    if not isinstance(content, dict):
        return FileRow(str(path), line, None, f"a row must be a JSON object, got {type(content).__name__}")
    return FileRow(str(path), line, content)


def _read_json_list(path: Path) -> Iterator[FileRow]:
    raw = path.read_bytes().removeprefix(BOM)
    try:
        rows = _loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 in line {raw.count(10, 0, error.start) + 1}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not a JSON list: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not usable JSON: {error}") from error
    for line, content in enumerate(rows, 1):
        yield _object_row(path, line, content)


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return content


def _read_csv(path: Path) -> Iterator[FileRow]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for content in reader:
                if None in content or None in content.values():
                    yield FileRow(str(path), reader.line_num, None, "the number of cells differs from the header")
                else:
                    yield FileRow(str(path), reader.line_num, {name: cell for name, cell in content.items() if cell})
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not usable as CSV after line {reader.line_num}: {error}") from error


def _read_parquet(path: Path) -> Iterator[FileRow]:
    pyarrow = _pyarrow()
    from pyarrow import parquet

    try:
        yield from _batches(path, parquet.ParquetFile(path).iter_batches(batch_size=BATCH_ROWS))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Parquet: {error}") from error


def _read_arrow(path: Path) -> Iterator[FileRow]:
    """Reads an Arrow file: the stream format, which datasets writes, or the file format, with an index at the end."""
    pyarrow = _pyarrow()
    try:
        with pyarrow.memory_map(str(path)) as file:
            indexed = file.read(6) == b"ARROW1"
            file.seek(0)
            source = pyarrow.ipc.open_file(file) if indexed else pyarrow.ipc.open_stream(file)
            batches = (source.get_batch(i) for i in range(source.num_record_batches)) if indexed else source
            yield from _batches(path, batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Arrow: {error}") from error


def _batches(path: Path, batches: Any) -> Iterator[FileRow]:
    line = 0
    for batch in batches:
        for content in batch.to_pylist():
            line += 1
            yield FileRow(str(path), line, content)


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingPackage("reading Parquet and Arrow needs pyarrow: pip install pyarrow") from error
    return pyarrow


READERS: dict[str, Callable[[Path], Iterator[FileRow]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
