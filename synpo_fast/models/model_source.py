"""Finds a model's files: a local folder, a repository on the hub, or its cached copy if the hub cannot be reached.

This check runs before anything is loaded. So a wrong name gives one line without a traceback, and a machine without a network
gets its error within seconds, while transformers would retry every file six times.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from synpo_fast.errors import UserError
from synpo_fast.models.families.registry import FAMILIES, family_of

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
HUB_SECONDS = 5.0
LOCAL = "give the folder of a downloaded model, or set HF_HUB_OFFLINE=1 and HF_HOME to a cache that holds it"
logger = logging.getLogger(__name__)


def find_model(name: str) -> str:
    """Returns the argument for from_pretrained: `name`, or the folder of its cached copy if the hub cannot be reached.

    Raises UserError for a folder that does not exist or holds no model, for a repository that does not exist, is closed to this
    user or cannot be reached, and for a model type that no family supports.
    """
    if name.startswith("tiny:"):
        if name.removeprefix("tiny:") not in FAMILIES:
            raise UserError(
                f"unknown family in model_name_or_path={name!r}, expected tiny: and one of {', '.join(FAMILIES)}"
            )
        return name
    folder = Path(name)
    if folder.is_dir():
        _check_folder(name, folder)
        return name
    if folder.exists():
        raise UserError(f"model_name_or_path={name!r} is a file: give the folder of the model")
    if name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise UserError(f"model_name_or_path={name!r}: there is no such folder (looked for {folder.absolute()})")
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"model_name_or_path={name!r} is not a folder, and not a valid name on the hub")
    return _find_on_hub(name)


def _check_folder(name: str, folder: Path) -> None:
    option = f"model_name_or_path={name!r}"
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{option} is an adapter: merge it into a model with `synpo-fast merge {name} OUT`, or give its base model"
        )
    if not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
        hint = f"; did you mean its {inside[-1]}?" if inside else ""
        raise UserError(f"{option} holds no config.json, so it is not a model{hint}")
    _check_type(option, folder / "config.json")
    if not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        raise UserError(
            f"{option} holds a config.json but no weights ({', '.join(WEIGHTS[:2])}): is the download complete?"
        )


def _check_type(option: str, file: Path) -> None:
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: its config.json cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{option}: its config.json names no model_type, so it is not a transformers model")
    try:
        family_of(SimpleNamespace(model_type=config["model_type"]))
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


@functools.cache  # called when the run starts and again when the model is loaded
def _find_on_hub(name: str) -> str:
    """Implements find_model for a name on the hub."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub import errors as hub

    option = f"model_name_or_path={name!r}"
    found = try_to_load_from_cache(name, "config.json")
    cached = Path(found) if isinstance(found, str) else None
    page = f"{constants.ENDPOINT}/{name}"
    if constants.HF_HUB_OFFLINE:
        if cached is None:
            raise UserError(
                f"{option} is not a folder, HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} has no copy of it: {LOCAL}"
            )
        _check_type(option, cached)
        return name
    # Base classes only: the hub's client has changed its HTTP library twice, and each library has its own errors.
    unreachable: tuple[type[Exception], ...] = (OSError, getattr(hub, "HTTPError", OSError))
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", endpoint=constants.ENDPOINT), timeout=HUB_SECONDS)
        file = Path(hf_hub_download(name, "config.json", endpoint=constants.ENDPOINT))
    except hub.GatedRepoError as error:
        raise UserError(
            f"{option} is gated: accept its conditions at {page}, then log in (`hf auth login`, or set HF_TOKEN)"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise UserError(
            f"{option}: there is no such folder (looked for {Path(name).absolute()}) and no repository {page}; if it is "
            "private, log in (`hf auth login`, or set HF_TOKEN)"
        ) from error
    except hub.EntryNotFoundError as error:
        raise UserError(f"{option}: {page} holds no config.json, so it is not a transformers model") from error
    except unreachable as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if cached is None:
            raise UserError(
                f"{option} is not a folder, and {constants.ENDPOINT} cannot be reached ({reason}): {LOCAL}"
            ) from error
        _check_type(option, cached)
        logger.warning("%s cannot be reached (%s): using the cached copy %s", constants.ENDPOINT, reason, cached.parent)
        return str(cached.parent)
    _check_type(option, file)
    return name
