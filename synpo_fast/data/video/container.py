"""Opens an untrusted video file safely with PyAV, and turns FFmpeg's errors into VideoError.

FFmpeg tries only the container formats in FORMATS, and reads only the file itself. Otherwise it would follow a playlist to
other files and hosts. A picture larger than MAX_PIXELS is refused before memory is allocated for it. The deadline interrupts
reading. Decoding of a single packet cannot be interrupted, but its size is bounded.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from synpo_fast.data.video.mp4_boxes import lacks_index
from synpo_fast.data.video.video_info import VideoError

FORMATS = "mov,mp4,matroska,webm,avi,flv,mpegts,mpeg,asf,ogg,gif"
NO_INDEX = "; it is an MP4 without a complete index (moov), usually an incomplete download: download it again"
MAX_PIXELS = 2**26  # 8192 x 8192: 8K video has half as many


@contextmanager
def open_video(path: Path, deadline: float) -> Iterator[tuple[Any, Any]]:
    """Yields the open container and its first video stream that is no cover picture. Decodes with one thread."""
    import av
    from av.error import FFmpegError

    left = deadline - time.monotonic()
    if left <= 0:
        raise VideoError(path, "took too long")
    try:
        with av.open(
            str(path),
            timeout=(left, left),
            metadata_errors="replace",
            options={"max_pixels": str(MAX_PIXELS), "format_whitelist": FORMATS, "protocol_whitelist": "file"},
        ) as container:
            stream = _video_stream(path, container)
            yield container, stream
    except FFmpegError as error:
        reason = f"cannot be decoded: {error.strerror or type(error).__name__}"
        raise VideoError(path, f"{reason}{NO_INDEX if lacks_index(path) else ''}") from error


def _video_stream(path: Path, container: Any) -> Any:
    from av.stream import Disposition

    streams = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    if not streams:
        raise VideoError(path, "has no video stream")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise VideoError(path, "has a codec that this FFmpeg cannot decode")
    if context.width * context.height > MAX_PIXELS:
        raise VideoError(path, f"has frames of {context.width}x{context.height}, more than {MAX_PIXELS} pixels")
    context.thread_count = 1  # workers share the cores, so threads inside a decoder only add delay
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def codec_name(stream: Any) -> str:
    """The codec's canonical name, such as "av1", whichever library decodes it."""
    name = stream.codec_context.codec.canonical_name
    return str(name)


def check_deadline(path: Path, deadline: float, doing: str) -> None:
    if time.monotonic() > deadline:
        raise VideoError(path, f"took too long: the deadline passed while {doing}")
