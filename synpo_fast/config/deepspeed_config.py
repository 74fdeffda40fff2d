"""The configuration passed to DeepSpeed: entries that follow from the trainer's options, and entries of the user's own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.errors import UserError

# The trainer sets these entries from its own options, so the user's file may not set them.
TRAINER_ENTRIES = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "managed_gradient_accumulation",
    "optimizer", "scheduler", "gradient_clipping", "bf16", "fp16", "steps_per_print",
)  # fmt: skip


def deepspeed_config(config: TrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Returns DeepSpeed's configuration: entries that follow from the options, then the entries of the user's file.

    Raises UserError if that file is not JSON, or sets an entry that the trainer sets itself.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage in (1, 2):
        zero |= {"overlap_comm": False, "reduce_scatter": True}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's counters only
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm if config.zero_stage else 0.0,  # stage 0: Engine clips
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
    if config.zero_stage:
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype == torch.bfloat16:
        ours["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif dtype == torch.float16:
        ours["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return _merged(ours, _user_entries(config.deepspeed))


def _user_entries(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    if not Path(file).is_file():
        raise UserError(
            f"deepspeed={file!r}: there is no such file: give a JSON file, or leave it out and set zero_stage"
        )
    try:
        entries = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:  # not UTF-8, or not JSON
        raise UserError(f"deepspeed={file!r} cannot be read as JSON: {error}") from error
    conflicts = [name for name in TRAINER_ENTRIES if name in entries and entries[name] != "auto"]
    if conflicts or "stage" in entries.get("zero_optimization", {}):
        raise UserError(
            f"deepspeed={file!r} sets {', '.join(conflicts) or 'zero_optimization.stage'}, which this trainer sets from its own "
            "options (zero_stage, bf16, max_grad_norm, per_device_train_batch_size, ...): take it out"
        )
    if entries.get("data_types", {}).get("buffer_dtype") is not None:
        raise UserError(
            f"deepspeed={file!r} sets data_types.buffer_dtype, which would round rotary frequencies and make the positions "
            "of long prompts wrong: take it out"
        )
    return {name: value for name, value in entries.items() if name not in TRAINER_ENTRIES}


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(result.get(name), dict):
            value = _merged(result[name], value)
        result[name] = value
    return result
