"""What ranks agree on before a step. A rank that has fewer micro-batches than another takes part all the same, with a pair that
counts for nothing: collectives inside forward and backward wait for every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from synpo_fast.data.encoded import EncodedPair


def agree_on_forwards(
    micros: int, pairs: int, spare: EncodedPair | None, device: torch.device
) -> tuple[int, int, EncodedPair | None]:
    """From this rank's numbers: the most micro-batches of any rank, the pairs of all ranks, and a pair to stand in with, which
    another rank hands over if this one has had none. None only while no rank has had a pair."""
    if dist.get_world_size() == 1:
        return micros, pairs, spare
    facts = torch.tensor([pairs, micros, spare is not None], device=device)
    every = [torch.zeros_like(facts) for _ in range(dist.get_world_size())]
    dist.all_gather(every, facts)
    rows = torch.stack(every).tolist()
    most = max(row[1] for row in rows)
    if most and not all(row[2] for row in rows):
        parcel: list[Any] = [spare]
        source = next(rank for rank, row in enumerate(rows) if row[2])
        dist.broadcast_object_list(parcel, src=source, device=device)
        spare = spare or parcel[0]
    return most, sum(row[0] for row in rows), spare
