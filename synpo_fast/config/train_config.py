"""Every option of a training run: one dataclass, names as in Hugging Face's and TRL's trainers.

A run is described by, in this order: the defaults below, a packaged recipe (`--recipe NAME`), a YAML file (`--config FILE`),
and options of the command line. sources.py reads those; here is what an option means and which combinations make no
sense. All of it is checked before a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from synpo_fast.errors import UserError
from synpo_fast.losses import LOSSES, AuxiliaryNLL, check_options
from synpo_fast.losses.checks import check_number
from synpo_fast.losses.metric_sums import WEIGHTS

REFERENCES = ("auto", "adapter_off", "frozen_copy", "precomputed")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
REPORTERS = ("tensorboard", "wandb")
EVALUATED = ("loss", *(name for name in WEIGHTS if not name.startswith("logits/")))  # the trainer makes no logits
LOSS_OPTIONS = ("alpha", "beta", "gamma", "link", "variant", "label_smoothing")


def option(
    default: Any,
    text: str,
    choices: tuple[str, ...] = (),
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field with its help text and the values it takes. Every number must be finite, whether it has bounds or not."""
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {"help": text, "choices": choices, "bounds": {name: b for name, b in bounds.items() if b is not None}}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Raises ValueError that says what to do, for a value out of range and for options that contradict each other."""

    # Model
    model_name_or_path: str = option("", "hub name, folder, or tiny:<family> for a small random model")
    model_options: dict[str, Any] = option(dict, "sizes of a tiny: model, as key=value,key=value")
    trust_remote_code: bool = option(False, "run code that comes with the model")
    attn_implementation: str = option(
        "auto",
        "auto, sdpa, eager, synpo_fast_segments or synpo_fast_varlen; auto: varlen for bf16 and fp16 on a GPU from capability "
        "8.0 on, else segments; a dense mask for a model that needs one",
    )
    vision_attn_implementation: str = option(
        "auto",
        "of the vision tower: auto, sdpa, eager, synpo_fast_varlen, synpo_fast_segments or flash_attention_2; auto: on a GPU "
        "varlen (segments in fp32) where the tower runs all frames as one row, else sdpa",
    )
    freeze_vision: bool = option(True, "vision tower and projector do not train")
    gradient_checkpointing: bool | None = option(
        None,
        "recompute activations in the backward: a layer's are kept in place of all layers', for one more forward, about a third "
        "more time a step; default: on a GPU",
    )
    liger_kernels: bool = option(False, "Liger's norms, rotary and gated MLPs (GPU); the start of a run says how many")
    bf16: bool | None = option(
        None, "train in bfloat16 with fp32 master weights; default: on a GPU, unless fp16 is set"
    )
    fp16: bool = option(False, "train in float16 with dynamic loss scaling and fp32 master weights")
    use_cpu: bool = option(False, "do not use a GPU even if there is one")

    # Adapter
    use_peft: bool = option(True, "train a LoRA adapter on the language model; false: full fine-tuning")
    lora_r: int = option(128, "rank of the adapter", above=0)
    lora_alpha: int = option(64, "scale of the adapter", above=0)
    lora_dropout: float = option(0.05, "dropout in front of the adapter", at_least=0, below=1)
    lora_target_modules: tuple[str, ...] = option(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "layers of the language model that get an adapter",
    )

    # Data
    train_file: str = option("", "manifest of pairs: JSONL, Parquet, or a datasets folder; FOLDER:train names a split")
    eval_file: str | None = option(None, "manifest of held-out pairs")
    eval_split: float = option(
        0.0,
        "share of train_file held out for evaluation, by whole files, when there is no eval_file",
        at_least=0,
        below=1,
    )
    video_root: str | None = option(
        None, "folder the manifest's video paths are relative to; default: the manifest's own"
    )
    video_backend: str = option("auto", "auto, pyav, dali, torchcodec or images")
    video_device: str = option(
        "cpu",
        "cuda: decode on the GPU, by DALI where that pays, ahead in a thread in place of dataloader_num_workers processes",
        ("cpu", "cuda"),
    )
    num_frames: int | None = option(None, "frames of every video; default: by fps, min_frames and max_frames", above=0)
    fps: float = option(0.5, "frames taken a second", above=0, at_most=1000)
    min_frames: int = option(8, "at least so many frames of a video", above=0)
    max_frames: int = option(16, "at most so many frames of a video", above=0)
    max_pixels: int | None = option(
        None,
        "pixels of a video at most, as the model's own processor counts: of a frame (Qwen2.5-VL), of all frames together "
        "(Qwen3-VL, VideoLLaMA3); LLaVA-OneVision and InternVL take squares of one size. Default: the model's own",
        above=0,
    )
    min_pixels: int | None = option(
        None,
        "pixels of a video at least: of a frame (Qwen2.5-VL, VideoLLaMA3), of all frames together (Qwen3-VL). "
        "Default: the model's own",
        above=0,
    )
    video_max_tokens: int | None = option(
        None,
        "frames get smaller, down to min_pixels, until their video takes no more tokens than this; a video that can not is "
        "skipped and counted. Not for LLaVA-OneVision and InternVL",
        above=0,
    )
    max_length: int | None = option(
        None, "a pair with more tokens is skipped and counted; nothing is ever cut", above=0
    )
    min_score_gap: float | None = option(None, "leave out pairs whose scores are nearer than this", at_least=0)
    allow_bad_rows: bool = option(False, "train although rows of the manifest are bad; default: stop and list them")
    max_bad_share: float = option(
        0.05, "stop when more than this share of the pairs seen could not be used", at_least=0, at_most=1
    )
    dataloader_num_workers: int = option(2, "processes that decode videos; 0: the training process does", at_least=0)
    prefetch_steps: int = option(2, "steps decoded ahead", above=0)
    prefetch_mb: int = option(
        2048, "MiB of videos held ahead at most, on each device; the next step is always read whole", at_least=0
    )
    feature_cache: str | None = option(
        None, "folder that keeps the frozen vision tower's features between epochs and runs"
    )

    # Loss
    loss_type: str = option("synpo", "the loss; sft is the NLL of the chosen response", (*LOSSES, "sft"))
    alpha: float | None = option(None, "option of the loss (synpo)")
    beta: float | None = option(None, "option of the loss (all but sft)")
    gamma: float | None = option(None, "option of the loss (simpo)")
    link: str | None = option(None, "option of the loss (synpo): sigmoid or logsigmoid")
    variant: str | None = option(None, "option of the loss (dpo: sigmoid, hinge, ipo; cpo: sigmoid, hinge)")
    label_smoothing: float | None = option(None, "option of the loss (dpo, simpo, cpo)")
    auxiliary_nll: float = option(0.0, "weight of an NLL term added to the loss", at_least=0)
    auxiliary_target: str = option(
        "chosen", "whose NLL; with ground_truth every pair needs one", ("chosen", "ground_truth")
    )
    reference: str = option("auto", "where dpo's reference comes from; auto: adapter_off, or frozen_copy", REFERENCES)
    share_prefix: bool = option(True, "run video and prompt once for both responses")
    row_tokens: int | None = option(None, "bound of a packed row; default: a micro-batch is one row", above=0)

    # Optimisation
    per_device_train_batch_size: int = option(1, "pairs of a micro-batch", above=0)
    gradient_accumulation_steps: int = option(1, "micro-batches of an optimiser step, on each device", above=0)
    max_batch_tokens: int | None = option(None, "a micro-batch above this many tokens is split further", above=0)
    num_train_epochs: float = option(1.0, "epochs; a part of one counts in steps, rounded up", above=0, at_most=1e6)
    max_steps: int = option(-1, "optimiser steps, in place of num_train_epochs", at_least=-1)
    learning_rate: float = option(5e-6, "peak learning rate", above=0, at_most=1)
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only", at_least=0)
    adam_beta1: float = option(0.9, "Adam's first decay", at_least=0, below=1)
    adam_beta2: float = option(0.999, "Adam's second decay", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "Adam's epsilon", at_least=1e-30)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not at all", at_least=0)
    lr_scheduler_type: str = option("linear", "shape of the learning rate after the warm-up", SCHEDULES)
    warmup_ratio: float = option(0.1, "share of all optimiser steps that warm up", at_least=0, at_most=1)
    warmup_steps: int = option(0, "steps that warm up, in place of warmup_ratio", at_least=0)
    oom_policy: str = option(
        "stop",
        "for a micro-batch that does not fit the memory. stop: end, naming its pair; skip: take the step without it, counted",
        ("stop", "skip"),
    )
    seed: int = option(42, "order of the pairs, dropout, new weights", at_least=0)
    max_nonfinite_steps: int = option(
        5, "stop after so many steps in a row whose loss or gradient is not finite", above=0
    )

    # DeepSpeed
    zero_stage: int = option(
        None,
        "what DeepSpeed shards: 0 nothing, 1 optimiser, 2 gradients too, 3 weights too; default: 1 for an adapter, whose "
        "gradients are then sent once a step, 2 without one, where they are sent after every micro-batch",
        at_least=0,
        at_most=3,
    )
    offload_optimizer: bool = option(False, "keep optimiser state in host memory (ZeRO 1-3)")
    deepspeed: str | None = option(
        None, "DeepSpeed JSON whose entries are added; the ones this trainer sets are refused"
    )
    local_rank: int = option(-1, "set by the launcher", at_least=-1)

    # Output
    output_dir: str = option("", "checkpoints, metrics and the resolved config go here")
    resume: str | None = option(
        None,
        "auto: from the newest good checkpoint of output_dir if there is one; or a checkpoint's folder, or that of a run",
    )
    overwrite_output_dir: bool = option(
        False, "start anew in a folder that holds a run, and delete all that runs write there; your own files stay"
    )
    save_steps: int = option(100, "a checkpoint every so many steps, and at the end; 0: at the end only", at_least=0)
    save_total_limit: int | None = option(3, "so many checkpoints of this run are kept, the newest", above=0)
    logging_steps: int = option(1, "a line of metrics every so many steps: their means", above=0)
    eval_steps: int = option(0, "evaluate every so many steps, and at the end; 0: at the end only", at_least=0)
    eval_on_start: bool = option(True, "evaluate before the first step too, where there are held-out pairs")
    load_best_model_at_end: bool = option(
        False,
        "save a checkpoint at each evaluation that is the best so far, never delete the best one, and put its model files at the "
        "top of output_dir at the end",
    )
    metric_for_best_model: str | None = option(
        None, "number of an evaluation to compare, with or without eval_: loss, rewards/accuracies, ...; default: loss"
    )
    greater_is_better: bool | None = option(
        None, "whether a greater number is better; default: unless its name ends in loss"
    )
    early_stopping_patience: int | None = option(
        None, "stop after so many evaluations in a row that are no better than the best one before them", above=0
    )
    per_device_eval_batch_size: int = option(4, "pairs of an evaluation step", above=0)
    num_eval_captions: int = option(2, "captions written by the model at each evaluation", at_least=0)
    max_new_tokens: int = option(256, "length of those captions", above=0)
    diagnostics: int = option(
        0, "every so many steps: gradient norms of chosen and rejected rewards apart; 0: never", at_least=0
    )
    profile: int = option(
        0,
        "measure so many rounds of steps, this loss and dpo in turn, in place of training: profile.json; 0: train",
        at_least=0,
    )
    report: bool = option(True, "write report.html at the end of the run")
    report_to: tuple[str, ...] = option((), "tensorboard and wandb, or none; metrics.jsonl is always written")
    run_name: str | None = option(None, "name of the run for W&B")
    disable_tqdm: bool = option(False, "no progress bar")
    verbose: bool = option(
        False, "show what the libraries say while they start: banners, warnings of future changes, bars"
    )

    def __post_init__(self) -> None:
        if self.zero_stage is None:
            object.__setattr__(self, "zero_stage", 1 if self.use_peft else 2)
        for check in (_check_ranges, _check_choices, _check_loss, _check_reference, _check_output, _check_best):
            check(self)

    @property
    def loss_options(self) -> dict[str, Any]:
        """What was set of the loss's options; the loss knows the defaults of the others."""
        return {name: getattr(self, name) for name in LOSS_OPTIONS if getattr(self, name) is not None}

    @property
    def num_reading_processes(self) -> int:
        """They see no GPU."""
        return self.dataloader_num_workers if self.video_device == "cpu" else 0

    @property
    def reads_ahead(self) -> bool:
        """Whether videos are decoded while a step is computed: in processes, or for a GPU in a thread."""
        return self.num_reading_processes > 0 or self.video_device == "cuda"

    @property
    def compares_evaluations(self) -> str:
        """The option because of which evaluations are compared with each other, or "" where they are not."""
        if self.load_best_model_at_end:
            return "load_best_model_at_end"
        return "early_stopping_patience" if self.early_stopping_patience is not None else ""

    @property
    def best_metric(self) -> str:
        """`metric_for_best_model` as evaluation writes it."""
        return f"eval_{(self.metric_for_best_model or 'loss').removeprefix('eval_')}"

    @property
    def best_is_greater(self) -> bool:
        """`greater_is_better` with its default resolved, by Hugging Face's rule."""
        return not self.best_metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better

    @property
    def needs_reference(self) -> bool:
        return self.loss_type in LOSSES and LOSSES[self.loss_type].needs_reference

    @property
    def reference_kind(self) -> str:
        """`reference` with auto resolved."""
        if self.reference != "auto":
            return self.reference
        return "adapter_off" if self.use_peft else "frozen_copy"


def _check_ranges(config: TrainConfig) -> None:
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            widest = {"below": 2**63} if isinstance(value, int) else {}  # what torch can count
            try:
                check_number(item.name, value, **widest | item.metadata["bounds"])
            except ValueError as error:
                raise UserError(str(error)) from error
    if config.max_steps == 0:
        raise UserError("max_steps must be above 0, or -1 to go by num_train_epochs, got 0")
    if config.min_pixels is not None and config.max_pixels is not None and config.min_pixels > config.max_pixels:
        raise UserError(f"min_pixels={config.min_pixels} is above max_pixels={config.max_pixels}")
    if config.min_frames > config.max_frames:
        raise UserError(f"min_frames={config.min_frames} is above max_frames={config.max_frames}")
    if config.learning_rate * config.weight_decay >= 1:
        raise UserError(
            f"learning_rate={config.learning_rate} x weight_decay={config.weight_decay} is 1 or more: each step multiplies "
            "weights by 1 minus that, and none would be left of them"
        )


def _check_choices(config: TrainConfig) -> None:
    for item in fields(config):
        choices, value = item.metadata["choices"], getattr(config, item.name)
        if choices and value not in choices:
            raise UserError(f"{item.name} must be one of {', '.join(choices)}, got {value!r}")
    for name in config.report_to:
        if name not in REPORTERS:
            raise UserError(f"report_to takes {', '.join(REPORTERS)} or none, got {name!r}")
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
    if config.fp16 and config.bf16:
        raise UserError("bf16 and fp16 are both set: choose one")
    if config.zero_stage == 0 and (config.fp16 or config.bf16):
        raise UserError(
            "zero_stage=0 keeps no fp32 master weights for bf16 or fp16: use 1, which on one device costs nothing"
        )


def _check_loss(config: TrainConfig) -> None:
    known = LOSSES[config.loss_type].options if config.loss_type in LOSSES else {}
    for name in config.loss_options:
        if name not in known:
            raise UserError(f"loss_type={config.loss_type} has no option {name}; it has {', '.join(known) or 'none'}")
    if config.loss_type == "sft" and config.auxiliary_nll:
        raise UserError("loss_type=sft is an NLL already: leave auxiliary_nll at 0")
    if config.loss_type in LOSSES:
        try:
            auxiliary = AuxiliaryNLL(config.auxiliary_target, config.auxiliary_nll) if config.auxiliary_nll else None
            check_options(config.loss_type, auxiliary=auxiliary, **config.loss_options)
        except ValueError as error:
            raise UserError(f"loss_type={config.loss_type}: {error}") from error
    if config.auxiliary_target != "chosen" and not config.auxiliary_nll:
        raise UserError(
            f"auxiliary_target={config.auxiliary_target} has no effect while auxiliary_nll is 0: set its weight"
        )


def _check_reference(config: TrainConfig) -> None:
    if config.reference != "auto" and not config.needs_reference:
        raise UserError(
            f"loss_type={config.loss_type} reads no reference: leave reference at auto, got {config.reference}"
        )
    if not config.needs_reference:
        return
    if config.reference_kind == "adapter_off" and not config.use_peft:
        raise UserError("reference=adapter_off needs use_peft=true; else take frozen_copy or precomputed")
    if config.reference_kind == "frozen_copy" and config.zero_stage == 3:
        raise UserError(
            "reference=frozen_copy would hold a whole model on every device, which zero_stage=3 is there to avoid: "
            "take adapter_off (with use_peft) or precomputed"
        )


def _check_output(config: TrainConfig) -> None:
    if not config.output_dir:
        raise UserError("output_dir is missing: the folder for checkpoints and metrics")
    if config.resume and config.overwrite_output_dir:
        raise UserError("resume keeps what overwrite_output_dir would delete: choose one")
    if config.profile and (config.resume or config.overwrite_output_dir):
        raise UserError(
            "profile measures the model as training begins and deletes nothing: leave resume and "
            "overwrite_output_dir unset"
        )
    if config.diagnostics and config.zero_stage == 3:
        raise UserError("diagnostics need whole gradients, which zero_stage=3 does not keep: use stage 2 or below")
    if config.diagnostics and config.loss_type == "sft":
        raise UserError("diagnostics compare chosen and rejected rewards: loss_type=sft has none")
    if config.zero_stage == 3 and config.row_tokens is not None:
        raise UserError("zero_stage=3 needs the same number of rows on every device: leave row_tokens unset")
    if config.zero_stage == 3 and config.feature_cache:
        raise UserError("zero_stage=3 needs the vision tower run on every device alike: leave feature_cache unset")
    if config.oom_policy == "skip" and (config.zero_stage > 1 or config.offload_optimizer):
        raise UserError(
            f"oom_policy=skip needs zero_stage 0 or 1 without offload_optimizer, got {config.zero_stage}: above it processes "
            "exchange gradients or weights within a micro-batch, which one that ran out of memory cannot take part in"
        )
    if config.offload_optimizer and config.zero_stage == 0:
        raise UserError("offload_optimizer needs zero_stage 1, 2 or 3")
    if config.use_peft and not config.freeze_vision:
        raise UserError(
            "freeze_vision=false has no effect beside an adapter, which trains alone: set use_peft=false too"
        )
    if config.feature_cache and not config.freeze_vision:
        raise UserError("feature_cache needs freeze_vision=true: a tower that trains has no lasting features")


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
        raise UserError(f"{why} compares evaluations, and eval_steps=0 makes one, at the end: set eval_steps")
    compared = [name for name in EVALUATED if config.loss_type != "sft" or name in ("loss", "nll_loss")]
    if config.best_metric.removeprefix("eval_") not in compared:
        raise UserError(
            f"metric_for_best_model is {config.metric_for_best_model!r}, expected a number that evaluation of "
            f"loss_type={config.loss_type} writes: {', '.join(compared)}"
        )
