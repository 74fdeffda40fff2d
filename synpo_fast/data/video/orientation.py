"""Turns and mirrors stored pictures upright, as the display matrix of their container states.

The matrix [a b u; c d v; x y w] maps the stored point (x, y), y downwards, to (a x + c y, b x + d y). Eight matrices map
pixels to pixels: the stored picture is mirrored left to right or not, then turned by 0, 90, 180 or 270 degrees
counter-clockwise. All others (a turn by 17 degrees, different scales of width and height, a shear) are refused. The same scale
in both directions shows the same picture, and is ignored, as players do.

FFmpeg's own angle does not include mirroring: for a picture mirrored left to right it is 180 degrees.
"""

import math
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synpo_fast.data.video.video_info import VideoError

# Relative to the matrix' scale. Writers round cosines and sines to 16 bits; this error moves a point by 1 pixel in 100.
SLACK = 0.01
TURNS = {(1, 0): 0, (0, -1): 90, (-1, 0): 180, (0, 1): 270}  # direction (a, b) of a row after the turn -> degrees


def frame_orientation(path: object, frame: Any) -> tuple[int, bool]:
    """Returns (degrees counter-clockwise, True if mirrored left to right before) for a PyAV frame. Raises VideoError."""
    from av.sidedata.sidedata import Type

    for part in frame.side_data:
        if part.type == Type.DISPLAYMATRIX:
            return matrix_orientation(path, struct.unpack("=9i", bytes(part)[:36]))
    return 0, False


def matrix_orientation(path: object, matrix: tuple[int, ...]) -> tuple[int, bool]:
    """Returns (degrees, mirrored) for the nine numbers of the matrix, row by row, in FFmpeg's fixed point."""
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
        return "has a display matrix with a shear; only mirroring and turns by multiples of 90 degrees are supported"
    if angle % 90:
        return f"is to be turned by {angle} degrees; only multiples of 90 are supported"
    return f"is to be shown with its width scaled by {width / height:.3g} relative to its height; only equal scales are supported"


def upright(pixels: np.ndarray, rotation: int, mirrored: bool) -> np.ndarray:
    """An upright view of the pixels [..., H, W, 3]."""
    return np.rot90(pixels[..., ::-1, :] if mirrored else pixels, rotation // 90, axes=(-3, -2))


def upright_tensor(frames: Tensor, rotation: int, mirrored: bool) -> Tensor:
    """Frames [..., H, W, 3] turned upright: a copy, or the tensor itself if nothing has to be done."""
    if mirrored:
        frames = frames.flip(-2)
    return torch.rot90(frames, rotation // 90, dims=(-3, -2)) if rotation else frames
