"""The frames a pair shows: those it brings, some of its video, or some of each of its clips, one clip after another.

Clips are one video to the model. Its number of frames follows from the length of all of them and is shared out among them, at
least one each; its time runs on from clip to clip. A clip of another size than the first is scaled to fit into the first one's
frame, its aspect ratio kept, with black bars beside or above and below it.
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
    """(uint8 [T, H, W, 3], mean seconds between two frames).

    The seconds are None for frames that the pair brings, whose times nobody knows, and both are None for a text pair.
    deadline_s: for all of it. Raises VideoError for a video that can not be used, ValueError for more clips than frames.
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
            else:  # many open decoders would take more memory than the frames: each is opened again when it is its turn
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
    """A text about a whole video does not fit the part of it that a broken download left; a clip inside that part is as good."""
    if info.cut_off and (clip.end is None or clip.end > info.duration):
        raise VideoError(clip.path, f"{info.cut_off}; fetch it again, or name a part that is there as a clip")


def _seconds_per_frame(clips: tuple[Clip, ...], infos: list[VideoInfo], chosen: list[list[int]]) -> float:
    """Clips are played one after another; a single frame stands for all of its clip."""
    begin, times = 0.0, []
    for clip, info, indices in zip(clips, infos, chosen, strict=True):
        times += [begin + info.timestamps[index] - (clip.start or 0.0) for index in indices]
        begin += part_seconds(info, clip.start, clip.end)
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else begin


def _fitted(frames: Tensor, size: torch.Size) -> Tensor:
    """[T, h, w, 3] into the middle of black [T, *size, 3]."""
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
