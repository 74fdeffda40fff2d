"""LoRA adapters on a policy's language model. Only this module imports peft."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synpo_fast.errors import MissingPackage, UserError
from synpo_fast.models.model_source import find_model
from synpo_fast.models.policy import Policy

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(
    policy: Policy, *, r: int = 128, alpha: int = 64, dropout: float = 0.05, targets: tuple[str, ...] = TARGETS
) -> Policy:
    """Adds a new LoRA adapter to the policy's language model, in place, and freezes all other parameters.

    The defaults are those of the SynPO authors.

    Args:
        r, alpha: rank and scale.
        dropout: dropout on the adapter's input.
        targets: names of the layers that get an adapter.

    The vision tower has layers of the same names, but only those inside the language model get an adapter.
    Raises ValueError for a target that is not a layer of the language model. The head counts as outside: the fused loss reads
    its weight and would miss an adapter.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPackage("LoRA needs peft: pip install synpo-fast[train]") from error
    language_model = policy.family.language_model(policy.base)
    inside = {id(module) for module in language_model.modules()}
    found: dict[str, list[str]] = {target: [] for target in targets}
    for name, module in policy.base.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last in found and id(module) in inside:
            found[last].append(name)
    missing = [target for target, names in found.items() if not names]
    if missing:
        there = ", ".join(sorted(_layers(language_model)))
        raise UserError(
            f"lora_target_modules={','.join(targets)}: the language model of {policy.family.name} has no layer called "
            f"{', '.join(missing)}; it has {there}"
        )
    names = [name for each in found.values() for name in each]
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none")
    # With autocast_adapter_dtype the adapter would be in fp32; under ZeRO-3 dtypes must match.
    model: Any = get_peft_model(policy.base, config, autocast_adapter_dtype=False)
    # peft gives an adapter the dtype of its layer, which may be one kept in fp32. All trained parameters need one dtype.
    dtype = policy.base.get_input_embeddings().weight.dtype
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    policy.model = model
    return policy


def _layers(language_model: Any) -> set[str]:
    """The names of the layers that can get an adapter: those with a weight matrix, except embeddings."""
    return {
        name.rsplit(".", 1)[-1]
        for name, module in language_model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not isinstance(module, torch.nn.Embedding)
    }


def save_adapter(policy: Policy, folder: Path, state: dict[str, Tensor]) -> None:
    """Writes the adapter in peft's format. `state` has whole tensors, by the names of the pair module's parameters."""
    model: Any = policy.model
    prefix = "policy.model."
    names = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    model.save_pretrained(str(folder), state_dict=names, safe_serialization=True)


def load_adapter(policy: Policy, folder: Path) -> None:
    """Loads a saved adapter's weights into the policy's adapter. Raises ValueError if they do not fit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise UserError(f"{folder} holds no adapter: was it trained with use_peft=false?")
    saved = load_file(file)
    model: Any = policy.model
    try:
        result: Any = set_peft_model_state_dict(model, saved)
    except RuntimeError as error:
        raise UserError(f"the adapter in {folder} has other shapes than this run's: {error}") from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise UserError(
            f"the adapter in {folder} does not fit this run's lora_target_modules: {len(missing)} tensors are missing, "
            f"{len(result.unexpected_keys)} are unexpected"
        )


def load_adapter_model(adapter: Path, model_name_or_path: str | None, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """Loads (peft model, tokenizer, name of the base model). The adapter names its base, unless model_name_or_path is given."""
    from peft import PeftConfig, PeftModel

    from synpo_fast.models.loading import load_policy

    named = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    run = _config_of_run(adapter)
    tiny = run.get("model_name_or_path", "") if str(run.get("model_name_or_path", "")).startswith("tiny:") else ""
    base = model_name_or_path or tiny or _base_of(adapter, named)
    more: dict[str, Any] = {}
    if base.startswith("tiny:") or tiny:
        if base != tiny:
            raise UserError(
                f"{adapter} was not trained on {base!r}" + (f" but on {tiny!r}" if tiny else "")
                + ": the weights of a tiny: model follow from the seed and options of its run, which the run's config.yaml keeps"
            )  # fmt: skip
        more = {"seed": run.get("seed", 0), "tiny_options": run.get("model_options") or None}
    policy = load_policy(base, dtype=dtype, device="cpu", **more)
    model: Any = policy.model
    try:
        return PeftModel.from_pretrained(model, str(adapter)), policy.tokenizer, base
    except (RuntimeError, ValueError) as error:  # shapes that differ, or missing layers
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{adapter} does not fit its base model {base!r}: {reason}") from error


def _config_of_run(adapter: Path) -> dict[str, Any]:
    """Reads the run's config.yaml from the adapter's folder, or from the folder above a checkpoint; {} if there is none."""
    import yaml

    for folder in (adapter, adapter.resolve().parent):
        if (folder / "config.yaml").is_file():
            try:
                found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError):
                continue
            if isinstance(found, dict):
                return found
    return {}


def _base_of(adapter: Path, name: str | None) -> str:
    """Finds the base model that an adapter names, and returns the argument for from_pretrained.

    A relative path was relative to the folder in which training was started. If it does not exist relative to the current folder,
    it is looked up in the adapter's folder and in all folders above it, which usually include the one training started in.
    """
    if not name:
        raise UserError(f"{adapter} does not say which model it belongs to: name it with --model_name_or_path")
    if Path(name).is_absolute() or name.startswith("tiny:") or Path(name).is_dir():
        found = name
    else:
        places = [folder / name for folder in (adapter.resolve(), *adapter.resolve().parents)]
        found = next((str(place) for place in places if (place / "config.json").is_file()), name)
    try:
        return find_model(found)
    except UserError as error:
        raise UserError(
            f"{adapter} names {name!r} as its base: {error}; --model_name_or_path names another place"
        ) from error
