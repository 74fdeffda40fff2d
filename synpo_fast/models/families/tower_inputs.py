"""Vision tower inputs that depend on the grid alone, computed on the host: positions, windows, segment ends, interpolation.

Towers in transformers (5.17 and later) compute these from `grid_thw` on its device; on a GPU each of them costs a host sync.
The towers also accept them as keyword arguments. So the grid stays on the host, transformers' own functions run there, and
all results go to the device in one copy. Then no layer reads anything back from the device, whichever attention runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from synpo_fast.models.families.base import VideoInputs
from synpo_fast.models.vision_attention import Segments, is_flash, segments_of, takes_segments
from synpo_fast.ops.host_copy import to_device

# The cuts that a tower may make in its row of patches, with transformers' argument names for segment ends and longest segment.
CUTS = {"frames": ("cu_seqlens", "max_seqlen"), "windows": ("cu_window_seqlens", "max_window_seqlen")}
PARTS = ("ends", "by_length", "back")  # the tensors of Segments


def host_grids(videos: Sequence[VideoInputs]) -> Tensor:
    """Returns int64 [N, 3] on the host: the number of patches of each video in time, height and width."""
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
    """Computes the tower's keyword arguments for videos of these grids, other than pixels and grid.

    windows: (window_size, patch_size) of a tower with windowed layers. interpolation: keyword arguments of transformers'
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
    if is_flash(tower.config):  # flash attention needs the ends on the device; sdpa and eager cut the row on the host
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
