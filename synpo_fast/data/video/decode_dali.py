"""Decodes frames with NVIDIA DALI: with NVDEC on a CUDA device, where the frames stay; VP8, VP9 and MJPEG on a CPU.

Each device has one pipeline for the whole process: building one per video would cost more than a short decode. The pipeline
takes the whole file from memory and a list of frames, and returns its own buffer through dlpack. There is no copy if each frame
is wanted once and in rising order. DALI gets each frame index once: given twice, it decodes the group of pictures twice.

This file adds or refuses what DALI does not support, so that frames equal those of the other backends:
- DALI always converts with the matrix of BT.601, whatever the video states. Both matrices are linear, so frames of BT.709 and
  BT.2020 are corrected afterwards: frame = frame @ correction. Only colours that BT.601 clipped remain wrong.
- DALI numbers packets, not frames. If a container holds a packet that is never shown, DALI would return other frames, and
  uninitialised memory for the last ones. So packets are counted, and a video with too many or too few is refused.
- DALI ignores the rotation and mirroring that the container states.
- A missing frame raises an error here (pad_mode "none"); by default DALI returns a grey one.

Limits. On a CPU, DALI assumes that chroma samples lie between the pixels, even if the file states otherwise. The PSNR of its
frames against the other backends is then 44 dB, and 67 dB for files that state nothing. DALI 2.4 does not seek here: it decodes
from the first frame to the last wanted one, so PyAV is better for few frames of a long video. DALI cannot be interrupted, so
the deadline is checked before it starts. It does not notice if pictures become smaller midway, and returns them damaged. The
CPU path is tested against PyAV. The CUDA path follows DALI's documentation and has not been run: on a GPU, first run
tests/data/video/test_decode_dali.py there.
"""

import functools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synpo_fast.data.video.container import check_deadline, open_video
from synpo_fast.data.video.orientation import upright_tensor
from synpo_fast.data.video.rgb import BT601, LUMA_WEIGHTS
from synpo_fast.data.video.video_info import CHOOSE_AUTO, BackendRefusal, VideoError, VideoInfo
from synpo_fast.errors import MissingPackage

CPU_CODECS = ("vp8", "vp9", "mjpeg")
CUDA_CODECS = (*CPU_CODECS, "h264", "hevc", "av1", "mpeg4")
# What NVDEC's 8-bit 4:2:0 surfaces can hold; on a CPU, DALI converts any format.
CUDA_PIXEL_FORMATS = ("yuv420p", "yuvj420p", "nv12")
ELSE = f"choose pyav or {CHOOSE_AUTO}"
# Frames are corrected in parts, which bounds the size of the float copy.
_CORRECTED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Decoder:
    pipeline: Any
    lock: Any


def decode(path: Path, info: VideoInfo, indices: Sequence[int], *, device: torch.device, deadline: float) -> Tensor:
    """Decodes the frames at `indices`, in their order: uint8 [T, H, W, 3] on `device`, upright.

    deadline: a time.monotonic(). Raises VideoError for a video that DALI cannot decode or decodes differently from what the
    container states, and ImportError if DALI is missing.
    """
    correction = _check_container(path, info, device, deadline)
    wanted, places = np.unique(np.asarray(indices, dtype=np.int32), return_inverse=True)
    frames = _run(path, wanted, device)
    if frames.shape[0] != len(wanted):
        raise VideoError(path, f"DALI returned {frames.shape[0]} of {len(wanted)} frames")
    if correction is not None:
        _correct_colours(frames, correction.to(device))
    frames = upright_tensor(frames, info.rotation, info.mirrored)
    if len(wanted) < len(places) or (np.diff(places) < 0).any():
        frames = frames[torch.from_numpy(places).to(device)]
    return frames.contiguous()


def _run(path: Path, wanted: np.ndarray, device: torch.device) -> Tensor:
    decoder = _decoder(_device_index(device), os.getpid())
    encoded = np.fromfile(path, dtype=np.uint8)
    with decoder.lock:
        decoder.pipeline.feed_input("encoded", [encoded])
        decoder.pipeline.feed_input("indices", [wanted])
        try:
            (output,) = decoder.pipeline.run()
        except RuntimeError as error:  # the pipeline remains usable, whatever the message says
            raise VideoError(path, f"DALI cannot decode it: {_reason(error)}") from error
    return torch.from_dlpack(output[0])


def _device_index(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _decoder(device_index: int | None, process: int) -> _Decoder:
    """The pipeline of a device; None is the CPU.

    A forked child builds its own pipeline. It must not free its parent's, because destroying threads that were not forked ends
    the process. So this cache never removes an entry.
    """
    try:
        from nvidia.dali import fn
        from nvidia.dali.pipeline import Pipeline
        from nvidia.dali.types import DALIDataType
    except ImportError as error:
        raise MissingPackage("the dali backend needs NVIDIA DALI: pip install 'synpo-fast[dali]'") from error
    # With exec_dynamic an output owns its memory, so it stays valid after the next run and without the pipeline.
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_index, prefetch_queue_depth=1, exec_dynamic=True)
    options = {"device": "cpu"} if device_index is None else {"device": "mixed", "affine": False}
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1, no_copy=True)
        indices = fn.external_source(name="indices", dtype=DALIDataType.INT32, ndim=1)
        pipeline.set_outputs(fn.decoders.video(encoded, frames=indices, pad_mode="none", **options))
    pipeline.build()
    return _Decoder(pipeline, threading.Lock())


def _check_container(path: Path, info: VideoInfo, device: torch.device, deadline: float) -> Tensor | None:
    """The colour correction that the video needs, or None. Raises BackendRefusal if DALI would return wrong frames or none."""
    known = CPU_CODECS if device.type == "cpu" else CUDA_CODECS
    if info.codec not in known:
        raise BackendRefusal(path, f"DALI decodes {', '.join(known)} on {device.type}, not {info.codec}; {ELSE}")
    with open_video(path, deadline) as (container, stream):
        matrix, pixels = int(stream.codec_context.colorspace), stream.codec_context.pix_fmt
        if container.streams.best("video").index != stream.index:
            raise BackendRefusal(path, f"has several video streams, and DALI decodes another than the first; {ELSE}")
        num_packets = sum(1 for packet in container.demux(stream) if packet.size)
    check_deadline(path, deadline, "its packets were counted")
    if num_packets != info.num_frames:
        raise BackendRefusal(
            path, f"has {num_packets} packets for {info.num_frames} frames, which DALI mixes up; {ELSE}"
        )
    if device.type != "cpu" and pixels not in CUDA_PIXEL_FORMATS:
        raise BackendRefusal(path, f"holds {pixels}; the dali backend supports only 8-bit 4:2:0 on a GPU; {ELSE}")
    weights = LUMA_WEIGHTS.get(matrix)
    if weights is None:
        raise BackendRefusal(
            path, f"has colours of FFmpeg's matrix {matrix}, which cannot be corrected after DALI; {ELSE}"
        )
    return None if weights == BT601 else colour_correction(weights)


def colour_correction(weights: tuple[float, float]) -> Tensor:
    """A [3, 3] float32 matrix for `frames @ correction`, which replaces a conversion with BT.601 by one with these weights.

    weights: of red and blue in luma. The matrix turns RGB into YCbCr by BT.601 and back by the other standard. Offsets and range
    are the same in both and cancel.
    """
    correction = np.linalg.inv(_rgb_from_ycbcr(*BT601)).T @ _rgb_from_ycbcr(*weights).T
    return torch.from_numpy(correction).float()


def _rgb_from_ycbcr(red: float, blue: float) -> np.ndarray:
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )


def _correct_colours(frames: Tensor, correction: Tensor) -> None:
    """Corrects frames [T, H, W, 3] in place."""
    step = max(1, _CORRECTED_BYTES // (4 * frames[0].numel()))
    for part in frames.split(step):
        part.copy_((part.float() @ correction).round_().clamp_(0, 255))


def _reason(error: RuntimeError) -> str:
    """The one relevant sentence of DALI's message, which also holds a trace of the pipeline's definition."""
    text = str(error).split("encountered:")[-1]
    lines = [line.strip() for line in text.splitlines()]
    relevant = [
        line for line in lines if line and not line.startswith(("C++ context", "Current pipeline", "Stacktrace"))
    ]
    return relevant[0][:300] if relevant else str(error)[:300]
