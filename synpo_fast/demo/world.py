"""The demo's videos: groups of coloured shapes move across the picture, one group after another.

An event is one group that crosses the picture: one to three shapes of the same kind, colour and size, moving in one direction. A
scene is one to three events in order, and a video shows a scene. The scene contains all that a caption can state, so the videos
need no labelling. The events of a scene differ in colour and in shape, so their order can be stated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

COUNTS = ("one", "two", "three")
SIZES = {"small": 4, "large": 7}  # half the side length, in pixels
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 240),
    "yellow": (235, 215, 40),
    "purple": (170, 50, 200),
    "white": (240, 240, 240),
}
SHAPES = ("square", "ring", "bar", "cross")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

CELL, CELLS = 16, 4  # a shape starts in the middle of a cell; a cell is one patch of the model
SIDE = CELL * CELLS
FPS = 4
# Pixels moved up to each frame of an event. A patch of the model covers a cell in two frames. In the first the shape is in the
# middle of its cell, in the second it has begun to leave it, so a single patch shows the shape and its direction.
OFFSETS = (0, 5, CELL, CELL + 5)
FRAMES_PER_EVENT = len(OFFSETS)
JITTER = 1  # at most so many pixels, only up and to the left, so that no shape leaves the picture
BACKGROUND = 40
CODECS = (("libvpx-vp9", ".webm"), ("libx264", ".mp4"))
ENCODER_OPTIONS = {
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "16", "b": "0"},
    "libx264": {"preset": "veryfast", "crf": "16"},
}


@dataclass(frozen=True)
class Event:
    """A group of shapes that crosses the picture. The values are words from COUNTS, SIZES, COLOURS, SHAPES and MOTIONS."""

    count: str
    size: str
    colour: str
    shape: str
    motion: str


Scene = tuple[Event, ...]
WORDS: dict[str, tuple[str, ...]] = {
    "count": COUNTS,
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": tuple(MOTIONS),
}


def random_scene(random: Random) -> Scene:
    """A random scene of one to three events, most often two."""
    num_events = random.choice((1, 2, 2, 3))
    colours = random.sample(WORDS["colour"], num_events)
    shapes = random.sample(WORDS["shape"], num_events)
    return tuple(
        Event(random.choice(COUNTS), random.choice(WORDS["size"]), colour, shape, random.choice(WORDS["motion"]))
        for colour, shape in zip(colours, shapes, strict=True)
    )


def draw_scene(scene: Scene, random: Random) -> NDArray[np.uint8]:
    """Frames [T, SIDE, SIDE, 3] of the scene. `random` decides what no caption states: positions and the background."""
    background = BACKGROUND + random.randint(-5, 5)
    frames = np.full((len(scene) * FRAMES_PER_EVENT, SIDE, SIDE, 3), background, np.uint8)
    for number, event in enumerate(scene):
        places = _first_places(event, random)
        dx, dy = MOTIONS[event.motion]
        for step, offset in enumerate(OFFSETS):
            picture = frames[number * FRAMES_PER_EVENT + step]
            for x, y in places:
                picture[_shape_mask(event, x + offset * dx, y + offset * dy)] = COLOURS[event.colour]
    return frames


def write_video(file: Path, frames: NDArray[np.uint8], codec: str) -> None:
    """Encodes frames [T, H, W, 3] with a codec of CODECS (VP9 or H.264)."""
    import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(codec, rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = ENCODER_OPTIONS[codec]
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _first_places(event: Event, random: Random) -> list[tuple[int, int]]:
    """Centres (x, y) of the shapes in the event's first frame, side by side at right angles to the motion, with room to move."""
    dx, dy = MOTIONS[event.motion]
    start = random.randrange(CELLS // 2)
    along = start if dx + dy > 0 else CELLS - 1 - start
    lanes = random.sample(range(CELLS), 1 + COUNTS.index(event.count))
    cells = [(along, lane) if dx else (lane, along) for lane in lanes]
    shift = [-random.randint(0, JITTER) for _ in range(2)]
    return [(CELL * x + CELL // 2 + shift[0], CELL * y + CELL // 2 + shift[1]) for x, y in cells]


def _shape_mask(event: Event, x: int, y: int) -> NDArray[np.bool_]:
    """A mask of the pixels of one shape with its centre at (x, y)."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    half = SIZES[event.size]
    across, below = np.abs(columns - x), rows - y
    square = (across <= half) & (np.abs(below) <= half)
    if event.shape == "ring":
        return square & ~((across <= half - 2) & (np.abs(below) <= half - 2))
    if event.shape == "bar":
        return square & (np.abs(below) <= half // 3)
    if event.shape == "cross":
        return square & ((across <= half // 3) | (np.abs(below) <= half // 3))
    return square
