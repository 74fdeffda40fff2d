"""Reads a folder of images as a video, one image per frame, IMAGE_FPS frames per second.

Files are taken in natural order (2 before 10), without hidden ones. FFmpeg decodes each image as a stream of one frame. Every
image must have the size of the first; this is checked when the image is decoded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synpo_fast.data.video.container import MAX_PIXELS, check_deadline
from synpo_fast.data.video.rgb import RgbWriter
from synpo_fast.data.video.video_info import VideoError, VideoInfo
from synpo_fast.data.video.video_path import image_files

IMAGE_FPS = 1.0  # frame folders of public data sets are sampled at or near this rate, and do not state it
MAX_IMAGE_BYTES = 2**28
SIGNATURES = {b"\xff\xd8": "mjpeg", b"\x89PNG": "png", b"RIFF": "webp"}  # suffixes of downloaded images are often wrong


def probe_images(folder: Path) -> VideoInfo:
    """Probes the folder and reads the first image for its size. Raises VideoError if that is no image."""
    files = image_files(folder)
    height, width, _ = _read_image(files[0], {}).shape
    return VideoInfo(
        path=str(folder),
        codec="images",
        width=width,
        height=height,
        num_frames=len(files),
        duration=len(files) / IMAGE_FPS,
        timestamps=tuple(index / IMAGE_FPS for index in range(len(files))),
        keyframes=tuple(range(len(files))),
    )


def decode(path: Path, info: VideoInfo, indices: Sequence[int], *, device: torch.device, deadline: float) -> Tensor:
    """Decodes the images at indices, on the CPU whatever the device. The contract is in synpo_fast/data/video/decode.py."""
    files = image_files(path)
    if len(files) != info.num_frames:
        raise VideoError(path, f"had {info.num_frames} images, now it has {len(files)}")
    out = torch.empty((len(indices), info.height, info.width, 3), dtype=torch.uint8)
    pixels = out.numpy()
    done: dict[int, int] = {}
    writers: dict[str, RgbWriter] = {}  # by decoder: the chroma positions depend on it
    for place, index in enumerate(indices):
        check_deadline(path, deadline, f"image {index} was read")
        if index in done:
            pixels[place] = pixels[done[index]]
            continue
        image = _read_image(files[index], writers)
        if image.shape != pixels.shape[1:]:
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise VideoError(files[index], f"is {size}, the first image of its folder is {info.width}x{info.height}")
        pixels[place] = image
        done[index] = place
    return out


def _read_image(file: Path, writers: dict[str, RgbWriter]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Reads an image as [H, W, 3], as stored: an orientation in EXIF data is not applied."""
    import av
    from av.error import FFmpegError

    if not file.is_file():
        raise VideoError(file, "is not a file")
    size = file.stat().st_size
    if not 0 < size <= MAX_IMAGE_BYTES:
        raise VideoError(file, f"has {size} bytes; an image has 1 to {MAX_IMAGE_BYTES}")
    content = file.read_bytes()
    decoder = next((name for start, name in SIGNATURES.items() if content.startswith(start)), None)
    if decoder is None:
        raise VideoError(file, "is neither JPEG, PNG nor WebP")
    context: Any = av.CodecContext.create(decoder, "r")
    context.thread_count = 1
    # Without "explode" half a JPEG is accepted as a whole one.
    context.options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
    try:
        frames = context.decode(av.Packet(content)) + context.decode(None)
    except FFmpegError as error:
        raise VideoError(file, f"cannot be decoded: {error.strerror}") from error
    if not frames or frames[0].is_corrupt:
        raise VideoError(file, "is damaged")
    image = np.empty((frames[0].height, frames[0].width, 3), np.uint8)
    writers.setdefault(decoder, RgbWriter()).write(frames[0], image)
    return image
