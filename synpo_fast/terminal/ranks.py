"""The rank that a launcher gave this process, read from the environment before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping

# The variables of torch and DeepSpeed, of Slurm, and of Open MPI: the rank on its machine, and the global rank.
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def rank_of(environment: Mapping[str, str], names: tuple[str, ...] = RANKS) -> int:
    """Returns this process's rank, 0 if no launcher has set one."""
    for name in names:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 0
