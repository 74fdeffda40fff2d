"""Assigns pairs to steps and ranks: a pure function of (num_samples, seed, epoch, step, rank, world_size).

The order of an epoch is the indices sorted by a digest of (seed, epoch, index). It differs from epoch to epoch. It does not
depend on the number of ranks, and it is the same after a resume, on every machine and with every version of every library. A
global step takes the next world_size * pairs_per_rank positions; rank r takes every world_size-th of them, from the r-th on. So
2 ranks of 4 pairs and 4 ranks of 2 pairs make the same global steps.

An epoch's last global step is kept even if it is incomplete. It is smaller: some ranks get one pair fewer than others, or
none. Every pair is used once per epoch, and no step is filled up with repeats.
"""

import hashlib


def epoch_order(num_samples: int, *, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The indices 0 .. num_samples - 1 in the order of this epoch; in rising order if shuffle is off."""
    if num_samples < 0 or epoch < 0:
        raise ValueError(f"num_samples and epoch must not be negative, got {num_samples} and {epoch}")
    if not shuffle:
        return list(range(num_samples))
    salt = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=16).digest()

    def place(index: int) -> bytes:
        return hashlib.blake2b(index.to_bytes(8, "little"), digest_size=16, key=salt).digest()

    return sorted(range(num_samples), key=place)


def num_steps(num_samples: int, *, world_size: int, pairs_per_rank: int) -> int:
    """The number of global steps in an epoch, including an incomplete last one."""
    return -(-num_samples // (world_size * pairs_per_rank))


def step_positions(
    step_in_epoch: int, rank: int, world_size: int, pairs_per_rank: int, *, num_samples: int | None = None
) -> range:
    """Positions in the epoch's order of this rank's pairs in this step; num_samples ends the last step at the epoch's end."""
    if not 0 <= rank < world_size:
        raise ValueError(f"need 0 <= rank < world_size, got rank={rank} and world_size={world_size}")
    if pairs_per_rank < 1 or step_in_epoch < 0:
        raise ValueError(f"need pairs_per_rank >= 1 and step >= 0, got {pairs_per_rank} and {step_in_epoch}")
    in_step = world_size * pairs_per_rank
    begin, end = step_in_epoch * in_step, (step_in_epoch + 1) * in_step
    if num_samples is not None:
        end = min(end, num_samples)
    return range(begin + rank, max(end, begin + rank), world_size)
