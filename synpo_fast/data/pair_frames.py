"""Gets the frames of a pair: frames given in memory, sampled from its video, or sampled from each of its clips.

The model sees the clips as one video. Its number of frames follows from the total length of the clips and is divided among
them, at least one frame each; the time continues from clip to clip. A clip whose size differs from the first clip's is scaled
to fit into the first clip's frame. It keeps its aspect ratio and gets black bars at the sides, or above and below.
"""

import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from synpo_fast.data.pair import Clip, Pair
from synpo_fast.data.video.decode import DEADLINE_S, open_video_file
from synpo_fast.data.video.sampling import FrameSampling, part_seconds
from synpo_fast.data.video.video_info import VideoError, VideoInfo


def pair_frames(
    pair: Pair,
    sampling: FrameSampling,
    *,
    video_root: str | Path | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
    deadline_s: float = DEADLINE_S,
) -> tuple[Tensor | None, float | None]:
    """Returns (uint8 [T, H, W, 3], mean seconds between two frames).

    The seconds are None for frames given in memory, whose times are unknown. Both values are None for a text pair.
    deadline_s: the limit for the whole call. Raises VideoError for a video that cannot be used, and ValueError for more clips
    than frames.
    """
    if isinstance(pair.video, Tensor):
        return pair.video, None
    clips = pair.clips if pair.video is None else (Clip(str(pair.video)),)
    if not clips:
        return None, None
    deadline = time.monotonic() + deadline_s
    paths = list(dict.fromkeys(clip.path for clip in clips))
    with ExitStack() as files:
        videos = {}
        for path in paths:
            file = open_video_file(path, root=video_root, deadline_s=deadline - time.monotonic())
            if len(paths) == 1:
                videos[path] = files.enter_context(file)
            else:  # many open decoders would take more memory than the frames: each file is opened again to decode it
                with file as video:
                    videos[path] = video
        infos = [videos[clip.path].info for clip in clips]
        for clip, info in zip(clips, infos, strict=True):
            _check_whole(clip, info)
        chosen = sampling.clip_indices([(info, clip.start, clip.end) for info, clip in zip(infos, clips, strict=True)])
        decoded = [
            videos[clip.path].frames(indices, backend=backend, device=device)[0]
            for clip, indices in zip(clips, chosen, strict=True)
        ]
    size = decoded[0].shape[1:3]
    frames = decoded[0] if len(decoded) == 1 else torch.cat([_fitted(part, size) for part in decoded])
    return frames, _seconds_per_frame(clips, infos, chosen)


def _check_whole(clip: Clip, info: VideoInfo) -> None:
    """Raises VideoError if a truncated file lacks a part of the clip: a text about a whole video would not fit the rest of it."""
    if info.cut_off and (clip.end is None or clip.end > info.duration):
        raise VideoError(clip.path, f"{info.cut_off}; download it again, or give a clip inside the part that is there")


def _seconds_per_frame(clips: tuple[Clip, ...], infos: list[VideoInfo], chosen: list[list[int]]) -> float:
    """The mean time between two frames, with clips played one after another; for a single frame, the total length."""
    begin, times = 0.0, []
    for clip, info, indices in zip(clips, infos, chosen, strict=True):
        times += [begin + info.timestamps[index] - (clip.start or 0.0) for index in indices]
        begin += part_seconds(info, clip.start, clip.end)
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else begin


def _fitted(frames: Tensor, size: torch.Size) -> Tensor:
    """Scales frames [T, h, w, 3] into the middle of black frames [T, *size, 3]."""
    if frames.shape[1:3] == size:
        return frames
    scale = min(size[0] / frames.shape[1], size[1] / frames.shape[2])
    height, width = (max(1, min(full, round(scale * side))) for full, side in zip(size, frames.shape[1:3], strict=True))
    scaled = F.interpolate(
        frames.permute(0, 3, 1, 2).float(), (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    fitted = frames.new_zeros((len(frames), *size, 3))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    fitted[:, top : top + height, left : left + width] = scaled.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return fitted
