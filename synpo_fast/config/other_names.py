"""Option names of other trainers: Hugging Face, TRL, ms-swift, LLaMA-Factory.

A name is an alias if its meaning is exactly the same. Otherwise a hint says which option to use here.
"""

from __future__ import annotations

ALIASES = {
    "lr": "learning_rate",
    "lora_rank": "lora_r",
    "model": "model_name_or_path",
    "f_divergence_type": "f_divergence",
}

_ADAMW = "the optimiser is AdamW: adam_beta1, adam_beta2, adam_epsilon and weight_decay set it"
_TYPES = "bf16=true or fp16=true choose the type of the weights, bf16=false means fp32; master weights are always fp32"
_LENGTH = "max_length skips and counts pairs with more tokens; text is never truncated"
_EVERY = "eval_steps and save_steps count optimiser steps; there is no strategy to choose"
_SPLIT = "eval_split holds out a share of train_file, eval_file names a manifest of held-out pairs"
_PEFT = "use_peft=true trains an adapter, use_peft=false all weights"
_LAYERS = "lora_target_modules names the layers of the language model that get an adapter, separated by commas"
_LOSS = "loss_type chooses the loss, or several separated by commas; variant, beta, gamma and label_smoothing are its options"
_QUANTISED = "weights are not quantised here; zero_stage=3 and offload_optimizer save memory"
_VISION = "freeze_vision is for the vision tower and the projector together"
_FRAMES = "fps, min_frames and max_frames choose the number of frames, or num_frames fixes it"
_NLL = "auxiliary_nll is the weight of an NLL term, auxiliary_target the text it is of"
_FILES = "train_file and eval_file name manifests; `synpo-fast pairs import` makes one from other formats"
_WORKERS = "dataloader_num_workers is the number of worker processes that decode videos, prefetch_steps the steps they are ahead"
_FUSED = "liger_kernels is for Liger's norms, rotary embeddings and MLPs; the head and the loss are always fused"
_ATTENTION = "attn_implementation chooses the attention; auto chooses the fastest that fits the device"
_REFERENCE = "reference=adapter_off, frozen_copy or precomputed says where the reference of a loss comes from"
_BATCH = "per_device_train_batch_size x gradient_accumulation_steps is the number of pairs in a step on each device"

HINTS = {
    "resume_from_checkpoint": "resume=auto resumes from the newest checkpoint of output_dir, resume=FOLDER from that "
    "checkpoint or from the newest one of that run",
    "optim": _ADAMW, "optimizer": _ADAMW,
    "torch_dtype": _TYPES, "dtype": _TYPES, "pure_bf16": _TYPES, "tf32": _TYPES,
    "cutoff_len": _LENGTH, "max_seq_length": _LENGTH, "max_prompt_length": _LENGTH, "max_completion_length": _LENGTH,
    "truncation_mode": _LENGTH, "truncation_strategy": _LENGTH,
    "eval_strategy": _EVERY, "evaluation_strategy": _EVERY, "save_strategy": _EVERY, "logging_strategy": _EVERY,
    "val_size": _SPLIT, "split_dataset_ratio": _SPLIT, "test_size": _SPLIT, "do_eval": _SPLIT, "do_train": _SPLIT,
    "finetuning_type": _PEFT, "train_type": _PEFT, "tuner_type": _PEFT, "sft_type": _PEFT,
    "lora_target": _LAYERS, "target_modules": _LAYERS,
    "stage": _LOSS, "rlhf_type": _LOSS, "pref_loss": _LOSS, "pref_beta": _LOSS, "simpo_gamma": _LOSS, "loss": _LOSS,
    "cpo_alpha": "nll_weight is the weight of the NLL in loss_type cpo and in its SimPO form",
    "pref_ftx": _NLL, "rpo_alpha": _NLL, "sft_weight": _NLL, "sft_alpha": _NLL,
    "quantization_bit": _QUANTISED, "load_in_4bit": _QUANTISED, "load_in_8bit": _QUANTISED, "quant_bits": _QUANTISED,
    "freeze_vision_tower": _VISION, "freeze_multi_modal_projector": _VISION, "freeze_vit": _VISION, "freeze_aligner": _VISION,
    "video_fps": _FRAMES, "video_maxlen": _FRAMES, "fps_max_frames": _FRAMES, "fps_min_frames": _FRAMES, "nframes": _FRAMES,
    "dataset": _FILES, "dataset_dir": _FILES, "dataset_name": _FILES, "eval_dataset": _FILES, "val_dataset": _FILES,
    "num_workers": _WORKERS, "preprocessing_num_workers": _WORKERS, "dataset_num_proc": _WORKERS,
    "dataloader_prefetch_factor": _WORKERS,
    "use_liger_kernel": _FUSED, "enable_liger_kernel": _FUSED, "use_liger_loss": _FUSED,
    "flash_attn": _ATTENTION, "attn_impl": _ATTENTION, "use_flash_attn": _ATTENTION, "padding_free": _ATTENTION,
    "precompute_ref_log_probs": _REFERENCE, "ref_model": _REFERENCE, "ref_model_name_or_path": _REFERENCE,
    "batch_size": _BATCH, "train_batch_size": _BATCH, "global_batch_size": _BATCH, "per_gpu_train_batch_size": _BATCH,
    "epochs": "num_train_epochs is the number of epochs", "num_epochs": "num_train_epochs is the number of epochs",
    "lr_scheduler": "lr_scheduler_type is the shape of the learning rate",
    "no_cuda": "use_cpu=true leaves the GPU alone", "logging_dir": "TensorBoard's files go to output_dir/tensorboard",
    "adapter_name_or_path": "`synpo-fast merge` adds an adapter to its model; train from the folder it writes",
    "template": "the model's own chat template is used",
}  # fmt: skip
