"""Detects a file that ends before the end that its container states: an incomplete download, which still opens and decodes.

MP4 and MOV have a table with the position of each frame: every frame behind the end of the file is missing. AVI states the
number of frames and the size of the file. Matroska, WebM, FLV and ASF state the duration of their longest stream, which is
compared with the last packet of any stream. Headers may round it, or leave out the duration of the last picture, so a second or
2 % may be missing there. MPEG streams, Ogg and GIF state nothing, and neither do recordings that were written as a stream: a cut
cannot be detected there. In fragmented MP4 a cut is detected inside a fragment, but not between two.
"""

import os
import struct
from pathlib import Path
from typing import Any

SLACK_S, SLACK_SHARE = 1.0, 0.02
STATES_DURATION = ("matroska,", "flv", "asf")


def missing_end(path: Path, container: Any, stream: Any, *, num_packets: int, ends: dict[int, int]) -> str:
    """Describes the missing part as the end of a message about the file; "" if nothing is missing or it cannot be known.

    The container must have been read to its end. num_packets: of the video stream. ends: by stream, the end of its last packet
    in its time base; for all streams if the container is listed in STATES_DURATION.
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
        return "is cut off inside a fragment; the number of lost frames is unknown" if _ends_inside_a_box(path) else ""
    size = path.stat().st_size
    ends = [entry.pos + entry.size for entry in stream.index_entries]
    there = sum(end <= size for end in ends)
    if there == len(ends):
        return ""
    return f"is cut off: {there} of its {len(ends)} frames are there{_share(there / len(ends))}"


def _ends_inside_a_box(path: Path) -> bool:
    """True if the last fragment, moof or mdat, is longer than the file. Data after the fragments may be anything."""
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            length, name, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\xff"))
            length = {0: size - at, 1: long_length}.get(length, length)
            if length < 8 or at + length > size:
                return name in (b"moof", b"mdat") and at + length > size
            at += length
    return at < size  # the rest is shorter than the header of a box


def _by_count(path: Path, stream: Any, num_packets: int) -> str:
    """Checks the stated file size, then the number of frames.

    The number alone is not enough: pictures dropped in a recording are counted but have no packet.
    """
    with path.open("rb") as file:
        stated = struct.unpack("<4xI", file.read(8))[0] + 8
    if stated <= os.path.getsize(path) or num_packets >= stream.frames:
        return ""
    return f"is cut off: {num_packets} of its {stream.frames} frames are there{_share(num_packets / stream.frames)}"


def _share(share: float) -> str:
    return f" ({share:.0%})"
