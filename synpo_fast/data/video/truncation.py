"""Whether a file ends before what its container states: a download that stopped, which still opens and decodes.

MP4 and MOV have a table of where each frame lies: frames behind the end of the file are missing, however few. AVI states how
many frames it has, and the size of the file. Matroska, WebM, FLV and ASF state a duration, of the longest of their streams,
which is held against the last packet of any stream. Headers may round, and leave out how long the last picture is shown, so
there a second or a fiftieth may be missing. MPEG streams, Ogg and GIF state nothing, nor do recordings that were written as a
stream: a cut cannot be seen there. Of fragmented MP4 it is seen where it lies inside a fragment, not between two.
"""

import os
import struct
from pathlib import Path
from typing import Any

SLACK_S, SLACK_SHARE = 1.0, 0.02
STATES_DURATION = ("matroska,", "flv", "asf")


def missing_end(path: Path, container: Any, stream: Any, *, num_packets: int, ends: dict[int, int]) -> str:
    """Names what is missing, as the end of a message about the file; "" where nothing is, or nobody can know.

    The container was read to its end: num_packets of the video stream. ends: by stream, when its last packet ends, in its
    time base; of all streams where the container is one that STATES_DURATION.
    """
    kind = container.format.name
    if kind.startswith("mov,"):
        return _by_table(path, stream)
    if kind == "avi":
        return _by_count(path, stream, num_packets)
    if kind.startswith(STATES_DURATION) and container.duration:
        stated = container.duration / 1_000_000  # AV_TIME_BASE
        last_end = max((float(end * container.streams[place].time_base) for place, end in ends.items()), default=0.0)
        if stated - last_end > max(SLACK_S, SLACK_SHARE * stated):
            return f"is cut off: {last_end:.1f} of the {stated:.1f} seconds that it states are there{_share(last_end / stated)}"
    return ""


def _by_table(path: Path, stream: Any) -> str:
    if not stream.frames:
        return "is cut off inside a fragment; how many follow is not stated" if _ends_inside_a_box(path) else ""
    size = path.stat().st_size
    ends = [entry.pos + entry.size for entry in stream.index_entries]
    there = sum(end <= size for end in ends)
    if there == len(ends):
        return ""
    return f"is cut off: {there} of its {len(ends)} frames are there{_share(there / len(ends))}"


def _ends_inside_a_box(path: Path) -> bool:
    """Whether the last fragment, moof or mdat, is longer than the file. What stands behind fragments may be anything."""
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            length, name, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\xff"))
            length = {0: size - at, 1: long_length}.get(length, length)
            if length < 8 or at + length > size:
                return name in (b"moof", b"mdat") and at + length > size
            at += length
    return at < size  # less than the header of a box


def _by_count(path: Path, stream: Any, num_packets: int) -> str:
    """The count alone would not do: pictures that are dropped in a recording count, and have no packet."""
    with path.open("rb") as file:
        stated = struct.unpack("<4xI", file.read(8))[0] + 8
    if stated <= os.path.getsize(path) or num_packets >= stream.frames:
        return ""
    return f"is cut off: {num_packets} of its {stream.frames} frames are there{_share(num_packets / stream.frames)}"


def _share(share: float) -> str:
    return f" ({share:.0%})"
