"""Every option of a training run: name (as in Hugging Face's and TRL's trainers), type, default, help text and bounds.

The order here is that of the help, of docs/training.md and of config.yaml. checks.py has the combinations that make no sense.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from synpo_fast.config.option import facts_of, option
from synpo_fast.losses import LOSSES
from synpo_fast.losses.nll import TARGETS

REFERENCES = ("auto", "adapter_off", "frozen_copy", "precomputed")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")

_model = partial(option, group="Model")
_adapter = partial(option, group="Adapter")
_data = partial(option, group="Data")
_loss = partial(option, group="Loss")
# An option of one or more losses is a line here; which losses take it, and what they take, the help reads from LOSSES.
_of_loss = partial(option, None, group="Loss", of_loss=True)
_optim = partial(option, group="Optimisation")
_deepspeed = partial(option, group="DeepSpeed")
_output = partial(option, group="Output")


@dataclass(frozen=True)
class TrainOptions:
    """The values of all options, not yet checked: see TrainConfig."""

    model_name_or_path: str = _model("", "hub name, folder, or tiny:<family> for a small random model", is_path=True)
    model_options: dict[str, Any] = _model(dict, "sizes of a tiny: model, as key=value,key=value")
    trust_remote_code: bool = _model(False, "run code that comes with the model")
    attn_implementation: str = _model(
        "auto",
        "auto, sdpa, eager, synpo_fast_segments or synpo_fast_varlen; auto: varlen for bf16 and fp16 on a GPU from capability "
        "8.0 on, else segments; a dense mask for a model that needs one",
    )
    vision_attn_implementation: str = _model(
        "auto",
        "of the vision tower: auto, sdpa, eager, synpo_fast_varlen, synpo_fast_segments or flash_attention_2; auto: on a GPU "
        "varlen (segments in fp32) where the tower runs all frames as one row, else sdpa",
    )
    freeze_vision: bool = _model(True, "vision tower and projector do not train")
    gradient_checkpointing: bool | None = _model(
        None,
        "recompute activations in the backward: a layer's are kept in place of all layers', for one more forward, about a third "
        "more time a step; default: on a GPU",
    )
    liger_kernels: bool = _model(False, "Liger's norms, rotary and gated MLPs (GPU); the start of a run says how many")
    bf16: bool | None = _model(
        None, "train in bfloat16 with fp32 master weights; default: on a GPU, unless fp16 is set"
    )
    fp16: bool = _model(False, "train in float16 with dynamic loss scaling and fp32 master weights")
    use_cpu: bool = _model(False, "do not use a GPU even if there is one")

    use_peft: bool = _adapter(True, "train a LoRA adapter on the language model; false: full fine-tuning")
    lora_r: int = _adapter(128, "rank of the adapter", above=0)
    lora_alpha: int = _adapter(64, "scale of the adapter", above=0)
    lora_dropout: float = _adapter(0.05, "dropout in front of the adapter", at_least=0, below=1)
    lora_target_modules: tuple[str, ...] = _adapter(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "layers of the language model that get an adapter",
    )

    train_file: str = _data(
        "", "manifest of pairs: JSONL, Parquet, or a datasets folder; FOLDER:train names a split", is_path=True
    )
    eval_file: str | None = _data(None, "manifest of held-out pairs", is_path=True)
    eval_split: float = _data(
        0.0,
        "share of train_file held out for evaluation, by whole files, when there is no eval_file",
        at_least=0,
        below=1,
    )
    video_root: str | None = _data(
        None, "folder the manifest's video paths are relative to; default: the manifest's own", is_path=True
    )
    video_backend: str = _data("auto", "auto, pyav, dali, torchcodec or images")
    video_device: str = _data(
        "cpu",
        "cuda: decode on the GPU, by DALI where that pays, ahead in a thread in place of dataloader_num_workers processes",
        ("cpu", "cuda"),
    )
    num_frames: int | None = _data(None, "frames of every video; default: by fps, min_frames and max_frames", above=0)
    fps: float = _data(0.5, "frames taken a second", above=0, at_most=1000)
    min_frames: int = _data(8, "at least so many frames of a video", above=0)
    max_frames: int = _data(16, "at most so many frames of a video", above=0)
    max_pixels: int | None = _data(
        None,
        "pixels of a video at most, as the model's own processor counts: of a frame (Qwen2.5-VL), of all frames together "
        "(Qwen3-VL, VideoLLaMA3); LLaVA-OneVision and InternVL take squares of one size. Default: the model's own",
        above=0,
    )
    min_pixels: int | None = _data(
        None,
        "pixels of a video at least: of a frame (Qwen2.5-VL, VideoLLaMA3), of all frames together (Qwen3-VL). "
        "Default: the model's own",
        above=0,
    )
    video_max_tokens: int | None = _data(
        None,
        "frames get smaller, down to min_pixels, until their video takes no more tokens than this; a video that can not is "
        "skipped and counted. Not for LLaVA-OneVision and InternVL",
        above=0,
    )
    max_length: int | None = _data(None, "a pair with more tokens is skipped and counted; nothing is ever cut", above=0)
    min_score_gap: float | None = _data(None, "leave out pairs whose scores are nearer than this", at_least=0)
    allow_bad_rows: bool = _data(False, "train although rows of the manifest are bad; default: stop and list them")
    max_bad_share: float = _data(
        0.05, "stop when more than this share of the pairs seen could not be used", at_least=0, at_most=1
    )
    dataloader_num_workers: int = _data(2, "processes that decode videos; 0: the training process does", at_least=0)
    prefetch_steps: int = _data(2, "steps decoded ahead", above=0)
    prefetch_mb: int = _data(
        2048, "MiB of videos held ahead at most, on each device; the next step is always read whole", at_least=0
    )
    feature_cache: str | None = _data(
        None, "folder that keeps the frozen vision tower's features between epochs and runs", is_path=True
    )

    loss_type: str = _loss("synpo", "the loss; sft is the NLL of the chosen response", (*LOSSES, "sft"))
    alpha: float | None = _of_loss()
    beta: float | None = _of_loss()
    gamma: float | None = _of_loss()
    link: str | None = _of_loss()
    variant: str | None = _of_loss()
    label_smoothing: float | None = _of_loss()
    reference_free: bool | None = _of_loss("take the reference's log-probs as 0, and make none")
    nll_weight: float | None = _of_loss("weight of the NLL of the chosen response")
    nll_reduce: str | None = _of_loss(
        "default: token_mean, a mean over each pair's tokens, with which it makes no difference how a step is split"
    )
    auxiliary_nll: float = _loss(0.0, "weight of an NLL term added to the loss", at_least=0)
    auxiliary_target: str = _loss("chosen", "whose NLL; with ground_truth every pair needs one", TARGETS)
    reference: str = _loss("auto", "where dpo's reference comes from; auto: adapter_off, or frozen_copy", REFERENCES)
    share_prefix: bool = _loss(True, "run video and prompt once for both responses")
    row_tokens: int | None = _loss(None, "bound of a packed row; default: a micro-batch is one row", above=0)

    per_device_train_batch_size: int = _optim(1, "pairs of a micro-batch", above=0)
    gradient_accumulation_steps: int = _optim(1, "micro-batches of an optimiser step, on each device", above=0)
    max_batch_tokens: int | None = _optim(None, "a micro-batch above this many tokens is split further", above=0)
    num_train_epochs: float = _optim(1.0, "epochs; a part of one counts in steps, rounded up", above=0, at_most=1e6)
    max_steps: int = _optim(-1, "optimiser steps, in place of num_train_epochs", at_least=-1)
    learning_rate: float = _optim(5e-6, "peak learning rate", above=0, at_most=1)
    weight_decay: float = _optim(0.0, "decoupled weight decay, on matrices only", at_least=0)
    adam_beta1: float = _optim(0.9, "Adam's first decay", at_least=0, below=1)
    adam_beta2: float = _optim(0.999, "Adam's second decay", at_least=0, below=1)
    adam_epsilon: float = _optim(1e-8, "Adam's epsilon", at_least=1e-30)
    max_grad_norm: float = _optim(1.0, "gradients are clipped to this norm; 0: not at all", at_least=0)
    lr_scheduler_type: str = _optim("linear", "shape of the learning rate after the warm-up", SCHEDULES)
    warmup_ratio: float = _optim(0.1, "share of all optimiser steps that warm up", at_least=0, at_most=1)
    warmup_steps: int = _optim(0, "steps that warm up, in place of warmup_ratio", at_least=0)
    oom_policy: str = _optim(
        "stop",
        "for a micro-batch that does not fit the memory. stop: end, naming its pair; skip: take the step without it, counted",
        ("stop", "skip"),
    )
    seed: int = _optim(42, "order of the pairs, dropout, new weights", at_least=0)
    max_nonfinite_steps: int = _optim(
        5, "stop after so many steps in a row whose loss or gradient is not finite", above=0
    )

    zero_stage: int = _deepspeed(
        None,
        "what DeepSpeed shards: 0 nothing, 1 optimiser, 2 gradients too, 3 weights too; default: 1 for an adapter, whose "
        "gradients are then sent once a step, 2 without one, where they are sent after every micro-batch",
        at_least=0,
        at_most=3,
    )
    offload_optimizer: bool = _deepspeed(False, "keep optimiser state in host memory (ZeRO 1-3)")
    deepspeed: str | None = _deepspeed(
        None, "DeepSpeed JSON whose entries are added; the ones this trainer sets are refused", is_path=True
    )
    local_rank: int = _deepspeed(-1, "set by the launcher", at_least=-1)

    output_dir: str = _output("", "checkpoints, metrics and the resolved config go here", is_path=True)
    resume: str | None = _output(
        None,
        "auto: from the newest good checkpoint of output_dir if there is one; or a checkpoint's folder, or that of a run",
        is_path=True,
    )
    overwrite_output_dir: bool = _output(
        False, "start anew in a folder that holds a run, and delete all that runs write there; your own files stay"
    )
    save_steps: int = _output(100, "a checkpoint every so many steps, and at the end; 0: at the end only", at_least=0)
    save_total_limit: int | None = _output(3, "so many checkpoints of this run are kept, the newest", above=0)
    logging_steps: int = _output(1, "a line of metrics every so many steps: their means", above=0)
    eval_steps: int = _output(0, "evaluate every so many steps, and at the end; 0: at the end only", at_least=0)
    eval_on_start: bool = _output(True, "evaluate before the first step too, where there are held-out pairs")
    load_best_model_at_end: bool = _output(
        False,
        "save a checkpoint at each evaluation that is the best so far, never delete the best one, and put its model files at the "
        "top of output_dir at the end",
    )
    metric_for_best_model: str | None = _output(
        None, "number of an evaluation to compare, with or without eval_: loss, rewards/accuracies, ...; default: loss"
    )
    greater_is_better: bool | None = _output(
        None, "whether a greater number is better; default: unless its name ends in loss"
    )
    early_stopping_patience: int | None = _output(
        None, "stop after so many evaluations in a row that are no better than the best one before them", above=0
    )
    per_device_eval_batch_size: int = _output(4, "pairs of an evaluation step", above=0)
    num_eval_captions: int = _output(2, "captions written by the model at each evaluation", at_least=0)
    max_new_tokens: int = _output(256, "length of those captions", above=0)
    diagnostics: int = _output(
        0, "every so many steps: gradient norms of chosen and rejected rewards apart; 0: never", at_least=0
    )
    profile: int = _output(
        0,
        "measure so many rounds of steps, this loss and dpo in turn, in place of training: profile.json; 0: train",
        at_least=0,
    )
    report: bool = _output(True, "write report.html at the end of the run")
    report_to: tuple[str, ...] = _output((), "tensorboard and wandb, or none; metrics.jsonl is always written")
    run_name: str | None = _output(None, "name of the run for W&B")
    disable_tqdm: bool = _output(False, "no progress bar")
    verbose: bool = _output(
        False, "show what the libraries say while they start: banners, warnings of future changes, bars"
    )


LOSS_OPTIONS = tuple(item.name for item in fields(TrainOptions) if facts_of(item).of_loss)
