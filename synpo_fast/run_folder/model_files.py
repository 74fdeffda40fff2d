"""The files of a checkpoint that other tools load: an adapter for peft or a whole model for transformers, and its processor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synpo_fast.errors import UserError
from synpo_fast.models.loading import DTYPES
from synpo_fast.models.lora import load_adapter_model, save_adapter
from synpo_fast.models.low_precision import cast_as_loaded
from synpo_fast.models.policy import Policy

# Files of transformers' processors besides the tokenizer. They are copied unread, since loading a processor needs torchvision.
PROCESSOR_FILES = (
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json",
)  # fmt: skip


def fp32_weights(optimizer_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the optimiser's fp32 copy of each trained weight, by name, from the result of Engine.optimizer_state."""
    suffix = ".master"
    return {name.removesuffix(suffix): value for name, value in optimizer_state.items() if name.endswith(suffix)}


def save_model_files(policy: Policy, folder: Path, weights: dict[str, Tensor], *, adapter: bool, source: str) -> None:
    """Writes adapter or model, tokenizer and processor files.

    weights: from Engine.whole_weights, or from fp32_weights for an adapter. source: the model's folder or hub name, whose
    processor files are copied.
    """
    if adapter:
        save_adapter(policy, folder, weights)
    else:
        model: Any = policy.model
        prefix = "policy.model."
        model.save_pretrained(
            str(folder), state_dict={name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        )
    policy.tokenizer.save_pretrained(str(folder))
    copy_processor_files(source, folder)


def names_beside_weights(policy: Policy, *, adapter: bool, source: str) -> set[str]:
    """Returns the names of the files that save_model_files writes besides the weights."""
    model: Any = policy.model
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        policy.tokenizer.save_pretrained(place)
        copy_processor_files(source, folder)
        names = {file.name for file in folder.iterdir() if file.is_file()}
    if adapter:
        return names | {"adapter_config.json"}
    return names | {"config.json"} | ({"generation_config.json"} if model.can_generate() else set())


def fetch_processor_files(source: str) -> None:
    """Downloads the processor files into the hub's cache when a run starts, so that no checkpoint waits for the network."""
    for name in PROCESSOR_FILES:
        _processor_file(source, name, local_only=False)


def copy_processor_files(source: str, folder: Path) -> None:
    """Copies the source model's processor files into the folder, except those that are there already."""
    for name in PROCESSOR_FILES:
        found = None if (folder / name).exists() else _processor_file(source, name, local_only=True)
        if found is not None:
            shutil.copyfile(found, folder / name)


def _processor_file(source: str, name: str, *, local_only: bool) -> str | None:
    if source.startswith("tiny:"):
        return None
    from transformers.utils import cached_file

    return cached_file(
        source,
        name,
        local_files_only=local_only,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def merge_adapter(adapter: Path, out: Path, *, model_name_or_path: str | None = None, dtype: str | None = None) -> None:
    """Adds the adapter to its base model and saves the result in `out`.

    The sum is computed in fp32, since a small update would be rounded away in bf16. dtype: type of the saved weights; None: fp32.
    Raises UserError for an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    model, tokenizer, base = load_adapter_model(adapter, model_name_or_path, torch.float32)
    merged = model.merge_and_unload()
    if dtype is not None:
        merged = cast_as_loaded(merged, DTYPES[dtype])
    merged.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    copy_processor_files(base, out)
