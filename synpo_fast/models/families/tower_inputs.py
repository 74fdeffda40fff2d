"""Inputs that a vision tower makes of its grid, made on the host beforehand: positions, windows, ends of segments, interpolation.

Towers of transformers (5.17 and later) compute these from `grid_thw` where it lies, and on a GPU every such number is a stop of
the host. They take them as keyword arguments, too. So the grid stays on the host, transformers' own functions run there, and
what the tower needs goes to the device in one copy. Nothing is then read back, in any layer, whatever attention runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from synpo_fast.models.families.base import VideoInputs
from synpo_fast.models.vision_attention import Segments, is_flash, segments_of, takes_segments
from synpo_fast.ops.host_copy import to_device

# How a tower may cut its row of patches, and what transformers calls the ends of such segments and the longest of them.
CUTS = {"frames": ("cu_seqlens", "max_seqlen"), "windows": ("cu_window_seqlens", "max_window_seqlen")}
PARTS = ("ends", "by_length", "back")  # the tensors of Segments


def host_grids(videos: Sequence[VideoInputs]) -> Tensor:
    """int64 [N, 3] on the host: rows of patches in time, height and width of each video."""
    return torch.cat([video.tensors["video_grid_thw"].cpu() for video in videos])


def tower_inputs(
    tower: Any,
    grids: Tensor,
    *,
    merge_size: int | Tensor,
    device: torch.device,
    windows: tuple[int, int] | None = None,
    interpolation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of the tower's call for videos of these grids, beside pixels and grid.

    windows: (window_size, patch_size) of a tower that has windowed layers. interpolation: keyword arguments of transformers'
    get_vision_interpolation_indices_and_weights, for a tower with a learned table of positions.
    """
    from transformers import vision_utils

    host = {"position_ids": vision_utils.get_vision_position_ids(grids, merge_size)}
    cuts = {"frames": segments_of(vision_utils.get_vision_cu_seqlens(grids))}
    if windows is not None:
        assert isinstance(merge_size, int)
        host["window_index"], window_ends = vision_utils.get_vision_window_index(
            grids, spatial_merge_size=merge_size, window_size=windows[0], patch_size=windows[1]
        )
        cuts["windows"] = segments_of(window_ends)
    if interpolation is not None:
        host["interp_indices"], host["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grids, **interpolation
        )
    if is_flash(tower.config):  # reads the ends on the device; sdpa and eager cut the row on the host
        for cut, segments in cuts.items():
            host |= {f"{cut}.{part}": getattr(segments, part) for part in PARTS}
    sent = to_device(host, device)
    if is_flash(tower.config):
        cuts = {
            cut: Segments(counts=segments.counts, **{part: sent.pop(f"{cut}.{part}") for part in PARTS})
            for cut, segments in cuts.items()
        }
    made: dict[str, Any] = dict(sent)
    for cut, segments in cuts.items():
        name_of_ends, name_of_longest = CUTS[cut]
        made |= {name_of_ends: segments.ends, name_of_longest: segments.longest}
    return {**made, "cuts": tuple(cuts.values())} if takes_segments(tower.config) else made
