"""DeepSpeed behind six verbs: forward, backward, step, gather, save state, load state. The only importer of deepspeed.

Accumulation is the caller's: DeepSpeed runs with managed_gradient_accumulation=false, where each backward adds gradients and
step() is the boundary, so a step may have any number of micro-batches (the same on every rank). The loss is computed inside
forward: what bypasses it is not synchronised. DeepSpeed averages gradients over ranks; a loss that is to be summed over them
is multiplied by world_size.

A step whose gradient is not finite changes nothing on any rank: ZeRO and the 16-bit optimisers see to that themselves; for
plain fp32 at stage 0 it is done here.
"""

from __future__ import annotations

import io
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from synpo_fast.config.deepspeed_config import deepspeed_config
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.errors import MissingPackage, UserError
from synpo_fast.training.fp32_parameters import keep_from_casting
from synpo_fast.training.optimizer import MOMENTS, AdamW

LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's default


@dataclass(frozen=True)
class StepOutcome:
    """applied: whether weights changed. grad_norm: over all ranks, before clipping; inf or nan if it was not finite."""

    applied: bool
    grad_norm: float


def start_distributed(config: TrainConfig) -> torch.device:
    """Joins the process group the launcher describes, or makes one of a single process. Returns this process's device."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _use_gpu(config) else "cpu")  # deepspeed reads it when imported
    with _quiet(config):
        deepspeed = _deepspeed()
    if "RANK" not in os.environ:  # without these DeepSpeed goes looking for MPI
        os.environ.update(launch_environment(os.environ))
    device = torch.device("cpu")
    # Its shared-memory collectives for CPUs would be compiled now, and a process killed meanwhile leaves a lock that every
    # later run waits for without end. gloo does as well here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if _use_gpu(config):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False, timeout=timedelta(minutes=30)
        )
    return device


def launch_environment(given: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and the rest where no launcher of torch or DeepSpeed has set them: Slurm's or Open MPI's, or those of
    a process that is alone. Raises ValueError if there are several processes and no MASTER_ADDR to meet at."""
    for rank, size, local in (
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ):
        if int(given.get(size, "1")) > 1:
            if "MASTER_ADDR" not in given:
                raise UserError(f"{size}={given[size]}, but MASTER_ADDR is not set: export the name of the first node")
            return {
                "RANK": given[rank],
                "WORLD_SIZE": given[size],
                "LOCAL_RANK": given[local],
                "MASTER_PORT": given.get("MASTER_PORT", "29500"),
            }
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}


def stop_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _use_gpu(config: TrainConfig) -> bool:
    return torch.cuda.is_available() and not config.use_cpu


class Engine:
    """One module trained by DeepSpeed. Make it after the module has its weights (a checkpoint's, when resuming)."""

    def __init__(self, module: nn.Module, optimizer: AdamW, config: TrainConfig, *, dtype: torch.dtype) -> None:
        self.optimizer, self.stage, self.dtype = optimizer, config.zero_stage, dtype
        self.max_grad_norm = config.max_grad_norm
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        entries = deepspeed_config(config, dtype)
        if dtype != torch.float32:
            keep_from_casting(module, dtype)
        trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        # DeepSpeed takes memory for a whole bucket, 2 GB by default, of which an adapter fills a hundredth.
        entries["zero_optimization"].setdefault("reduce_bucket_size", min(LARGEST_BUCKET, trained))
        with _quiet(config):
            self.deepspeed, *_ = _deepspeed().initialize(model=module, optimizer=optimizer, config=entries)
        # Stage 0: no wrapper that clips, skips or tells the norm.
        self.plain = self.deepspeed.optimizer is optimizer
        assert self.plain == (self.stage == 0)
        if self.stage == 3:  # its optimiser is handed one shard at a time
            optimizer.make_states(self.deepspeed.optimizer.fp32_partitioned_groups_flat)
        else:
            optimizer.make_states(parameter for group in optimizer.param_groups for parameter in group["params"])

    @property
    def module(self) -> Any:
        return self.deepspeed.module

    def forward(self, *inputs: Any) -> Any:
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepOutcome:
        self.optimizer.set_learning_rate(learning_rate)
        if self.plain:
            return self._plain_step()
        self.deepspeed.step()
        applied, norm = self.deepspeed.was_step_applied(), self.deepspeed.get_global_grad_norm()
        if not applied and self.stage in (1, 2):
            # With offloading DeepSpeed keeps what a skipped step left in its buffers, and no later gradient would be finite.
            buffers = getattr(self.deepspeed.optimizer, "averaged_gradients", {})
            buffers.update(dict.fromkeys(buffers))
        return StepOutcome(applied, float("nan") if norm is None else float(norm))

    def _plain_step(self) -> StepOutcome:
        """DeepSpeed reduces gradients inside step(), so clipping and the look at the norm hook in between."""
        seen: list[float] = []

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            bound = self.max_grad_norm or float("inf")
            seen.append(float(torch.nn.utils.clip_grad_norm_(parameters, bound)))
            if not _is_finite(seen[0]):
                for parameter in parameters:
                    parameter.grad = None  # torch's step passes over these

        hook = self.optimizer.register_step_pre_hook(before)
        try:
            self.deepspeed.step()
        finally:
            hook.remove()
        self.deepspeed.zero_grad()
        return StepOutcome(_is_finite(seen[0]), seen[0])

    def discard_gradients(self) -> None:
        """Forgets what backwards since the last step left, one that broke off among them. For stages 0 and 1."""
        assert self.stage < 2
        self.deepspeed.zero_grad()
        if not self.plain:
            zero: Any = self.deepspeed.optimizer
            while zero._backward_active_depth:
                zero.exit_backward()
            zero._backward_hook_state.reset_for_new_step()
            zero._backward_hook_state.remaining_grad_acc_hooks = 0
            zero.zero_grad(set_to_none=True)
            if hasattr(zero, "ipg_buckets"):  # the one for bf16 at stage 1 has none
                for bucket in zero.ipg_buckets.values():
                    bucket.clear()
                zero._release_ipg_buffers()
                zero.params_already_reduced[:] = [False] * len(zero.params_already_reduced)
                zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))
                zero.all_grad_tensors.update(dict.fromkeys(zero.all_grad_tensors))
        for _, parameter in self.trained_parameters():
            parameter.grad = None

    def loss_scale(self) -> float | None:
        """Of fp16; None for other types."""
        return float(self.deepspeed.optimizer.cur_scale) if self.dtype == torch.float16 else None

    # ---- weights and state, whole, by name ----

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Whole weights inside (ZeRO-3 shards them)."""
        context: Any = nullcontext()
        if self.stage == 3:
            context = _deepspeed().zero.GatheredParameters(parameters, modifier_rank=None)
        with context:
            yield

    def whole_weights(self) -> dict[str, Tensor]:
        """Weights by name, on rank 0's CPU; {} on the others. All ranks call it: ZeRO-3 gathers one parameter at a time."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with self.gathered([parameter]):
                if self.rank == 0:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        if self.rank == 0:
            weights |= {name: buffer.detach().cpu() for name, buffer in _persistent_buffers(self.module)}
        return weights

    def optimizer_state(self) -> dict[str, Tensor]:
        """Adam's moments and the fp32 weights (masters, where a model is 16-bit): whole, on the CPU, on rank 0; {} on the others.

        All ranks call it: shards are gathered one parameter at a time.
        """
        self._link_states()
        state: dict[str, Tensor] = {}
        for name, parameter in self.trained_parameters():
            for key in (None, *MOMENTS):
                whole = self._whole(parameter, key)
                if self.rank == 0:
                    state[f"{name}.{key or 'master'}"] = whole.detach().to("cpu", torch.float32, copy=True).contiguous()
        if self.rank == 0:
            state["step"] = torch.tensor(self.optimizer.steps_taken)
            if self.loss_scale() is not None:
                state["loss_scale"] = torch.tensor(self.loss_scale())
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Takes what optimizer_state returned, whatever ranks, stage and dtype were then. All ranks pass the whole.

        Call restore_weights before the engine is made: where it trains in fp32 the module's own weights are the masters.
        """
        self._link_states()
        # None stands for the fp32 weights.
        keys: tuple[str | None, ...] = MOMENTS if self.dtype == torch.float32 else (None, *MOMENTS)
        for name, parameter in self.trained_parameters():
            for key in keys:
                self._set_whole(parameter, key, _entry(state, f"{name}.{key or 'master'}", parameter))
        self.optimizer.set_step(int(state["step"]))
        if "loss_scale" in state and self.dtype == torch.float16:
            scaler = getattr(self.deepspeed.optimizer, "loss_scaler", self.deepspeed.optimizer)
            scaler.cur_scale = float(state["loss_scale"])

    def _link_states(self) -> None:
        """ZeRO 1 and 2 map states to parameters at the first step, and with several parameter groups only the first one's."""
        if self.stage in (1, 2):
            self.deepspeed.optimizer._hp_optimizer_states_linked = False
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _whole(self, parameter: Any, key: str | None) -> Tensor:
        if self.plain:
            return parameter if key is None else self.optimizer.state[parameter][key]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        assert whole is not None, (self.stage, key)
        return whole

    def _set_whole(self, parameter: Any, key: str | None, value: Tensor) -> None:
        if self.plain:
            target = parameter if key is None else self.optimizer.state[parameter][key]
            target.data.copy_(value)
        elif self.stage == 3:
            # DeepSpeed's own setter refuses sizes that the ranks do not divide: the last shard is padded.
            shard, _ = self.deepspeed.optimizer._get_fp32_opt_state_partition(parameter, True, optim_state_key=key)
            part = value.flatten()[shard.numel() * self.rank :][: shard.numel()]
            shard.data.zero_()
            shard.data[: part.numel()].copy_(part)
        else:
            parameter.set_full_hp_param(value.to(parameter.device), key)


def restore_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts the fp32 weights that optimizer_state kept into a module that no engine has yet. A checkpoint's own weights are those
    of its dtype: a run that goes on from bf16 in fp32 would begin with rounded ones."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and f"{name}.master" in state:
                parameter.copy_(_entry(dict(state), f"{name}.master", parameter))


def _entry(state: dict[str, Tensor], name: str, parameter: Any) -> Tensor:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if name not in state and name.endswith(".master"):
        raise UserError(
            f"the checkpoint holds no fp32 weights ({name}), which bf16 and fp16 need: it was saved in fp32 by an earlier "
            "version; go on in fp32 (bf16=false)"
        )
    if name not in state or tuple(state[name].shape) != shape:
        found = "missing" if name not in state else f"of shape {tuple(state[name].shape)}"
        raise UserError(f"the checkpoint's {name} is {found}, expected {shape}: it belongs to another model or adapter")
    return state[name]


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that a state_dict holds, at every stage: ZeRO shards parameters alone."""
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _is_finite(value: float) -> bool:
    return value - value == 0.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _quiet(config: TrainConfig) -> Iterator[None]:
    """DeepSpeed tells its whole configuration while it starts, and what it thinks of our optimiser and device.

    A filter, since importing DeepSpeed sets its logger's level anew.
    """
    logger = logging.getLogger("DeepSpeed")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    if not config.verbose:
        logger.addFilter(is_error)
    try:
        with (
            nullcontext() if config.verbose else redirect_stdout(io.StringIO())
        ):  # its 16-bit optimisers print memory numbers
            yield
    finally:
        logger.removeFilter(is_error)


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise MissingPackage("training needs deepspeed: pip install 'synpo-fast[train]'") from error
    return deepspeed
