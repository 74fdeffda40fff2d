"""Checks a config: first each value against its own bounds and choices, then combinations of options that contradict each other.

Every mistake is a UserError of one line that names the values and the way out.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from synpo_fast.config.option import facts_of
from synpo_fast.errors import UserError
from synpo_fast.losses import AuxiliaryNLL, check_options, spec_of
from synpo_fast.losses.checks import check_number
from synpo_fast.losses.metric_sums import LOGIT_METRICS, WEIGHTS
from synpo_fast.losses.weighted_sum import LOSS_METRIC, SFT, members_of

if TYPE_CHECKING:
    from synpo_fast.config.train_config import TrainConfig

REPORTERS = ("tensorboard", "wandb")
EVAL_METRICS = ("loss", *(name for name in WEIGHTS if name not in LOGIT_METRICS))  # the trainer makes no logits
OF_SFT = ("loss", "nll_loss", "mean_token_accuracy", "entropy")


def check_config(config: TrainConfig) -> None:
    """Raises UserError for the first mistake found."""
    _check_steps(config)
    _check_values(config)
    for check in (
        _check_numbers,
        _check_required,
        _check_loss,
        _check_reference,
        _check_start,
        _check_memory,
        _check_best,
    ):
        check(config)


def _check_steps(config: TrainConfig) -> None:
    """Checks max_steps, where one value below its bound has a meaning."""
    wanted = "above 0, or -1 to use num_train_epochs"
    if config.max_steps == 0:
        raise UserError(f"max_steps must be {wanted}, got 0")
    if isinstance(config.max_steps, int) and config.max_steps < -1:
        raise UserError(f"max_steps is {config.max_steps}, expected {wanted}")


def _check_values(config: TrainConfig) -> None:
    """Checks each value by itself."""
    for item in fields(config):
        value, facts = getattr(config, item.name), facts_of(item)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            limit = {"below": 2**63} if isinstance(value, int) else {}  # torch counts in int64
            try:
                check_number(item.name, value, **limit | facts.bounds)
            except ValueError as error:
                raise UserError(str(error)) from error
        words = value.split(",") if facts.several and isinstance(value, str) else [value]
        if facts.choices and not all(word in facts.choices for word in words):
            raise UserError(
                f"{item.name} must be one of {', '.join(facts.choices)}, got {value!r}{_near(words, facts.choices)}"
            )
    for name in config.report_to:
        if name not in REPORTERS:
            raise UserError(f"report_to takes {', '.join(REPORTERS)} or none, got {name!r}")


def _near(words: list[Any], choices: tuple[str, ...]) -> str:
    """The end of a message: the choice that was probably meant, or that a word is missing; "" if there is no such thing."""
    wrong = next(str(word) for word in words if word not in choices)
    if not wrong:
        return ": one of its names is empty" if len(words) > 1 else ""
    near = difflib.get_close_matches(wrong.lower(), choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _check_numbers(config: TrainConfig) -> None:
    if config.min_pixels is not None and config.max_pixels is not None and config.min_pixels > config.max_pixels:
        raise UserError(f"min_pixels={config.min_pixels} is above max_pixels={config.max_pixels}")
    if config.min_frames > config.max_frames:
        raise UserError(f"min_frames={config.min_frames} is above max_frames={config.max_frames}")
    if config.learning_rate * config.weight_decay >= 1:
        raise UserError(
            f"learning_rate={config.learning_rate} x weight_decay={config.weight_decay} is 1 or more: each step multiplies "
            "the weights by 1 minus this product, so they would vanish; lower one of the two"
        )


def _check_required(config: TrainConfig) -> None:
    if config.use_peft and not config.lora_target_modules:
        raise UserError("lora_target_modules is empty: name the layers that get an adapter, or set use_peft=false")
    if not config.model_name_or_path:
        raise UserError("model_name_or_path is missing: a hub name, a folder, or tiny:qwen2_5_vl to try things out")
    if not config.train_file:
        raise UserError("train_file is missing: the manifest of pairs (synpo-fast pairs import makes one)")
    if config.eval_file and config.eval_split:
        raise UserError(f"give eval_file or eval_split, not both, got {config.eval_file!r} and {config.eval_split}")
    if config.eval_steps and not (config.eval_file or config.eval_split):
        raise UserError(
            f"eval_steps={config.eval_steps}, but no pairs are held out: set eval_file or eval_split, or leave eval_steps at 0"
        )


def _check_loss(config: TrainConfig) -> None:
    try:
        known = {} if config.loss_type == SFT else spec_of(config.loss_type).options
    except ValueError as error:
        raise UserError(f"loss_type: {error}") from error
    for name in config.loss_options:
        if name not in known:
            raise UserError(
                f"loss_type={config.loss_type} has no option {name}; it has {', '.join(known) or 'none'}"
                f"{_elsewhere(config, name)}"
            )
    if config.loss_type == SFT and config.auxiliary_nll:
        raise UserError("loss_type=sft is an NLL already: leave auxiliary_nll at 0")
    for name in ("label_smoothing_factor", "z_loss"):
        if getattr(config, name) and config.loss_type != SFT:
            raise UserError(f"{name} is for loss_type=sft, not for {config.loss_type}")
    if config.loss_type != SFT:
        try:
            auxiliary = AuxiliaryNLL(config.auxiliary_target, config.auxiliary_nll) if config.auxiliary_nll else None
            check_options(config.loss_type, auxiliary=auxiliary, **config.loss_options)
        except ValueError as error:
            raise UserError(f"loss_type={config.loss_type}: {error}") from error
    if config.reads_single_responses and config.desirable_weight == 0 and config.undesirable_weight == 0:
        raise UserError(
            "desirable_weight and undesirable_weight are both 0, so nothing would be trained: set one of them"
        )
    if config.auxiliary_target != "chosen" and not config.auxiliary_nll:
        raise UserError(
            f"auxiliary_target={config.auxiliary_target} has no effect while auxiliary_nll is 0: set its weight"
        )
    _check_batch(config)


def _elsewhere(config: TrainConfig, name: str) -> str:
    """The end of a message about an option that a loss does not have: what has that option, if this is known."""
    if name == "loss_weights":
        return "; weights need several losses, separated by commas"
    if name == "label_smoothing" and config.loss_type == SFT:
        return "; label_smoothing_factor is the label smoothing of sft"
    return ""


def _check_batch(config: TrainConfig) -> None:
    """Checks what a loss needs of a batch, and what WPO's weights need of a loss."""
    sorts = config.loss_type != SFT and spec_of(config.loss_type).sorts_batch
    if sorts and config.per_device_train_batch_size == 1:
        raise UserError(
            f"loss_type={config.loss_type} sorts the pairs of a micro-batch, and per_device_train_batch_size=1 leaves nothing to "
            "sort, unless its row has several responses: set it to 2 or more, or use dpo"
        )
    if sorts and config.max_batch_tokens is not None:
        raise UserError(
            f"loss_type={config.loss_type} sorts the pairs of a micro-batch, and max_batch_tokens={config.max_batch_tokens} may "
            "leave one pair in it, which has nothing to sort: leave it unset and set per_device_train_batch_size"
        )
    if config.use_weighting and config.reads_single_responses:
        raise UserError(
            f"use_weighting=true weighs pairs, and loss_type={config.loss_type} reads single responses: leave it unset"
        )
    if config.use_weighting and (sorts or config.loss_type == SFT):
        raise UserError(
            f"use_weighting=true weighs the preference loss of each pair, and loss_type={config.loss_type} "
            f"{'compares sorted values, which belong to no pair' if sorts else 'has none'}: leave use_weighting unset"
        )


def _check_reference(config: TrainConfig) -> None:
    if config.reference != "auto" and not config.needs_reference:
        why = " with reference_free=true" if config.reference_free else ""
        raise UserError(
            f"loss_type={config.loss_type}{why} reads no reference: leave reference at auto, got {config.reference}"
        )
    if not config.needs_reference:
        return
    if config.reference_kind == "adapter_off" and not config.use_peft:
        raise UserError("reference=adapter_off needs use_peft=true: without an adapter use frozen_copy or precomputed")
    if config.reference_kind == "frozen_copy" and config.zero_stage == 3:
        raise UserError(
            "reference=frozen_copy would hold a whole model on every device, which zero_stage=3 exists to avoid: "
            "use adapter_off (with use_peft=true) or precomputed"
        )


def _check_start(config: TrainConfig) -> None:
    if not config.output_dir:
        raise UserError("output_dir is missing: the folder for checkpoints and metrics")
    if config.resume and config.overwrite_output_dir:
        raise UserError("resume keeps what overwrite_output_dir would delete: choose one")
    if config.profile and (config.resume or config.overwrite_output_dir):
        raise UserError(
            "profile measures the model as it is before training and deletes nothing: leave resume and "
            "overwrite_output_dir unset"
        )
    if config.profile and config.reference_free:
        raise UserError("profile compares with dpo's references: leave reference_free unset")
    if config.profile and (config.label_smoothing_factor or config.z_loss):
        raise UserError("profile compares with dpo, which has neither: leave label_smoothing_factor and z_loss unset")
    if config.diagnostics and config.loss_type == SFT:
        raise UserError("diagnostics compare chosen and rejected rewards: loss_type=sft has none")
    for name in ("diagnostics", "profile"):
        if config.reads_single_responses and getattr(config, name):
            raise UserError(
                f"{name} compares pairs: leave it unset with loss_type={config.loss_type}, which reads single responses"
            )


def _check_memory(config: TrainConfig) -> None:
    """Checks the types of the weights, the ZeRO stage, and which weights train."""
    if config.fp16 and config.bf16:
        raise UserError("bf16 and fp16 are both set: choose one")
    if config.zero_stage == 0 and (config.fp16 or config.bf16):
        raise UserError(
            "zero_stage=0 keeps no fp32 master weights for bf16 or fp16: use zero_stage=1, which costs nothing on one device"
        )
    if config.diagnostics and config.zero_stage == 3:
        raise UserError("diagnostics need whole gradients, which zero_stage=3 does not keep: use stage 2 or below")
    if config.zero_stage == 3 and config.row_tokens is not None:
        raise UserError("zero_stage=3 needs the same number of rows on every device: leave row_tokens unset")
    if config.zero_stage == 3 and config.feature_cache:
        raise UserError(
            "zero_stage=3 needs every device to run the vision tower equally often: leave feature_cache unset"
        )
    if config.oom_policy == "skip" and (config.zero_stage > 1 or config.offload_optimizer):
        raise UserError(
            f"oom_policy=skip needs zero_stage 0 or 1 without offload_optimizer, got zero_stage={config.zero_stage}, "
            f"offload_optimizer={str(config.offload_optimizer).lower()}: otherwise processes exchange gradients or weights "
            "within a micro-batch, and a process that ran out of memory cannot take part"
        )
    if config.oom_policy == "skip" and config.needs_kl:
        raise UserError(
            f"oom_policy=skip is not possible with loss_type={config.loss_type}: processes exchange its reference point within a "
            "forward, and a process that ran out of memory cannot take part; leave oom_policy unset"
        )
    if config.offload_optimizer and config.zero_stage == 0:
        raise UserError("offload_optimizer needs zero_stage 1, 2 or 3")
    if config.use_peft and not config.freeze_vision:
        raise UserError(
            "freeze_vision=false has no effect with use_peft=true, which trains only the adapter: set use_peft=false too"
        )
    if config.feature_cache and not config.freeze_vision:
        raise UserError(
            "feature_cache needs freeze_vision=true: the features of a tower that trains change at every step"
        )


def _check_best(config: TrainConfig) -> None:
    why = config.compares_evaluations
    if not why:
        for name in ("metric_for_best_model", "greater_is_better"):
            if getattr(config, name) is not None:
                raise UserError(f"{name} has no effect without load_best_model_at_end or early_stopping_patience")
        return
    if not config.eval_file and not config.eval_split:
        raise UserError(f"{why} compares evaluations, which need held-out pairs: give eval_file or eval_split")
    if not config.eval_steps:
        raise UserError(f"{why} compares evaluations, but eval_steps=0 evaluates only at the end: set eval_steps")
    compared = [name for name in EVAL_METRICS if config.loss_type != SFT or name in OF_SFT]
    compared = [name for name in compared if name != "kl" or config.reads_single_responses]
    if "," in config.loss_type:
        compared += [LOSS_METRIC + member for member in members_of(config.loss_type)]
    if config.best_metric.removeprefix("eval_") not in compared:
        raise UserError(
            f"metric_for_best_model is {config.metric_for_best_model!r}, expected a number that evaluation of "
            f"loss_type={config.loss_type} writes: {', '.join(compared)}"
        )
