"""Damaged copies of good clips, decoded in processes of their own, so that a crash or a hang is seen and counted."""

import multiprocessing
import random
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from synpo_fast.testing.clips import write_clip

CLIPS = [
    ("h264", ".mp4", {"b_frames": 3, "keyframe_every": 8}),
    ("h264", ".mkv", {"b_frames": 2, "keyframe_every": 8, "audio": True}),
    ("h264", ".avi", {"b_frames": 2}),
    ("h264", ".ts", {"b_frames": 2}),
    ("hevc", ".mp4", {"b_frames": 3, "keyframe_every": 8}),
    ("hevc", ".mkv", {"pixel_format": "yuv420p10le"}),
    ("vp8", ".webm", {"keyframe_every": 8}),
    (
        "vp9",
        ".webm",
        {"keyframe_every": 8, "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}},
    ),
    ("vp9", ".mp4", {"rotation": 90}),
    ("av1", ".mp4", {"keyframe_every": 8}),
    ("av1", ".webm", {}),
    ("mjpeg", ".avi", {"audio": True}),
    ("mjpeg", ".mov", {}),
    ("mpeg4", ".avi", {"b_frames": 2}),
]
LIMIT_S = 20.0  # a decoder that has not answered by then hangs; decode_frames itself is told 5


@dataclass
class Outcome:
    """counts: how often which end was met. faults: what must not happen: (case, what)."""

    counts: Counter = field(default_factory=Counter)
    faults: list[tuple[str, str]] = field(default_factory=list)
    slowest_s: float = 0.0
    largest_mib: int = 0


def write_clips(folder: Path) -> list[Path]:
    return [
        write_clip(folder / f"{place}-{codec}{suffix}", codec=codec, num_frames=20, width=64, height=48, **options)
        for place, (codec, suffix, options) in enumerate(CLIPS)
    ]


def damage(content: bytes, seed: int) -> bytes:
    """Flips 1 to 64 bits: one time in two anywhere, else in the first or the last kilobyte, where headers live."""
    rng = random.Random(seed)
    broken = bytearray(content)
    size = len(broken)
    where = rng.choice([(0, size), (0, size), (0, min(1024, size)), (max(0, size - 1024), size)])
    for _ in range(2 ** rng.randrange(7)):
        broken[rng.randrange(*where)] ^= 1 << rng.randrange(8)
    if rng.random() < 0.1:
        del broken[rng.randrange(len(broken)) :]
    return bytes(broken)


def try_decode(file: Path, seed: int) -> str:
    """The outcome of decoding one file: "VideoError", "frames", or a description of the fault."""
    from synpo_fast.data.video.decode import decode_frames, open_video_file
    from synpo_fast.data.video.video_info import VideoError

    rng = random.Random(seed)
    try:
        with open_video_file(file, deadline_s=5) as video:
            info = video.info
            indices = [rng.randrange(info.num_frames) for _ in range(rng.randrange(1, 5))]
            if seed % 2:  # as the loader does it
                frames, _ = video.frames(indices)
        if seed % 2 == 0:
            frames, _ = decode_frames(file, indices=indices, info=info, deadline_s=5)
    except VideoError:
        return "VideoError"
    except BaseException:  # anything but a VideoError is what this looks for: it is reported with its traceback
        return traceback.format_exc()
    right = tuple(frames.shape) == (len(indices), info.height, info.width, 3) and str(frames.dtype) == "torch.uint8"
    return "frames" if right else f"frames of shape {list(frames.shape)} for {info}"


def work(connection, clips: Sequence[Path]) -> None:
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    contents = [clip.read_bytes() for clip in clips]
    with tempfile.TemporaryDirectory() as folder:
        while (seed := connection.recv()) is not None:
            clip = clips[seed % len(clips)]
            file = Path(folder) / f"damaged{clip.suffix}"
            file.write_bytes(damage(contents[seed % len(clips)], seed))
            connection.send((try_decode(file, seed), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))


def fuzz(clips: Sequence[Path], seeds: range, *, processes: int = 2) -> Outcome:
    """Decodes clip seed % len(clips) with the damage of that seed, for every seed."""
    outcome = Outcome()
    context = multiprocessing.get_context("spawn")
    todo = iter(seeds)
    busy: dict = {}  # connection -> (process, seed, since)

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, clips), daemon=True)
        process.start()
        theirs.close()
        give(ours, process)

    def give(connection, process) -> None:
        seed = next(todo, None)
        connection.send(seed)
        if seed is None:
            process.join()
        else:
            busy[connection] = (process, seed, time.monotonic())

    for _ in range(processes):
        start()
    while busy:
        ready = wait(list(busy), timeout=1.0)
        late = [
            one for one, (_, _, since) in busy.items() if one not in ready and time.monotonic() - since > LIMIT_S + 20
        ]
        for connection in [*ready, *late]:
            process, seed, since = busy.pop(connection)
            case = f"seed {seed} on {clips[seed % len(clips)].name}"
            try:
                if connection in late:
                    raise TimeoutError
                end, mib = connection.recv()
            except (EOFError, TimeoutError, ConnectionError) as error:
                process.kill()
                process.join()
                end = "hang" if isinstance(error, TimeoutError) else f"crash, exit code {process.exitcode}"
                outcome.counts[end.split(",")[0]] += 1
                outcome.faults.append((case, end))
                start()
                continue
            outcome.slowest_s = max(outcome.slowest_s, time.monotonic() - since)
            outcome.largest_mib = max(outcome.largest_mib, mib)
            known = end in ("VideoError", "frames")
            outcome.counts[end if known else "other"] += 1
            if not known:
                outcome.faults.append((case, end))
            give(connection, process)
    return outcome
