"""Probes a video file: reads all packets to find its frames and the time at which each is shown.

Headers are not trusted: a header may state ten hours in a file with three frames. Reading every packet is exact and costs a
small part of decoding a few frames. The result has exactly the frames that decoding gives. A packet is a frame unless it is
empty, marked as outside the edit list, damaged, before the first keyframe, or a hidden reference picture of VP8 or VP9.
Presentation times give the order of the frames, including B-frames. The first packets are also decoded, until one frame is
complete. That frame gives the true size, the rotation and mirroring, and the place where the output begins.

If presentation times are missing or only estimated (AVI, MPEG program and transport streams, ASF), frames are identified by
counting: AVI has one packet per frame, and the other formats are decoded completely.
"""

import statistics
from bisect import bisect_left
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from synpo_fast.data.video.container import MAX_PIXELS, check_deadline, codec_name, open_video
from synpo_fast.data.video.orientation import frame_orientation
from synpo_fast.data.video.truncation import STATES_DURATION, missing_end
from synpo_fast.data.video.video_info import VideoError, VideoInfo

MAX_FRAMES = 2_000_000  # 18 hours at 30 a second
TIMED_FORMATS = ("mov,", "matroska,", "flv", "gif")
CHECK_EVERY = 256  # packets between two checks of the deadline


@dataclass
class _Packets:
    """The packets that one pass over a stream found, in the order of the file. keys: positions of keyframes."""

    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    first_frame: Any = None
    num_sent: int = 0  # all packets of the stream, also those that are no frame
    # The end of the last packet, by stream, in its time base; for all streams if the container states a duration.
    ends: dict[int, int] = field(default_factory=dict)


def probe_container(path: Path, container: Any, stream: Any, deadline: float) -> VideoInfo:
    """Probes a newly opened file and reads it to its end. Raises VideoError for no frames or more than MAX_FRAMES."""
    packets = _read_packets(path, container, stream, deadline)
    frame, codec = packets.first_frame, codec_name(stream)
    if frame is None:
        raise VideoError(path, f"has no frame that can be decoded in {len(packets.pts)} packets")
    if frame.width * frame.height > MAX_PIXELS:
        raise VideoError(path, f"has frames of {frame.width}x{frame.height}, more than {MAX_PIXELS} pixels")
    turned, mirrored = frame_orientation(path, frame)
    intra, kind = stream.codec_context.codec.intra_only, container.format.name
    time_base, rate = stream.time_base, stream.average_rate or stream.guessed_rate or Fraction(25)
    keyframes: tuple[int, ...] = ()
    by_order, last = False, 0
    shown = _in_order(packets.pts) if kind.startswith(TIMED_FORMATS) or intra else None
    if shown is not None and frame.pts in shown:
        del shown[: bisect_left(shown, frame.pts)]  # packets before the first decoded frame give no frame
        places = {pts: place for place, pts in enumerate(shown)}
        keyframes = tuple(sorted(places[pts] for key in packets.keys if (pts := packets.pts[key]) in places))
        last = packets.durations[packets.pts.index(shown[-1])]
    else:
        by_order = True
        shown = _in_order(packets.dts) if kind == "avi" else None
        if shown is None:
            shown, time_base = _count_by_decoding(path, deadline, time_base, rate)
    # As integers: arithmetic with Fractions takes as long as reading the file.
    unit, per = time_base.numerator, time_base.denominator
    times = tuple((pts - shown[0]) * unit / per for pts in shown)
    return VideoInfo(
        path=str(path),
        codec=codec,
        width=frame.width if turned % 180 == 0 else frame.height,
        height=frame.height if turned % 180 == 0 else frame.width,
        num_frames=len(shown),
        duration=times[-1] + _last_duration(times, float(last * time_base), rate),
        timestamps=times,
        keyframes=keyframes,
        rotation=turned,
        mirrored=mirrored,
        cut_off=missing_end(path, container, stream, num_packets=packets.num_sent, ends=packets.ends),
        first_pts=shown[0],
        time_base=time_base,
        by_order=by_order,
    )


def _read_packets(path: Path, container: Any, stream: Any, deadline: float) -> _Packets:
    found = _Packets()
    hidden = _HIDDEN.get(codec_name(stream))
    context = stream.codec_context
    with_others = container.format.name.startswith(STATES_DURATION)
    for count, packet in enumerate(container.demux() if with_others else container.demux(stream)):
        if count % CHECK_EVERY == 0:
            check_deadline(path, deadline, "its packets were read")
        if with_others and packet.size and packet.pts is not None:
            end, place = packet.pts + (packet.duration or 0), packet.stream_index
            found.ends[place] = max(found.ends.get(place, end), end)
        if packet.stream_index != stream.index:
            continue
        found.num_sent += packet.size > 0
        if found.num_sent > MAX_FRAMES:
            raise VideoError(path, f"has more than {MAX_FRAMES} packets")
        if found.first_frame is None:
            found.first_frame = next(iter(context.decode(packet)), None)
        if packet.size == 0 or packet.is_discard or packet.is_corrupt or (hidden is not None and hidden(packet)):
            continue
        if packet.is_keyframe:
            found.keys.append(len(found.pts))
        elif not found.keys:
            continue
        found.pts.append(packet.pts)
        found.dts.append(packet.dts)
        found.durations.append(packet.duration or 0)
    return found


def _in_order(stamps: list[int | None]) -> list[int] | None:
    """The time stamps in rising order; None if one is missing or occurs twice."""
    known = [stamp for stamp in stamps if stamp is not None]
    if not known or len(known) < len(stamps) or len(set(known)) < len(known):
        return None
    return sorted(known)


def _count_by_decoding(path: Path, deadline: float, time_base: Fraction, rate: Fraction) -> tuple[list[int], Fraction]:
    """Time stamps of all frames, found by decoding, and their unit; evenly spaced if the decoder gives none."""
    stamps: list[int | None] = []
    with open_video(path, deadline) as (container, stream):
        for frame in container.decode(stream):
            check_deadline(path, deadline, "its frames were counted")
            if len(stamps) >= MAX_FRAMES:
                raise VideoError(path, f"has more than {MAX_FRAMES} frames")
            stamps.append(frame.pts)
    known = _in_order(stamps)
    if known is not None and known == stamps:
        return known, time_base
    return list(range(len(stamps))), 1 / rate


def _last_duration(times: tuple[float, ...], stated: float, rate: Fraction) -> float:
    """The duration of the last frame in seconds: that of its packet, or else the median of the other frames."""
    if stated > 0:
        return stated
    if len(times) > 1:
        return statistics.median(after - before for before, after in pairwise(times))
    return float(1 / rate)


def _vp8_hidden(packet: Any) -> bool:
    return not memoryview(packet)[0] >> 4 & 1


def _vp9_hidden(packet: Any) -> bool:
    data = memoryview(packet)
    if data[-1] >> 5 == 0b110:  # several pictures in one packet; the last one is shown
        return False
    first = data[0] << 1 if data[0] >> 4 & 3 == 3 else data[0]  # profile 3 has one more bit
    show_existing, show = first >> 3 & 1, first >> 1 & 1
    return not (show_existing or show)


_HIDDEN = {"vp8": _vp8_hidden, "vp9": _vp9_hidden}
