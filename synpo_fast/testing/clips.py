"""Writes test videos in which every frame carries its own number, so that a decoder can be checked frame by frame.

The number is in the upper part of the picture as 3 rows of 8 black and white blocks: 20 bits of the index, high bit first, and
4 check bits. Blocks are at least 8 pixels wide, so they survive lossy compression and halved chroma. A texture moves below them,
so that codecs have motion to encode. With a rotation, the stored picture is turned and the container states the turn back, so
that the shown picture is upright.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BARCODE_ROWS, BARCODE_COLUMNS, INDEX_BITS = 3, 8, 20
ENCODERS = {
    "h264": "libx264",
    "hevc": "libx265",
    "vp8": "libvpx",
    "vp9": "libvpx-vp9",
    "av1": "libsvtav1",
    "mjpeg": "mjpeg",
    "mpeg4": "mpeg4",
}
PIXEL_FORMATS = {"mjpeg": "yuvj420p"}
AUDIO_CODECS = {".webm": "libopus", ".mp4": "aac", ".mov": "aac", ".mkv": "libopus", ".avi": "pcm_s16le", ".ts": "aac"}
# Exact for 24, 25, 30 and 29.97 frames per second, and nearly as fine as MPEG-4 allows.
TIME_BASE = Fraction(1, 60_000)


def block_size(width: int, height: int) -> int:
    """The side of a barcode block in pixels. The barcode fills the upper half of a small picture, or a corner of a large one."""
    size = min(width // BARCODE_COLUMNS, height // (2 * BARCODE_ROWS), 16)
    if size < 8:
        raise ValueError(f"a barcode needs 64x48 pixels or more, got {width}x{height}")
    return size


def barcode_bits(index: int) -> list[int]:
    if not 0 <= index < 1 << INDEX_BITS:
        raise ValueError(f"a barcode holds indices below {1 << INDEX_BITS}, got {index}")
    word = index << 4 | _check(index)
    return [word >> shift & 1 for shift in reversed(range(INDEX_BITS + 4))]


def _check(index: int) -> int:
    nibbles = [index >> shift & 15 for shift in range(0, INDEX_BITS, 4)]
    # + 5, so that a black picture is no valid number.
    return (sum((place + 1) * nibble for place, nibble in enumerate(nibbles)) + 5) & 15


def draw_frame(index: int, width: int, height: int, *, moving: bool = True) -> NDArray[np.uint8]:
    """The upright picture [H, W, 3] of frame `index`: its number as blocks, over a moving texture or plain grey."""
    if moving:
        frame = np.roll(_texture(width, height), (index, 3 * index), axis=(0, 1)).copy()
    else:
        frame = np.full((height, width, 3), 96, np.uint8)
    size = block_size(width, height)
    bits = np.array(barcode_bits(index), np.uint8).reshape(BARCODE_ROWS, BARCODE_COLUMNS) * 255
    frame[: BARCODE_ROWS * size, : BARCODE_COLUMNS * size] = bits.repeat(size, 0).repeat(size, 1)[..., None]
    return frame


def read_barcode(frame: NDArray[np.uint8]) -> int:
    """The index in the barcode of a decoded frame [H, W, 3]. Raises ValueError if its check bits do not fit."""
    pixels = np.asarray(frame)
    size = block_size(pixels.shape[1], pixels.shape[0])
    blocks = pixels[: BARCODE_ROWS * size, : BARCODE_COLUMNS * size].astype(np.float32).mean(-1)
    blocks = blocks.reshape(BARCODE_ROWS, size, BARCODE_COLUMNS, size)[:, 2 : size - 2, :, 2 : size - 2].mean((1, 3))
    word = int("".join("1" if level > 128 else "0" for level in blocks.flatten()), 2)
    index, check = word >> 4, word & 15
    if check != _check(index):
        raise ValueError(f"no valid barcode: index {index} with check {check}, expected {_check(index)}")
    return index


def write_clip(
    path: str | Path,
    *,
    codec: str,
    num_frames: int,
    width: int = 320,
    height: int = 240,
    fps: int | Fraction = 25,
    keyframe_every: int | None = None,
    b_frames: int = 0,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    mirrored: bool = False,
    audio: bool = False,
    pixel: str = "moving",
    pixel_format: str | None = None,
    quality: int | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes a clip and returns its path. The suffix selects the container: .mp4, .mov, .mkv, .webm or .avi.

    Args:
        codec: "h264", "hevc", "vp8", "vp9", "av1", "mjpeg" or "mpeg4".
        width, height: of the upright picture, at least 64x48.
        keyframe_every: frames between keyframes; None leaves it to the encoder.
        b_frames: the most B-frames between two other frames; for h264, hevc and mpeg4.
        times: seconds at which the frames are shown, rising, for a variable frame rate (not in .avi).
        rotation: degrees counter-clockwise by which a player has to turn the picture: 0, 90, 180 or 270 (.mp4, .mov, .mkv).
        mirrored: a player has to mirror the stored picture left to right before turning it (.mp4, .mov).
        audio: add a sound track with a tone.
        pixel: "moving" for a moving texture, or "barcode" for a plain grey picture, which compresses to almost nothing.
        pixel_format: None means 4:2:0, or 4:4:4 for odd sizes with h264, hevc and av1, whose encoders refuse 4:2:0 there.
        quality: the encoder's CRF.
        options: options of the encoder, which override all others.
    """
    import av

    path = Path(path)
    if codec not in ENCODERS:
        raise ValueError(f"codec must be one of {sorted(ENCODERS)}, got {codec!r}")
    if pixel not in ("moving", "barcode") or rotation not in (0, 90, 180, 270):
        raise ValueError(
            f"pixel must be moving or barcode and rotation 0, 90, 180 or 270, got {pixel!r} and {rotation}"
        )
    if times is not None and (len(times) != num_frames or path.suffix == ".avi"):
        raise ValueError(
            f"{len(times)} times for {num_frames} frames in {path.suffix}: need one time per frame, and not .avi"
        )
    b_frames = min(b_frames, num_frames - 1)  # with too few frames x265 writes an uninitialised decoding time
    stored = (width, height) if rotation % 180 == 0 else (height, width)
    odd = codec in ("h264", "hevc", "av1") and (width % 2 or height % 2)
    with _scheduling_kept(), av.open(str(path), "w") as container:
        stream: Any = container.add_stream(ENCODERS[codec], rate=fps)
        stream.width, stream.height = stored
        stream.pix_fmt = pixel_format or PIXEL_FORMATS.get(codec, "yuv444p" if odd else "yuv420p")
        if times is not None:
            stream.codec_context.time_base = TIME_BASE
        if keyframe_every is not None:
            stream.gop_size = keyframe_every
        if codec in ("h264", "hevc", "mpeg4"):
            stream.max_b_frames = b_frames
        stream.codec_context.thread_count = 1
        stream.options = _encoder_options(codec, keyframe_every, b_frames, quality) | (options or {})
        if rotation or mirrored:
            stream.set_display_matrix(display_matrix(rotation, mirrored))
        sound = container.add_stream(AUDIO_CODECS[path.suffix], rate=48_000) if audio else None
        for index in range(num_frames):
            picture = draw_frame(index, width, height, moving=pixel == "moving")
            picture = np.rot90(picture, -rotation // 90)
            picture = np.ascontiguousarray(picture[:, ::-1] if mirrored else picture)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[index] / TIME_BASE), TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _write_tone(container, sound, float(num_frames / fps if times is None else times[-1]))
    return path


@contextmanager
def _scheduling_kept() -> Iterator[None]:
    """Restores the scheduling of this process after encoding.

    If root runs it, SVT-AV1 makes the encoding process a real-time one. All processes started later would inherit that and keep
    other processes from the CPU.
    """
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


def display_matrix(rotation: int, mirrored: bool) -> list[int]:
    """The matrix with which a container states mirroring left to right, if `mirrored`, and then a counter-clockwise turn."""
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}[rotation]
    a, b = (-a, -b) if mirrored else (a, b)
    return [65536 * a, 65536 * b, 0, 65536 * c, 65536 * d, 0, 0, 0, 2**30]


def write_sound(path: str | Path, seconds: float = 1.0) -> Path:
    """Writes a file with a tone and no picture, and returns its path."""
    import av

    path = Path(path)
    with av.open(str(path), "w") as container:
        _write_tone(container, container.add_stream(AUDIO_CODECS[path.suffix], rate=48_000), seconds)
    return path


def _write_tone(container: Any, stream: Any, seconds: float) -> None:
    import av

    samples = (8000 * np.sin(np.arange(960) * (2 * np.pi * 440 / 48_000))).astype(np.int16)
    for block in range(max(1, round(seconds * 50))):
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 960 * block, Fraction(1, 48_000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _encoder_options(codec: str, keyframe_every: int | None, b_frames: int, quality: int | None) -> dict[str, str]:
    gop = keyframe_every
    crf = {} if quality is None else {"crf": str(quality)}
    if codec == "h264":
        keys = {} if gop is None else {"x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0"}
        return {"preset": "veryfast", **keys, **crf}
    if codec == "hevc":
        x265 = "" if gop is None else f":keyint={gop}:min-keyint={gop}:scenecut=0"
        return {"preset": "ultrafast", "x265-params": f"log-level=none:bframes={b_frames}{x265}:pools=none", **crf}
    if codec in ("vp8", "vp9"):
        closest = {} if gop is None else {"keyint_min": str(gop)}
        rate = {"b": "0"} if crf and codec == "vp9" else {"b": "2M"}
        return {"deadline": "realtime", "cpu-used": "8", **rate, **closest, **crf}
    if codec == "av1":
        return {"preset": "6", "svtav1-params": "lp=1", "crf": str(quality or 20)}  # faster presets lose whole blocks
    return {"qscale": str(quality or 3)}


@functools.cache
def _texture(width: int, height: int) -> NDArray[np.uint8]:
    """Smooth coloured noise, the same in every clip of a size."""
    coarse = np.random.default_rng(0).integers(40, 216, (height // 16 + 2, width // 16 + 2, 3)).astype(np.float32)
    rows, columns = np.arange(height) / 16, np.arange(width) / 16
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]
    upper = coarse[top][:, left] * (1 - right) + coarse[top][:, left + 1] * right
    lower = coarse[top + 1][:, left] * (1 - right) + coarse[top + 1][:, left + 1] * right
    return (upper * (1 - down) + lower * down).astype(np.uint8)
