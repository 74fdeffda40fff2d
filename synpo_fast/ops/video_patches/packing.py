"""Where a pixel goes: patches in rows, for vision towers that take their frames as one list of patches.

A grid (t, h, w) of patches, each of temporal_patch_size frames and patch_size x patch_size pixels.
Rows: time, then blocks of merge_size x merge_size patches in reading order, then the patches of a block in reading order,
so that patches which the tower merges into one token stand together.
Columns: channel, frame within the patch, row, column.
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
        """(t, h, w). A video that temporal_patch_size does not divide is padded by repeating its last frame."""
        block = self.patch_size * self.merge_size
        if size[0] % block or size[1] % block:
            raise ValueError(
                f"size must be multiples of patch_size * merge_size = {self.patch_size} * {self.merge_size}, got {size}"
            )
        return -(-num_frames // self.temporal_patch_size), size[0] // self.patch_size, size[1] // self.patch_size

    def num_merged(self, num_frames: int, size: tuple[int, int]) -> int:
        """Blocks of merge_size x merge_size patches in the whole grid: what the tower merges into one token each."""
        return math.prod(self.grid(num_frames, size)) // self.merge_size**2

    @property
    def num_columns(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2
