"""A run over some ranks that prints what every step holds, until somebody kills it: python -m tests.data.resume_run ..."""

import json
import sys
from pathlib import Path

from synpo_fast.data.loader import PairLoader, StepBatch
from synpo_fast.data.pair import Pair
from synpo_fast.data.video.sampling import FrameSampling
from tests.data.chores import LightEncoder


def loaders(root: Path, world_size: int, num_workers: int) -> list[PairLoader]:
    pairs = [Pair("q", "a", "b", video=f"{k % 2}.mp4" if k != 8 else "missing.mp4", id=f"p{k}") for k in range(23)]
    return [
        PairLoader(
            pairs,
            LightEncoder(),
            sampling=FrameSampling(num_frames=2),
            video_root=root,
            pairs_per_step=4 // world_size,
            rank=rank,
            world_size=world_size,
            seed=11,
            num_workers=num_workers,
        )
        for rank in range(world_size)
    ]


def described(batches: tuple[StepBatch, ...]) -> list:
    """One global step: for each rank its position, its pairs with a digest of their pixels, and the bad ones."""
    return [
        [
            batch.epoch,
            batch.step,
            [[pair.id, int(pair.sample.video.tensors["frames"].sum())] for pair in batch.pairs],
            [pair.id for pair in batch.bad],
        ]
        for batch in batches
    ]


def main(root: str, world_size: str, num_workers: str) -> None:
    ranks = loaders(Path(root), int(world_size), int(num_workers))
    for epoch in range(100):
        for batches in zip(*(loader.steps(epoch) for loader in ranks), strict=True):
            print(json.dumps(described(batches)), flush=True)
            sys.stdin.readline()  # a step begins when the test says so, as the next optimiser step would


if __name__ == "__main__":
    main(*sys.argv[1:])
