"""Decodes frames with torchcodec, PyTorch's own decoder, and the system's FFmpeg.

With seek_mode "exact", torchcodec scans the file first, so that index i is frame i for variable frame rates too. Its number of
frames must equal the container's. It uses one thread, since several decoders run in parallel in workers. Frames are decoded
group by group into one tensor, and the deadline is checked between groups. torchcodec continues from its current position, so
sorted groups cost no seeks. torchcodec turns frames by the angle in its metadata, which does not include mirroring. If the
container states another orientation, it is corrected here. On a CUDA device torchcodec uses NVDEC if possible; we have not run
that.

torchcodec's wheels contain no FFmpeg, and those on PyPI from 0.14 on also need a CUDA build of torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synpo_fast.data.video.container import check_deadline, open_video
from synpo_fast.data.video.orientation import upright_tensor
from synpo_fast.data.video.video_info import VideoError, VideoInfo

GROUP = 16  # frames decoded between two checks of the deadline
NOT_LOADED = "Could not load libtorchcodec"
INSTALL_HINT = (
    "pip install torchcodec (on a CPU build of torch: 0.13, or PyTorch's own CPU wheel), and FFmpeg 4 to 8 as shared "
    "libraries, such as a system's ffmpeg package or conda's"
)


def decode(path: Path, info: VideoInfo, indices: Sequence[int], *, device: torch.device, deadline: float) -> Tensor:
    """Decodes the frames at `indices`, in their order: uint8 [T, H, W, 3] on `device`, upright.

    deadline: a time.monotonic(). Raises VideoError for a video that torchcodec cannot decode or finds another number of frames
    in, and ImportError if torchcodec or its FFmpeg is missing.
    """
    video_decoder = _video_decoder()
    with open_video(path, deadline) as (_, stream):
        stream_index = stream.index  # torchcodec's default is the best stream, which may be another one
    wanted = sorted(set(indices))
    frames = torch.empty(len(wanted), info.height, info.width, 3, dtype=torch.uint8, device=device)
    try:
        decoder = video_decoder(
            path,
            stream_index=stream_index,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            device=device,
            seek_mode="exact",
        )
        if len(decoder) != info.num_frames:
            raise VideoError(path, f"torchcodec counts {len(decoder)} frames where the container has {info.num_frames}")
        turned = round(getattr(decoder.metadata, "rotation", None) or 0) % 360  # versions before 0.11 turn nothing
        for start in range(0, len(wanted), GROUP):
            check_deadline(path, deadline, "torchcodec was decoding")
            group = decoder.get_frames_at(wanted[start : start + GROUP]).data
            if (turned, False) != (info.rotation, info.mirrored):
                group = upright_tensor(upright_tensor(group, -turned % 360, False), info.rotation, info.mirrored)
            if group.shape[1:] != frames.shape[1:]:
                raise VideoError(
                    path, f"torchcodec returned frames of {list(group.shape[1:])}, expected {list(frames.shape[1:])}"
                )
            frames[start : start + len(group)] = group
    except VideoError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:  # torchcodec has no error type of its own
        if NOT_LOADED in str(error):  # from 0.14 on torchcodec loads FFmpeg at its first use
            raise _missing(error) from error
        raise VideoError(path, f"torchcodec cannot decode it: {_reason(error)}") from error
    if list(indices) == wanted:
        return frames
    place = {index: at for at, index in enumerate(wanted)}
    return frames[torch.tensor([place[index] for index in indices], device=device)]


def _video_decoder() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:  # it raises the latter two if FFmpeg's libraries are missing
        raise _missing(error) from error
    return VideoDecoder


def _missing(error: Exception) -> ImportError:
    return ImportError(f"the torchcodec backend cannot be loaded ({_reason(error)}); {INSTALL_HINT}")


def _reason(error: Exception) -> str:
    """The first line of the message. The rest is a source location or a list of libraries that were tried."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(".cpp:")[-1].split(", ", 1)[-1][:300]
