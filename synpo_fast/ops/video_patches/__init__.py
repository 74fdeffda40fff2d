"""Converts uint8 frames to the pixel input of a vision tower, in one pass; see video_patches.py."""

from synpo_fast.ops.video_patches.packing import Packing
from synpo_fast.ops.video_patches.video_patches import check_frames, resized_frames, video_patches

__all__ = ["Packing", "check_frames", "resized_frames", "video_patches"]
