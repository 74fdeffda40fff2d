"""Every option of a training run: name (as in Hugging Face's and TRL's trainers), type, default, help text and bounds.

The help, docs/training.md and config.yaml list options in this order. checks.py refuses combinations that contradict each other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from synpo_fast.config.option import facts_of, option
from synpo_fast.losses import LOSSES
from synpo_fast.losses.nll import TARGETS
from synpo_fast.losses.weighted_sum import SFT

REFERENCES = ("auto", "adapter_off", "frozen_copy", "precomputed")
PAIRS_FROM = ("all", "best_worst", "best_rest")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")

_model = partial(option, group="Model")
_adapter = partial(option, group="Adapter")
_data = partial(option, group="Data")
_loss = partial(option, group="Loss")
# An option of one or more losses is one line here. LOSSES tells the help which losses have it and which words they accept.
_of_loss = partial(option, None, group="Loss", of_loss=True)
_optim = partial(option, group="Optimisation")
_deepspeed = partial(option, group="DeepSpeed")
_output = partial(option, group="Output")


@dataclass(frozen=True)
class TrainOptions:
    """The values of all options, not yet checked; TrainConfig checks them."""

    model_name_or_path: str = _model(
        "", "required: Hugging Face hub name, folder, or tiny:<family> for a small random model", is_path=True
    )
    model_options: dict[str, Any] = _model(dict, "sizes of a tiny:<family> model, as key=value,key=value")
    trust_remote_code: bool = _model(False, "run Python code that comes with the model")
    attn_implementation: str = _model(
        "auto",
        "attention of the language model: auto, sdpa, eager, synpo_fast_segments or synpo_fast_varlen. auto: varlen "
        "for bf16 and fp16 on a GPU of compute capability 8.0 or higher, segments otherwise; a dense mask for a model "
        "that needs one",
    )
    vision_attn_implementation: str = _model(
        "auto",
        "attention of the vision tower: auto, sdpa, eager, synpo_fast_varlen, synpo_fast_segments or "
        "flash_attention_2. auto: on a GPU varlen (segments in fp32) if the tower runs all frames as one row, sdpa "
        "otherwise",
    )
    freeze_vision: bool = _model(True, "keep the vision tower and the projector frozen")
    gradient_checkpointing: bool | None = _model(
        None,
        "recompute activations in the backward pass: keeps one layer's activations instead of all layers', for one "
        "more forward pass (about a third more time per step). Default: true on a GPU",
    )
    liger_kernels: bool = _model(
        False,
        "use Liger's norms, rotary embeddings and gated MLPs (GPU only); a run prints at its start how many it uses",
    )
    bf16: bool | None = _model(
        None, "train in bfloat16 with fp32 master weights. Default: true on a GPU unless fp16 is set"
    )
    fp16: bool = _model(False, "train in float16 with dynamic loss scaling and fp32 master weights")
    use_cpu: bool = _model(False, "do not use a GPU even if there is one")

    use_peft: bool = _adapter(True, "train a LoRA adapter on the language model; false: full fine-tuning")
    lora_r: int = _adapter(128, "rank of the adapter", above=0)
    lora_alpha: int = _adapter(64, "scale of the adapter: its output is multiplied by lora_alpha / lora_r", above=0)
    lora_dropout: float = _adapter(0.05, "dropout on the adapter's input", at_least=0, below=1)
    lora_target_modules: tuple[str, ...] = _adapter(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "layers of the language model that get an adapter",
    )

    train_file: str = _data(
        "",
        "required: manifest of pairs, as JSONL, Parquet, or a datasets folder; FOLDER:train names a split",
        is_path=True,
    )
    eval_file: str | None = _data(None, "manifest of held-out pairs", is_path=True)
    eval_split: float = _data(
        0.0,
        "share of train_file held out for evaluation if there is no eval_file; pairs of one video file stay together",
        at_least=0,
        below=1,
    )
    video_root: str | None = _data(
        None, "folder that the manifest's video paths are relative to. Default: the manifest's folder", is_path=True
    )
    video_backend: str = _data("auto", "video decoder: auto, pyav, dali, torchcodec or images")
    video_device: str = _data(
        "cpu",
        "where videos are decoded. cuda: on the GPU, by DALI where that is faster, ahead of time in a thread instead "
        "of dataloader_num_workers processes",
        ("cpu", "cuda"),
    )
    num_frames: int | None = _data(
        None, "frames taken from every video. Default: chosen by fps, min_frames and max_frames", above=0
    )
    fps: float = _data(0.5, "frames taken per second of video", above=0, at_most=1000)
    min_frames: int = _data(8, "take at least this many frames of a video", above=0)
    max_frames: int = _data(16, "take at most this many frames of a video", above=0)
    max_pixels: int | None = _data(
        None,
        "most pixels of a video, counted as the model's own processor does: per frame (Qwen2.5-VL), or over all "
        "frames (Qwen3-VL, VideoLLaMA3). Not for LLaVA-OneVision and InternVL, which use squares of one size. "
        "Default: the model's own",
        above=0,
    )
    min_pixels: int | None = _data(
        None,
        "least pixels of a video: per frame (Qwen2.5-VL, VideoLLaMA3), or over all frames (Qwen3-VL). Default: the "
        "model's own",
        above=0,
    )
    video_max_tokens: int | None = _data(
        None,
        "most tokens of a video: its frames are made smaller, down to min_pixels, until it fits; a video that cannot "
        "fit is skipped and counted. Not for LLaVA-OneVision and InternVL",
        above=0,
    )
    max_length: int | None = _data(
        None, "a pair with more tokens is skipped and counted; text is never truncated", above=0
    )
    min_score_gap: float | None = _data(
        None,
        "leave out pairs whose scores differ by less than this; of a row with several responses, only comparisons of "
        "such responses",
        at_least=0,
    )
    pairs_from: str = _data(
        None,
        "which responses of a row with several are compared. all: every two whose scores differ, since prompt and "
        "video run once for all of them; best_worst: the best with the worst, as SynPO's authors train; best_rest: the "
        "best with each other one. The loss is a mean over comparisons. Default: all; for kto and apo_zero_unpaired "
        "best_worst, so that each response counts once",
        PAIRS_FROM,
    )
    allow_bad_rows: bool = _data(
        False, "train although the manifest has bad rows, which are left out. Default: stop and list them"
    )
    max_bad_share: float = _data(
        0.05, "stop when more than this share of the pairs seen so far could not be used", at_least=0, at_most=1
    )
    dataloader_num_workers: int = _data(
        2, "worker processes that decode videos; 0: the training process decodes them", at_least=0
    )
    prefetch_steps: int = _data(2, "steps whose videos are decoded ahead", above=0)
    prefetch_mb: int = _data(
        2048,
        "at most this many MiB of decoded videos are held ahead for each device; the next step is always read "
        "completely",
        at_least=0,
    )
    feature_cache: str | None = _data(
        None, "folder that keeps the frozen vision tower's features across epochs and runs", is_path=True
    )

    loss_type: str = _loss(
        "synpo",
        "the loss; sft is the NLL of the chosen response, and alone it does not run the rejected one. Several, separated "
        "by commas, are added up (MPO: "
        "dpo,bco_pair,sft with loss_weights 0.8,0.2,1). TRL's name sigmoid means dpo",
        (*LOSSES, SFT),
        several=True,
    )
    loss_weights: tuple[float, ...] | None = _of_loss("a weight for each loss of loss_type. Default: 1 each")
    alpha: float | None = _of_loss("scale of the difference of the two rewards")
    beta: float | None = _of_loss(
        "for synpo and synpo_ref the weight of the chosen response's likelihood, else the scale of the rewards"
    )
    gamma: float | None = _of_loss("margin by which the chosen reward should be greater")
    link: str | None = _of_loss("applied to the scaled difference of the rewards")
    variant: str | None = _of_loss("form of the loss")
    desirable_weight: float | None = _of_loss("weight of desirable (chosen) responses")
    undesirable_weight: float | None = _of_loss("weight of undesirable (rejected) responses")
    label_smoothing: float | None = _of_loss("assumed probability that chosen and rejected are swapped")
    f_divergence: str | None = _of_loss("divergence from the reference")
    f_alpha_divergence_coef: float | None = _of_loss("exponent of alpha_divergence; 1 is reverse_kl")
    ld_alpha: float | None = _of_loss("weight of the tokens beyond the shorter response's length, 0 to 1")
    discopop_tau: float | None = _of_loss("temperature of the blend of logistic and exponential loss")
    reference_free: bool | None = _of_loss("take the reference's log-probs as 0 and compute none")
    nll_weight: float | None = _of_loss("weight of the NLL of the chosen response")
    nll_reduce: str | None = _of_loss(
        "default: token_mean, the mean over each pair's tokens, which does not depend on how a step is split"
    )
    auxiliary_nll: float = _loss(0.0, "weight of an NLL term added to the loss", at_least=0)
    auxiliary_target: str = _loss("chosen", "text whose NLL is added; with ground_truth every pair needs one", TARGETS)
    label_smoothing_factor: float = _loss(
        0.0, "for sft: share of each token's target that lies on all words alike", at_least=0, below=1
    )
    z_loss: float = _loss(0.0, "for sft: weight of the square of each token's logsumexp, such as 1e-4", at_least=0)
    use_weighting: bool = _loss(
        False,
        "multiply each pair's preference loss by the policy's own probability of the two responses (WPO). Not for sft, aot "
        "and aot_unpaired",
    )
    reference: str = _loss(
        "auto",
        "where the reference of a loss comes from. auto: adapter_off, or frozen_copy without an adapter",
        REFERENCES,
    )
    share_prefix: bool = _loss(True, "run video and prompt once for all responses of a row")
    head_memory_mb: int | None = _loss(
        None,
        "if the LM head trains, at most this many MiB of a micro-batch's logits are stored, as exponentials, for its "
        "gradient; the others are computed twice. Default: 2048 on a GPU, 1024 on a CPU",
        at_least=0,
    )
    row_tokens: int | None = _loss(
        None,
        "bound on the tokens of a packed row; a longer pair gets a row of its own. Default: a micro-batch is one row",
        above=0,
    )

    per_device_train_batch_size: int = _optim(1, "rows of the manifest in a micro-batch", above=0)
    gradient_accumulation_steps: int = _optim(1, "micro-batches in an optimiser step, on each device", above=0)
    max_batch_tokens: int | None = _optim(None, "a micro-batch with more tokens than this is split further", above=0)
    num_train_epochs: float = _optim(
        1.0, "number of epochs; a fraction is rounded up to whole steps", above=0, at_most=1e6
    )
    max_steps: int = _optim(-1, "number of optimiser steps, instead of num_train_epochs; -1: not set", at_least=-1)
    learning_rate: float = _optim(5e-6, "peak learning rate", above=0, at_most=1)
    weight_decay: float = _optim(0.0, "decoupled weight decay, applied to matrices only", at_least=0)
    adam_beta1: float = _optim(0.9, "AdamW's decay rate of the first moment", at_least=0, below=1)
    adam_beta2: float = _optim(0.999, "AdamW's decay rate of the second moment", at_least=0, below=1)
    adam_epsilon: float = _optim(1e-8, "AdamW's epsilon", at_least=1e-30)
    max_grad_norm: float = _optim(1.0, "gradients are clipped to this norm; 0: no clipping", at_least=0)
    lr_scheduler_type: str = _optim("linear", "shape of the learning rate after the warm-up", SCHEDULES)
    warmup_ratio: float = _optim(0.1, "share of all optimiser steps used for warm-up", at_least=0, at_most=1)
    warmup_steps: int = _optim(0, "number of warm-up steps, instead of warmup_ratio; 0: use warmup_ratio", at_least=0)
    oom_policy: str = _optim(
        "stop",
        "if a micro-batch does not fit into memory. stop: end the run and name the pair; skip: take the step without "
        "that micro-batch and count it",
        ("stop", "skip"),
    )
    seed: int = _optim(42, "random seed for the order of the pairs, dropout and new weights", at_least=0)
    max_nonfinite_steps: int = _optim(
        5, "stop after this many steps in a row whose loss or gradient is not finite", above=0
    )

    zero_stage: int = _deepspeed(
        None,
        "what DeepSpeed shards: 0 nothing, 1 optimiser states, 2 also gradients, 3 also weights. Default: 1 with an "
        "adapter (gradients are sent once per step), 2 without (they are sent after every micro-batch)",
        at_least=0,
        at_most=3,
    )
    offload_optimizer: bool = _deepspeed(False, "keep optimiser state in host memory (ZeRO 1-3)")
    deepspeed: str | None = _deepspeed(
        None,
        "JSON file with entries to add to DeepSpeed's configuration; entries that this trainer sets itself are refused",
        is_path=True,
    )
    local_rank: int = _deepspeed(-1, "set by the launcher", at_least=-1)

    output_dir: str = _output("", "required: folder for checkpoints, metrics and the resolved config", is_path=True)
    resume: str | None = _output(
        None,
        "auto: resume from the newest whole checkpoint of output_dir, if there is one; or the folder of a checkpoint "
        "or of a run",
        is_path=True,
    )
    overwrite_output_dir: bool = _output(
        False,
        "start at step 0 in a folder that holds an earlier run, and delete all that runs write there; your own files "
        "stay",
    )
    save_steps: int = _output(
        100, "save a checkpoint every this many steps and at the end; 0: only at the end", at_least=0
    )
    save_total_limit: int | None = _output(
        3, "number of this run's checkpoints to keep, the newest ones; none: all", above=0
    )
    logging_steps: int = _output(1, "write a line of metrics, their means, every this many steps", above=0)
    eval_steps: int = _output(0, "evaluate every this many steps and at the end; 0: only at the end", at_least=0)
    eval_on_start: bool = _output(True, "also evaluate before the first step, if there are held-out pairs")
    load_best_model_at_end: bool = _output(
        False,
        "save a checkpoint at each evaluation that is the best so far, never delete the best one, and copy its model "
        "files to the top of output_dir at the end",
    )
    metric_for_best_model: str | None = _output(
        None, "number of an evaluation to compare, with or without eval_: loss, rewards/accuracies, ... Default: loss"
    )
    greater_is_better: bool | None = _output(
        None, "a greater number is better. Default: true unless the metric's name ends in loss or begins with loss/"
    )
    early_stopping_patience: int | None = _output(
        None, "stop after this many evaluations in a row that do not improve on the best one before them", above=0
    )
    per_device_eval_batch_size: int = _output(4, "rows of the manifest in an evaluation step", above=0)
    num_eval_captions: int = _output(2, "captions that the model writes at each evaluation", at_least=0)
    max_new_tokens: int = _output(256, "most tokens in such a caption", above=0)
    diagnostics: int = _output(
        0, "every this many steps, measure the gradient norms of chosen and of rejected rewards; 0: never", at_least=0
    )
    profile: int = _output(
        0,
        "measure this many rounds of steps, with this loss and with dpo, instead of training, and write profile.json; "
        "0: train",
        at_least=0,
    )
    report: bool = _output(True, "write report.html at the end of the run")
    report_to: tuple[str, ...] = _output(
        (), "tensorboard and wandb, separated by a comma, or none; metrics.jsonl is always written"
    )
    run_name: str | None = _output(None, "name of the run for W&B")
    disable_tqdm: bool = _output(False, "show no progress bar")
    verbose: bool = _output(False, "show what libraries print: banners, warnings of future changes, progress bars")


LOSS_OPTIONS = tuple(item.name for item in fields(TrainOptions) if facts_of(item).of_loss)
