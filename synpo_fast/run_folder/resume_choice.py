"""Resolves `--resume FOLDER`, where FOLDER is the folder of a run, to that run's newest whole checkpoint."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.errors import UserError
from synpo_fast.run_folder.checkpoint import COMPLETE, checkpoint_problem, list_checkpoints

logger = logging.getLogger(__name__)


def resolve_resume(config: TrainConfig) -> TrainConfig:
    """Returns the config with `resume` set to None, auto or a checkpoint if it named a run's folder. Only one process calls it.

    output_dir itself becomes auto, which handles checkpoints that are not whole. Raises UserError for a folder that holds no
    checkpoint, or none that is whole.
    """
    if config.resume in (None, "auto"):
        return config
    folder = Path(str(config.resume))
    checkpoints = list_checkpoints(folder)
    if (
        not folder.is_dir()
        or (folder / COMPLETE).exists()
        or (not checkpoints and folder.name.startswith("checkpoint-"))
    ):
        return config
    if not checkpoints:
        raise UserError(f"resume={config.resume!r} holds no checkpoint-N folder: give one, a run's folder, or auto")
    if folder.resolve() == Path(config.output_dir).resolve():
        return replace(config, resume="auto")
    problems: list[str] = []
    for checkpoint in reversed(checkpoints):
        problem = checkpoint_problem(checkpoint)
        if problem is None:
            if problems:
                logger.warning("skipping %s", "; ".join(problems))
            return replace(config, resume=str(checkpoint))
        problems.append(f"{checkpoint.name}: {problem}")
    raise UserError(
        f"resume={config.resume!r}: none of its {len(checkpoints)} checkpoints is whole ({'; '.join(problems)})"
    )
