"""Messages about the pairs that a run could not use: how many, why, and where they are listed.

Counts and reasons are those of all ranks, so every rank calls these functions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from synpo_fast.data.encoding import BadPair, quoted
from synpo_fast.data.video.video_info import CHOOSE_AUTO
from synpo_fast.training.run_state import RunState, Saver

OUT_OF_MEMORY = "out of memory"
# What a pair's reason says if an option is why the pair cannot be used, and what to do about that option.
REMEDIES = {
    "max_length=": "raise max_length", "video_max_tokens=": "raise video_max_tokens", CHOOSE_AUTO: "set video_backend=auto"
}  # fmt: skip


def first_unusable(saver: Saver) -> list[BadPair]:
    noted: list[list[BadPair]] = [[]] * dist.get_world_size()
    dist.all_gather_object(noted, saver.first_bad())
    return [bad for of_rank in noted for bad in of_rank]


def skipped_pairs_path(saver: Saver) -> Path:
    return saver.bad_file if dist.get_world_size() == 1 else saver.folder / "skipped_pairs.rank*.jsonl"


def advice(bad: Sequence[BadPair]) -> str:
    """The end of a message: how to find such pairs beforehand. `pairs check` reads videos but knows no limit of tokens or memory,
    so it is "" if an option or the memory is why each of them cannot be used."""
    if all(each.reason.startswith(OUT_OF_MEMORY) or _remedy_for(each) for each in bad):
        return ""
    return "; `synpo-fast pairs check` finds such videos beforehand"


def remedies(saver: Saver) -> str:
    """Names the remedy for each option that made pairs unusable; "" if one of the pairs has another reason."""
    found: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(found, {_remedy_for(bad) for bad in saver.first_bad(sys.maxsize)})
    every = set().union(*found)
    return "" if "" in every else " and ".join(sorted(every))


def _remedy_for(bad: BadPair) -> str:
    return next((remedy for said, remedy in REMEDIES.items() if said in bad.reason), "")


def nothing_used_error(state: RunState, saver: Saver) -> str | None:
    """The error message of a run that could use none of the pairs it read, or None."""
    if not state.seen_pairs or state.bad_pairs < state.seen_pairs:
        return None
    bad = first_unusable(saver)
    return (
        f"nothing was trained: none of the {state.seen_pairs} pairs could be used. {quoted(bad)}. {skipped_pairs_path(saver)} "
        f"lists them{advice(bad)}. Start anew with --overwrite_output_dir once that is fixed"
    )


def unusable_pairs_line(state: RunState, saver: Saver) -> str | None:
    """A line about the pairs that a run could not use, or None."""
    if not state.bad_pairs:
        return None
    first = quoted(first_unusable(saver), most=1)
    return f"{state.bad_pairs} of {state.seen_pairs} pairs could not be used. {first}. {skipped_pairs_path(saver)} lists them"
