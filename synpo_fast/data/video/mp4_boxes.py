"""Reads the boxes of an MP4 or MOV file, to tell why it does not open."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

MAX_BOXES = 10_000  # more boxes than a file without an index has


def lacks_index(path: Path) -> bool:
    """True if the file begins as an MP4 and has no complete moov box: the index of its frames, often at the end of the file."""
    try:
        names = list(_box_names(path))
    except OSError:
        return False
    return names[:1] == [b"ftyp"] and b"moov" not in names and len(names) < MAX_BOXES


def _box_names(path: Path) -> Iterator[bytes]:
    """Yields the names of the complete boxes at the top level."""
    at, size = 0, os.path.getsize(path)
    with path.open("rb") as file:
        for _ in range(MAX_BOXES):
            if at + 8 > size:
                return
            file.seek(at)
            length, name, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            length = {0: size - at, 1: long_length}.get(length, length)
            if length < 8 or at + length > size:
                return
            yield name
            at += length
