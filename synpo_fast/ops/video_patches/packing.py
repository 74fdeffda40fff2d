"""Pixel layout for vision towers that take their frames as one list of patches, one patch per row.

The video is a grid (t, h, w) of patches, each of temporal_patch_size frames and patch_size x patch_size pixels.
Order of rows: time, then blocks of merge_size x merge_size patches in reading order, then the patches of a block in reading
order. So the patches that the tower merges into one token are adjacent.
Order within a row: channel, frame within the patch, pixel row, pixel column.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Packing:
    patch_size: int
    merge_size: int = 1
    temporal_patch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")

    def grid(self, num_frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
        """The grid (t, h, w). If temporal_patch_size does not divide num_frames, the last frame is repeated as padding."""
        block = self.patch_size * self.merge_size
        if size[0] % block or size[1] % block:
            raise ValueError(
                f"size must be multiples of patch_size * merge_size = {self.patch_size} * {self.merge_size}, got {size}"
            )
        return -(-num_frames // self.temporal_patch_size), size[0] // self.patch_size, size[1] // self.patch_size

    def num_merged(self, num_frames: int, size: tuple[int, int]) -> int:
        """Number of merge_size x merge_size blocks in the whole grid. The tower merges each block into one token."""
        return math.prod(self.grid(num_frames, size)) // self.merge_size**2

    @property
    def num_columns(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2
