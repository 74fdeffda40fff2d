"""A few frames of a video as small pictures embedded in the page. For a missing or broken video the page says why."""

from __future__ import annotations

import base64
from fractions import Fraction
from html import escape
from pathlib import Path

from torch import Tensor

from synpo_fast.data.video.decode import open_video_file
from synpo_fast.data.video.sampling import uniform

NUM_FRAMES = 4
PICTURE_WIDTH, PICTURE_HEIGHT = 224, 224  # at most
DEADLINE_S = 10.0  # a report must not wait long for a broken file
QUALITY = 4  # MJPEG's scale: 2 is best, 31 worst


def frames_markup(video: str, root: Path | None) -> str:
    """Frames spread evenly over the video, as <img>, or a <p> with the reason if there are none. root: see decode_frames."""
    try:
        with open_video_file(video, root=root, deadline_s=DEADLINE_S) as opened:
            num_frames = opened.info.num_frames
            indices = uniform(num_frames, min(NUM_FRAMES, num_frames))
            frames, info = opened.frames(indices)
        pictures = [jpeg(frame) for frame in frames]
    except (ValueError, OSError, ImportError, MemoryError) as error:
        return f'<p class="note">No frames to show. {escape(str(error) or type(error).__name__)}</p>'
    return "".join(
        f'<img alt="frame {index + 1} of {info.num_frames}" title="{at:.2f} s" '
        f'src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}">'
        for index, at, picture in zip(indices, info.times, pictures, strict=True)
    )


def jpeg(frame: Tensor) -> bytes:
    """Encodes uint8 [H, W, 3] as JPEG, scaled down to fit PICTURE_WIDTH x PICTURE_HEIGHT."""
    import av

    height, width = frame.shape[:2]
    scale = min(1.0, PICTURE_WIDTH / width, PICTURE_HEIGHT / height)
    size = {"width": max(1, round(width * scale)), "height": max(1, round(height * scale))}
    picture = av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")
    picture = picture.reformat(**size, format="yuvj420p", interpolation="AREA")
    picture.pts = 0
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = size["width"], size["height"], "yuvj420p"
    encoder.time_base = Fraction(1)
    encoder.qmin = encoder.qmax = QUALITY
    return b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode(None)])
