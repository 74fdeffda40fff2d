"""Frames by NVIDIA DALI: NVDEC on a CUDA device, where the frames then stay; VP8, VP9 and MJPEG on a CPU.

One pipeline a device lives as long as the process: building one per video would cost more than a short decode. It takes the
whole file from memory and a list of frames, and hands its own buffer over through dlpack, without a copy where the frames
are wanted once each and in rising order. DALI is told each frame once: asked twice, it decodes the group of pictures twice.

What DALI leaves out is done or refused here, so that frames equal those of the other backends:
- DALI always converts with the matrix of BT.601, whatever the video says. Both matrices are linear, so frames of BT.709 and
  BT.2020 are put right afterwards, frame = frame @ correction; only colours that BT.601 had clipped stay off.
- DALI numbers packets, not frames. Where a container holds a packet that is never shown it would return other frames, and
  memory it never wrote for the last ones. So packets are counted, and a video with too many or too few is refused.
- DALI ignores how the container wants pictures turned or mirrored.
- A frame that is not there raises here (pad_mode "none"); DALI's default is to return a grey one.

Limits. On a CPU, DALI takes chroma samples to lie between the pixels, where a file says otherwise too: 44 dB from the
other backends then, 67 where it says nothing. DALI 2.4 does not seek here: it decodes from the first frame to the last
wanted one, so few frames of a long video are better taken by PyAV. It can not be stopped: the deadline is looked at
before it starts. It does not notice pictures that become smaller midway, and returns them damaged. The CPU path is tested
against PyAV. The CUDA path follows DALI's documentation and has not been run: on a GPU, first run
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
from synpo_fast.data.video.video_info import BackendRefusal, VideoError, VideoInfo
from synpo_fast.errors import MissingPackage

CPU_CODECS = ("vp8", "vp9", "mjpeg")
CUDA_CODECS = (*CPU_CODECS, "h264", "hevc", "av1", "mpeg4")
# What NVDEC's 8-bit 4:2:0 surfaces can hold; on a CPU, DALI converts any format.
CUDA_PIXEL_FORMATS = ("yuv420p", "yuvj420p", "nv12")
ELSE = "take backend='pyav'"
# Frames are corrected some at a time, which bounds the float copy.
_CORRECTED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Decoder:
    pipeline: Any
    lock: Any


def decode(path: Path, info: VideoInfo, indices: Sequence[int], *, device: torch.device, deadline: float) -> Tensor:
    """uint8 [T, H, W, 3] on `device`, upright, one for each of `indices` in their order.

    deadline: a time.monotonic(). Raises VideoError for what DALI can not decode or decodes otherwise than the container
    says, and ImportError where DALI is missing.
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
        except RuntimeError as error:  # the pipeline goes on working, whatever the message says
            raise VideoError(path, f"DALI can not decode it: {_reason(error)}") from error
    return torch.from_dlpack(output[0])


def _device_index(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _decoder(device_index: int | None, process: int) -> _Decoder:
    """The pipeline of a device; None is the CPU. A forked child builds its own, and must not drop its parent's: taking
    down threads that were not forked ends the process, so nothing leaves this cache."""
    try:
        from nvidia.dali import fn
        from nvidia.dali.pipeline import Pipeline
        from nvidia.dali.types import DALIDataType
    except ImportError as error:
        raise MissingPackage("the dali backend needs NVIDIA DALI: pip install 'synpo-fast[dali]'") from error
    # With exec_dynamic an output owns its memory: it outlives the next run, and the pipeline.
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_index, prefetch_queue_depth=1, exec_dynamic=True)
    options = {"device": "cpu"} if device_index is None else {"device": "mixed", "affine": False}
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1, no_copy=True)
        indices = fn.external_source(name="indices", dtype=DALIDataType.INT32, ndim=1)
        pipeline.set_outputs(fn.decoders.video(encoded, frames=indices, pad_mode="none", **options))
    pipeline.build()
    return _Decoder(pipeline, threading.Lock())


def _check_container(path: Path, info: VideoInfo, device: torch.device, deadline: float) -> Tensor | None:
    """The colour correction that the video needs; BackendRefusal where DALI would return wrong frames or none."""
    known = CPU_CODECS if device.type == "cpu" else CUDA_CODECS
    if info.codec not in known:
        raise BackendRefusal(path, f"DALI decodes {', '.join(known)} on {device.type}, not {info.codec}; {ELSE}")
    with open_video(path, deadline) as (container, stream):
        matrix, pixels = int(stream.codec_context.colorspace), stream.codec_context.pix_fmt
        if container.streams.best("video").index != stream.index:
            raise BackendRefusal(path, f"has several video streams, of which DALI takes another than the first; {ELSE}")
        num_packets = sum(1 for packet in container.demux(stream) if packet.size)
    check_deadline(path, deadline, "its packets were counted")
    if num_packets != info.num_frames:
        raise BackendRefusal(
            path, f"has {num_packets} packets for {info.num_frames} frames, which DALI mixes up; {ELSE}"
        )
    if device.type != "cpu" and pixels not in CUDA_PIXEL_FORMATS:
        raise BackendRefusal(path, f"holds {pixels}; the dali backend takes 8-bit 4:2:0 on a GPU; {ELSE}")
    weights = LUMA_WEIGHTS.get(matrix)
    if weights is None:
        raise BackendRefusal(
            path, f"has colours of FFmpeg's matrix {matrix}, which can not be put right after DALI; {ELSE}"
        )
    return None if weights == BT601 else colour_correction(weights)


def colour_correction(weights: tuple[float, float]) -> Tensor:
    """[3, 3] float32: frames @ it turns RGB that was converted with BT.601 into RGB of the matrix with these weights of
    red and blue. RGB -> YCbCr by BT.601 and back by the other one; offsets and range are the same in both and cancel."""
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
    """In place, on [T, H, W, 3]."""
    step = max(1, _CORRECTED_BYTES // (4 * frames[0].numel()))
    for part in frames.split(step):
        part.copy_((part.float() @ correction).round_().clamp_(0, 255))


def _reason(error: RuntimeError) -> str:
    """DALI's one sentence, out of a message with a trace of the pipeline's definition."""
    text = str(error).split("encountered:")[-1]
    lines = [line.strip() for line in text.splitlines()]
    told = [line for line in lines if line and not line.startswith(("C++ context", "Current pipeline", "Stacktrace"))]
    return told[0][:300] if told else str(error)[:300]
