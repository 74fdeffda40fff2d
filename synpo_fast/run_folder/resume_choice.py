"""Resolves `--resume FOLDER`, where FOLDER is the folder of a run, to that run's newest whole checkpoint; and describes options
that differ from those of the run that is resumed."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.errors import UserError
from synpo_fast.run_folder.checkpoint import COMPLETE, checkpoint_problem, list_checkpoints

# Facts of a run that join several options, in this order.
JOINED = {
    "auxiliary": ("auxiliary_nll", "auxiliary_target"),
    "adapter": ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
}
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


def changed_fact(name: str, saved: Any, now: Any) -> str:
    """Describes a fact of a run that differs from the saved one, option by option."""
    saved, now = _by_option(name, saved), _by_option(name, now)
    differing = [option for option in {**now, **saved} if saved.get(option) != now.get(option)]
    return "; ".join(f"{each} was {_shown(each, saved)}, now {_shown(each, now)}" for each in differing)


def _by_option(name: str, fact: Any) -> dict[str, Any]:
    if name == "frames":
        return dict(re.findall(r"(\w+)=([^,()]+)", str(fact)))
    if isinstance(fact, dict) or (fact is None and name in ("loss options", "model_options")):
        return fact or {}
    if name in JOINED and isinstance(fact, list):
        return dict(zip(JOINED[name], fact, strict=False))
    return {name: fact}


def _shown(option: str, values: dict[str, Any]) -> str:
    value = values.get(option)
    if value in (None, "None"):
        return "auto" if option == "reference" else "not set"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
