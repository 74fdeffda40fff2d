"""Loads a Policy, ready to train or to score, from a hub name, a folder, or tiny:<family>."""

import json
from pathlib import Path
from typing import Any

import torch

from synpo_fast.errors import MissingPackage, UserError
from synpo_fast.models import attention
from synpo_fast.models.families.registry import FAMILIES, Family, attention_kinds, family_of
from synpo_fast.models.families.video_frames import VideoProcessing, with_resolution
from synpo_fast.models.liger import apply_liger_kernels
from synpo_fast.models.low_precision import cast_as_loaded
from synpo_fast.models.model_source import find_model
from synpo_fast.models.policy import Policy
from synpo_fast.models.vision_attention import set_vision_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load_policy(
    name_or_path: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "auto",
    vision_attn_implementation: str = "auto",
    freeze_vision: bool = True,
    gradient_checkpointing: bool = False,
    liger_kernels: bool = False,
    row_tokens: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    video_max_tokens: int | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    tiny_options: dict[str, Any] | None = None,
    like: Policy | None = None,
) -> Policy:
    """Loads a model with its tokenizer and finds its family.

    Args:
        name_or_path: a hub name or a folder. "tiny:<family>" builds a small random model with its own tokenizer, without
            network; `seed` and `tiny_options` (sizes) apply to such a model only.
        dtype: dtype of the weights, "bfloat16" or "bf16" and so on; None: fp32 on a CPU, bf16 on a GPU. Tensors that
            transformers keeps in fp32 (rotary frequencies, parameters that a model declares) stay in fp32.
        attn_implementation: sdpa, eager, synpo_fast_segments, synpo_fast_varlen, or auto: varlen for bf16 and fp16 on a GPU of
            compute capability 8.0 or above, else segments.
        vision_attn_implementation: attention of the vision tower: auto, sdpa, eager, synpo_fast_varlen, synpo_fast_segments or
            flash_attention_2. auto: on a GPU varlen (segments in fp32) for towers that pack frames into one row, else sdpa.
        device: None: the GPU if there is one, else the CPU.
        freeze_vision: do not train tower and projector; their features can then be cached.
        gradient_checkpointing: recompute activations in the backward, to save memory.
        liger_kernels: use Liger's norms, rotary embedding and gated MLPs, on a GPU. An error if no module can be replaced.
        row_tokens: maximum length of a packed row; None: all samples of a call share one row.
        min_pixels, max_pixels: bounds for a video's size that replace the model's own, as the family's processor defines them:
            for one frame (qwen2_5_vl), for all frames together (qwen3_vl), or min_pixels for one frame and max_pixels for all
            together (video_llama_3). Families that scale every frame to a fixed size refuse them.
        video_max_tokens: maximum number of tokens of a video: frames are shrunk, down to min_pixels, until it is met.
        trust_remote_code: run code that comes with the model.
        like: a policy whose tokenizer and video settings are used in place of those stored with these weights.

    Raises ValueError for an unknown family, for an attention that cannot run packed rows, and for an option that the model or
    the device does not support.
    """
    attention.register()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _dtype(dtype, device)
    implementation, _ = attention.choose(attn_implementation, device, dtype)
    resolution = {"min_pixels": min_pixels, "max_pixels": max_pixels, "video_max_tokens": video_max_tokens}
    if name_or_path.startswith("tiny:"):
        model, tokenizer, family = _tiny(name_or_path.removeprefix("tiny:"), seed, tiny_options or {})
        cast_as_loaded(model, dtype)
        processing = _processing(family, model.config, None, resolution)
    else:
        place = find_model(name_or_path)
        tokenizer = None if like is None else like.tokenizer
        model, tokenizer, family, processing = _pretrained(
            name_or_path, place, dtype, trust_remote_code, tokenizer, resolution
        )
    model.to(device=device)  # never dtype=: see low_precision.py
    policy = Policy(model, tokenizer, family, attn_implementation=implementation, row_tokens=row_tokens)
    policy.vision_attn_implementation = set_vision_attention(
        family, model, vision_attn_implementation, dtype=dtype, device=device
    )
    if policy.vision_attn_implementation is not None:
        policy.notes.append(f"attention of the vision tower: {policy.vision_attn_implementation}")
    policy.processing = processing if like is None else like.processing
    _set_attention(policy, attn_implementation, device, dtype)
    if freeze_vision:
        policy.freeze_vision()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if liger_kernels:
        policy.notes.append(_apply_liger(policy, device))
    return policy


def _dtype(wanted: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if wanted is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(wanted, torch.dtype):
        return wanted
    name = SHORT_NAMES.get(wanted, wanted)
    if name not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join([*DTYPES, *SHORT_NAMES])}, got {wanted!r}")
    return DTYPES[name]


def _tiny(name: str, seed: int, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    from synpo_fast.models.tiny import check_tiny_options, tiny_model

    family = _known_family(f"tiny:{name}")
    check_tiny_options(options)
    model, tokenizer = tiny_model(name, seed, **options)
    return model, tokenizer, family


def _pretrained(
    name: str,
    place: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
    tokenizer: Any,
    resolution: dict[str, int | None],
) -> tuple[Any, Any, Any, VideoProcessing | None]:
    """Loads (model, tokenizer, family, video settings) from `place`, the result of find_model(name).

    Model and tokenizer get the name that the user gave, so that an adapter saves it as its base model. An error in the
    resolution is raised before weights are read.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        family = family_of(config)
        processing = _processing(family, config, place, resolution)
        model = family.load_class().from_pretrained(place, dtype=dtype, trust_remote_code=trust_remote_code)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
            tokenizer.name_or_path = name
    except (OSError, SafetensorError) as error:  # raised by transformers if a file is missing or truncated
        reason = " ".join(str(error).split())
        raise UserError(f"model_name_or_path={name!r} cannot be loaded: {reason}") from error
    for part in (model, model.config):
        part.name_or_path = name
    return model, tokenizer, family, processing


def _processing(
    family: Family, config: Any, place: str | None, resolution: dict[str, int | None]
) -> VideoProcessing | None:
    """Returns the video settings, or None for the family's defaults. place: the folder or repository with the model's own."""
    processing = None
    if place is not None and family.placeholder_token:
        processing = family.processing(config, _preprocessor(place))
    if any(value is not None for value in resolution.values()):
        processing = with_resolution(processing or family.processing(config), family=family.name, **resolution)
    return processing


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> tuple[Any, Family]:
    """Loads the tokenizer that load_policy would use, and finds the model's family, without loading the model."""
    if name_or_path.startswith("tiny:"):
        from synpo_fast.models.tiny import tiny_tokenizer

        family = _known_family(name_or_path)
        return tiny_tokenizer(family.name), family
    from transformers import AutoConfig, AutoTokenizer

    place = find_model(name_or_path)
    family = family_of(AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code))
    return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code), family


def _known_family(name: str) -> Family:
    """Returns the family in "tiny:<family>"."""
    family = FAMILIES.get(name.removeprefix("tiny:"))
    if family is None:
        raise UserError(f"unknown family in {name!r}, expected one of {', '.join(FAMILIES)}")
    return family


def _set_attention(policy: Policy, wanted: str, device: torch.device, dtype: torch.dtype) -> None:
    """Sets the language model's attention.

    Responses that run in rows of their own need no layout, so there auto keeps transformers' choice.
    """
    config: Any = policy.family.language_model(policy.base).config
    reason_for_own_rows = policy.reason_for_own_rows
    if reason_for_own_rows is None:
        _check_layers(policy.base.config, policy.family.name)
        policy.attn_implementation, reason = attention.choose(wanted, device, dtype, policy.base.config)
    elif wanted in (attention.SEGMENTS, attention.VARLEN):
        raise UserError(
            f"attn_implementation={wanted!r} is for rows that several responses share, and {policy.family.name} "
            f"{reason_for_own_rows}: take auto, sdpa or eager"
        )
    else:
        before = config._attn_implementation
        policy.attn_implementation = before if wanted == "auto" else attention.choose(wanted, device, dtype, config)[0]
        reason = (
            f"{policy.attn_implementation}, each response in a row of its own, because {policy.family.name} "
            f"{reason_for_own_rows}"
        )
    config._attn_implementation = policy.attn_implementation
    policy.notes.append(f"attention: {reason}")


def _check_layers(config: Any, family: str) -> None:
    """Raises ValueError for layers without full attention: our attention would silently ignore a sliding window."""
    others = attention_kinds(config) - {"full_attention"}
    if others:
        raise UserError(f"{family}: layers of type {', '.join(sorted(others))} cannot be run on packed rows")


def _preprocessor(name: str) -> dict[str, Any] | None:
    """Reads the model's own video settings from its folder or repository; the file for videos has priority."""
    from transformers.utils import cached_file

    for file in ("video_preprocessor_config.json", "preprocessor_config.json"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            return json.loads(Path(path).read_text())
    return None


def _apply_liger(policy: Policy, device: torch.device) -> str:
    if device.type != "cuda":
        raise UserError(f"liger_kernels=True needs a CUDA device, got {device}")
    try:
        counts = apply_liger_kernels(policy.base, policy.family.language_model(policy.base))
    except ImportError as error:
        raise MissingPackage(
            f"liger_kernels=True needs liger-kernel: pip install 'synpo-fast[gpu]' ({error})"
        ) from error
    return "Liger's kernels: " + ", ".join(f"{count} {kind}" for kind, count in counts.items())
