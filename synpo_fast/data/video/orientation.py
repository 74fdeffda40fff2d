"""How a stored picture has to be turned and mirrored to stand upright, from the display matrix of its container.

The matrix [a b u; c d v; x y w] sends the stored point (x, y), y downwards, to (a x + c y, b x + d y). Eight matrices send
pixels to pixels: the stored picture mirrored left to right or not, then turned by 0, 90, 180 or 270 degrees
counter-clockwise. All others (a turn by 17 degrees, width and height scaled apart, a shear) are refused. A scale that is
the same in both directions shows the same picture, and is left out, as players do.

FFmpeg's own figure for the angle knows no mirroring: it calls a picture mirrored left to right "turned by 180 degrees".
"""

import math
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synpo_fast.data.video.video_info import VideoError

SLACK = 0.01  # of the matrix' scale; writers round cosines and sines to 16 bits, and a degree shows after 100 pixels
TURNS = {(1, 0): 0, (0, -1): 90, (-1, 0): 180, (0, 1): 270}  # where (a, b), the direction of a row, points afterwards


def frame_orientation(path: object, frame: Any) -> tuple[int, bool]:
    """(degrees counter-clockwise, whether mirrored left to right before that) of a frame of PyAV's. VideoError."""
    from av.sidedata.sidedata import Type

    for part in frame.side_data:
        if part.type == Type.DISPLAYMATRIX:
            return matrix_orientation(path, struct.unpack("=9i", bytes(part)[:36]))
    return 0, False


def matrix_orientation(path: object, matrix: tuple[int, ...]) -> tuple[int, bool]:
    """The same of the matrix' nine numbers, row by row, in FFmpeg's fixed point."""
    a, b, c, d = (matrix[place] for place in (0, 1, 3, 4))
    scale = math.sqrt(abs(a * d - b * c))
    if not scale:
        raise VideoError(path, f"has a display matrix that shows no picture: {list(matrix)}")
    exact = [value / scale for value in (a, b, c, d)]
    whole = [round(value) for value in exact]
    rounds = max(abs(value - near) for value, near in zip(exact, whole, strict=True)) <= SLACK
    if not rounds or sorted(map(abs, whole)) != [0, 0, 1, 1]:
        raise VideoError(path, _refusal(a, b, c, d))
    mirrored = whole[0] * whole[3] - whole[1] * whole[2] < 0
    row = (-whole[0], -whole[1]) if mirrored else (whole[0], whole[1])
    return TURNS[row], mirrored


def _refusal(a: int, b: int, c: int, d: int) -> str:
    width, height = math.hypot(a, b), math.hypot(c, d)
    angle = round(-math.degrees(math.atan2(b, a))) % 360
    if abs(a * c + b * d) > SLACK * width * height:
        return "asks to be sheared by its display matrix; only turns by multiples of 90 and mirroring are known"
    if angle % 90:
        return f"asks to be turned by {angle} degrees; only multiples of 90 are known"
    return (
        f"asks to be shown with its width scaled by {width / height:.3g} against its height; only even scales are known"
    )


def upright(pixels: np.ndarray, rotation: int, mirrored: bool) -> np.ndarray:
    """A view of [..., H, W, 3] as it is to be shown."""
    return np.rot90(pixels[..., ::-1, :] if mirrored else pixels, rotation // 90, axes=(-3, -2))


def upright_tensor(frames: Tensor, rotation: int, mirrored: bool) -> Tensor:
    """The same of a tensor; a copy, but where nothing is to be done."""
    if mirrored:
        frames = frames.flip(-2)
    return torch.rot90(frames, rotation // 90, dims=(-3, -2)) if rotation else frames
