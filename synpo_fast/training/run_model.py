"""Loads the model of a run and adds its adapter, its reference and, when resuming, the checkpoint's weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.data_key import data_key
from synpo_fast.errors import UserError
from synpo_fast.models.digest import tower_key, weights_key
from synpo_fast.models.feature_cache import FeatureCache
from synpo_fast.models.loading import load_policy
from synpo_fast.models.lora import add_lora, load_adapter
from synpo_fast.models.policy import Logps, Policy, Sample
from synpo_fast.references import (
    AdapterOff,
    Entries,
    FrozenCopy,
    Precomputed,
    Reference,
    detached_logps,
    is_fresh,
    precompute,
    read_logps,
    why_stale,
    write_logps,
)
from synpo_fast.run_folder.best_files import check_names_are_free
from synpo_fast.run_folder.model_files import names_beside_weights
from synpo_fast.run_folder.superseded import set_aside
from synpo_fast.terminal.console import say
from synpo_fast.training.engine import Engine
from synpo_fast.training.optimizer import make_optimizer
from synpo_fast.training.pair_module import PairModule
from synpo_fast.training.rank_zero import on_rank_zero
from synpo_fast.training.run_data import RunData, ordered_loader, resolution_of, sampling_of, videos_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RunModel:
    """The policy of a run, the module that trains it, and the training dtype."""

    policy: Policy
    module: PairModule
    dtype: torch.dtype


def training_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The training dtype: by default bf16 on a GPU (fp32 at stage 0) and fp32 on a CPU. Raises UserError for fp16 on a CPU."""
    if config.fp16:
        if device.type == "cpu":
            raise UserError("fp16 needs a GPU: DeepSpeed has no fp16 on a CPU; use bf16, or neither for fp32")
        return torch.float16
    wanted = config.bf16 if config.bf16 is not None else device.type == "cuda" and config.zero_stage > 0
    return torch.bfloat16 if wanted else torch.float32


def checkpoints_activations(config: TrainConfig, device: torch.device) -> bool:
    """True if activations are checkpointed: by default on a GPU, where memory limits a run."""
    return device.type == "cuda" if config.gradient_checkpointing is None else config.gradient_checkpointing


def build_model(config: TrainConfig, data: RunData, device: torch.device, checkpoint: Path | None) -> RunModel:
    """Builds the model, equally on every rank. The reference is the model as training began, also in a resumed run."""
    dtype = training_dtype(config, device)
    say(f"loading model {config.model_name_or_path}")
    policy = _load(config, config.model_name_or_path, device, dtype)
    if config.load_best_model_at_end:  # checked now: otherwise it would fail only at the end of the run
        on_rank_zero(lambda: _check_names_are_free(config, policy))
    if config.zero_stage == 3 and policy.reason_for_own_rows is not None:
        raise UserError(
            f"{policy.family.name} {policy.reason_for_own_rows}: each response runs as a row of its own, and zero_stage=3 needs "
            "the same number of rows on every device; use zero_stage=2"
        )
    if config.use_peft:
        torch.manual_seed(config.seed)  # decides the adapter's initial weights
        add_lora(
            policy,
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_target_modules,
        )
    if config.feature_cache:
        policy.feature_store = FeatureCache(config.feature_cache, tower=tower_key(policy))
    reference = make_reference(config, data, policy, device, dtype)
    if checkpoint is not None and config.use_peft:
        load_adapter(policy, checkpoint)
    elif checkpoint is not None:
        store = policy.feature_store
        policy = _load(config, str(checkpoint), device, dtype, like=policy)
        policy.feature_store = store
    policy.train()
    policy.keep_bytes = None if config.head_memory_mb is None else config.head_memory_mb * 2**20
    module = PairModule(policy, config)
    module.reference = reference
    return RunModel(policy, module, dtype)


def _check_names_are_free(config: TrainConfig, policy: Policy) -> None:
    names = names_beside_weights(policy, adapter=config.use_peft, source=config.model_name_or_path)
    check_names_are_free(Path(config.output_dir), names)


def build_engine(config: TrainConfig, model: RunModel) -> Engine:
    say("building the engine")
    optimizer = make_optimizer(
        model.module,
        learning_rate=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    return Engine(model.module, optimizer, config, dtype=model.dtype)


def _load(
    config: TrainConfig, name: str, device: torch.device, dtype: torch.dtype, like: Policy | None = None
) -> Policy:
    return load_policy(
        name,
        dtype=dtype,
        device=device,
        attn_implementation=config.attn_implementation,
        vision_attn_implementation=config.vision_attn_implementation,
        freeze_vision=config.freeze_vision,
        gradient_checkpointing=checkpoints_activations(config, device),
        liger_kernels=config.liger_kernels,
        row_tokens=config.row_tokens,
        **({} if like else resolution_of(config)),
        trust_remote_code=config.trust_remote_code,
        seed=config.seed,
        tiny_options=config.model_options or None,
        like=like,
    )


def make_reference(
    config: TrainConfig, data: RunData, policy: Policy, device: torch.device, dtype: torch.dtype
) -> Reference | None:
    if not config.needs_reference:
        return None
    if config.reference_kind == "adapter_off":
        return AdapterOff(policy, share_prefix=config.share_prefix)
    if config.reference_kind == "frozen_copy":
        # A copy of the loaded policy: with an adapter, which still adds zero, this is the base model.
        return FrozenCopy(policy, share_prefix=config.share_prefix)
    return precomputed_reference(config, data, policy, device)


def precomputed_reference(config: TrainConfig, data: RunData, policy: Policy, device: torch.device) -> Reference:
    """Reads output_dir/reference.pt. First it makes the file if it is missing or was made with other weights, pairs or video
    files: otherwise a changed video would end the run at the step that uses it."""
    file = Path(config.output_dir) / "reference.pt"
    key = f"{weights_key(policy)} {data.key} {data_key(data.evaluation)} {sampling_of(config)} {policy.processing}"

    def look() -> tuple[bool, str]:  # in one process, since file times may differ between machines
        whole_key = f"{key} {videos_key(config, data, policy)}"
        return is_fresh(file, whole_key), whole_key

    fresh, key_with_videos = on_rank_zero(look)
    if not fresh:
        _precompute(config, data, policy, file, key_with_videos)
    return Precomputed(file, weights_key=key_with_videos)


def _precompute(config: TrainConfig, data: RunData, policy: Policy, file: Path, key: str) -> None:
    """Scores all pairs, training and evaluation, with the current weights: each rank its share, and rank 0 joins the shares."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    policy.eval()

    def score(samples: Sequence[Sample]) -> Logps:
        return detached_logps(policy, samples, config.share_prefix)

    precompute(score, _share_of_all_pairs(config, data, policy), _part(file, rank), weights_key=key)
    dist.barrier()
    on_rank_zero(lambda: _join(file, key, world_size))


def _share_of_all_pairs(config: TrainConfig, data: RunData, policy: Policy) -> Iterator[list[Sample]]:
    """Yields this rank's share of all pairs, in batches."""
    for pairs, root in ((data.train, data.train_root), (data.evaluation, data.eval_root)):
        if pairs:
            with ordered_loader(config, pairs, root, policy, dist.get_rank(), dist.get_world_size()) as loader:
                for batch in loader.steps(0):
                    yield [pair.sample for pair in batch.pairs]


def _part(file: Path, rank: int) -> Path:
    return file.with_name(f"{file.name}.rank{rank}")


def _join(file: Path, key: str, num_parts: int) -> None:
    parts = [_part(file, rank) for rank in range(num_parts)]
    joined: Entries = {}
    for part in parts:
        joined |= read_logps(part)
    if os.path.lexists(file):  # made with other weights, pairs or videos; kept, since it may be hours of work
        logger.warning("%s %s: it was made again", file, why_stale(file, key))
        set_aside(file)
    write_logps(file, joined, weights_key=key)
    for part in parts:
        part.unlink(missing_ok=True)
