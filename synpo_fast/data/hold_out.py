"""Chooses the pairs that are held out for evaluation. No held-out pair shows a file that training sees.

Pairs that share a file, as their video or in a clip, form a group, also if other pairs connect them. A group is held out as a
whole or not at all. Files are compared by device and inode, so symbolic links, hard links and different spellings of a path
count as the same file. Pairs without a video form a group if their prompts are the same text.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from synpo_fast.data.order import epoch_order
from synpo_fast.data.pair import Pair
from synpo_fast.errors import UserError


def hold_out(pairs: Sequence[Pair], share: float, *, seed: int, root: str | Path) -> tuple[list[Pair], list[Pair]]:
    """Splits the pairs into (training, held out), both in the given order.

    The held-out part is as close to `share` of all pairs as whole groups allow. At least one group is held out and at least
    one is left for training. Raises ValueError if all pairs form one group.
    """
    groups = connected_groups(pairs, root)
    if len(groups) < 2:
        raise UserError(
            f"eval_split={share}: all {len(pairs)} pairs show the same file, or files that other pairs connect (pairs without a "
            "video: the same prompt), so none can be held out unseen. Give an eval_file, or leave eval_split at 0"
        )
    wanted, chosen = share * len(pairs), set[int]()
    order = [groups[place] for place in epoch_order(len(groups), seed=seed, epoch=0)]
    for group in order:
        grown = len(chosen) + len(group)
        if abs(grown - wanted) < abs(len(chosen) - wanted) and grown < len(pairs):
            chosen.update(group)
    if not chosen:
        smallest: list[int] = min(order, key=len)
        chosen.update(smallest)
    return (
        [pair for place, pair in enumerate(pairs) if place not in chosen],
        [pair for place, pair in enumerate(pairs) if place in chosen],
    )


def connected_groups(pairs: Sequence[Pair], root: str | Path) -> list[list[int]]:
    """Indices of pairs that share a file or prompt, directly or through other pairs; groups in the order of their first pair."""
    first_use: dict[object, int] = {}
    leader = list(range(len(pairs)))
    known: dict[str, object] = {}

    def leader_of(place: int) -> int:
        while leader[place] != place:
            leader[place] = leader[leader[place]]
            place = leader[place]
        return place

    for place, pair in enumerate(pairs):
        for key in _keys(pair, Path(root), known):
            one, other = sorted((leader_of(first_use.setdefault(key, place)), leader_of(place)))
            leader[other] = one
    groups: dict[int, list[int]] = {}
    for place in range(len(pairs)):
        groups.setdefault(leader_of(place), []).append(place)
    return list(groups.values())


def num_files(pairs: Iterable[Pair], root: str | Path) -> int:
    """The number of different files that the pairs show."""
    return len(files_of(pairs, root))


def files_of(pairs: Iterable[Pair], root: str | Path) -> set[object]:
    known: dict[str, object] = {}
    return {_file(name, Path(root), known) for pair in pairs for name in _names(pair)}


def _names(pair: Pair) -> list[str]:
    if pair.clips:
        return [clip.path for clip in pair.clips]
    return [] if pair.video is None or isinstance(pair.video, Tensor) else [str(pair.video)]


def _keys(pair: Pair, root: Path, known: dict[str, object]) -> list[object]:
    names = _names(pair)
    if names:
        return [_file(name, root, known) for name in names]
    return [("frames", id(pair.video))] if isinstance(pair.video, Tensor) else [("prompt", pair.prompt)]


def _file(name: str, root: Path, known: dict[str, object]) -> object:
    if name not in known:
        path = os.path.realpath(root / name)
        try:
            facts = os.stat(path)
        except OSError:  # a missing file is reported when it is read
            known[name] = path
        else:
            known[name] = (facts.st_dev, facts.st_ino)
    return known[name]
