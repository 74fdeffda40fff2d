"""The number that a launcher gave this process, known before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping

# Where launchers put it: torch's and DeepSpeed's, Slurm's, Open MPI's. On its machine, then over all.
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def rank_of(environment: Mapping[str, str], names: tuple[str, ...] = RANKS) -> int:
    """This process's number, 0 where no launcher has given it one."""
    for name in names:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 0
