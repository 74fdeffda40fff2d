"""Wraps DeepSpeed: forward, backward, step, gather, save state, load state. The only file that imports deepspeed.

The caller accumulates gradients. DeepSpeed runs with managed_gradient_accumulation=false: each backward adds gradients and
step() ends the accumulation, so a step may have any number of micro-batches (the same on every rank). The loss is computed
inside forward, because DeepSpeed only synchronises what goes through it. DeepSpeed averages gradients over ranks; to sum a
loss over ranks, multiply it by world_size.

A step whose gradient is not finite changes nothing on any rank. ZeRO and the 16-bit optimisers ensure this themselves; for
fp32 at stage 0 it is done here.
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
from synpo_fast.models.fp32_parameters import keep_from_casting
from synpo_fast.training.optimizer import MOMENTS, AdamW

LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's default


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of a step. applied: True if weights changed. grad_norm: over all ranks, before clipping; may be inf or nan."""

    applied: bool
    grad_norm: float


def start_distributed(config: TrainConfig) -> torch.device:
    """Joins the process group that the launcher describes, or creates a group of one process. Returns this process's device."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _use_gpu(config) else "cpu")  # deepspeed reads it when imported
    with _quiet(config):
        deepspeed = _deepspeed()
    if "RANK" not in os.environ:  # without these variables DeepSpeed looks for MPI
        os.environ.update(launch_environment(os.environ))
    device = torch.device("cpu")
    # DeepSpeed would compile its shared-memory collectives for CPUs now. A process killed meanwhile leaves a lock for which
    # every later run waits forever. gloo serves as well here.
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
    """RANK, WORLD_SIZE and related variables, for processes that no launcher of torch or DeepSpeed started: taken from Slurm or
    Open MPI, or set for a single process. Raises UserError if there are several processes and MASTER_ADDR is not set."""
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
    """A module trained by DeepSpeed. Create it after the module has its weights (the checkpoint's, when resuming)."""

    def __init__(self, module: nn.Module, optimizer: AdamW, config: TrainConfig, *, dtype: torch.dtype) -> None:
        self.optimizer, self.stage, self.dtype = optimizer, config.zero_stage, dtype
        self.max_grad_norm = config.max_grad_norm
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        entries = deepspeed_config(config, dtype)
        if dtype != torch.float32:
            keep_from_casting(module, dtype)
        trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        # DeepSpeed allocates a whole bucket, 2 GB by default; an adapter fills about 1 % of it.
        entries["zero_optimization"].setdefault("reduce_bucket_size", min(LARGEST_BUCKET, trained))
        with _quiet(config):
            self.deepspeed, *_ = _deepspeed().initialize(model=module, optimizer=optimizer, config=entries)
        # At stage 0 DeepSpeed has no wrapper that clips, skips steps or reports the norm.
        self.plain = self.deepspeed.optimizer is optimizer
        assert self.plain == (self.stage == 0)
        if self.stage == 3:  # DeepSpeed hands the optimiser one shard at a time
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
            # With offloading DeepSpeed keeps a skipped step's values in its buffers; no later gradient would be finite.
            buffers = getattr(self.deepspeed.optimizer, "averaged_gradients", {})
            buffers.update(dict.fromkeys(buffers))
        return StepOutcome(applied, float("nan") if norm is None else float(norm))

    def _plain_step(self) -> StepOutcome:
        """Steps at stage 0. DeepSpeed reduces gradients inside step(), so a hook clips them and checks the norm in between."""
        seen: list[float] = []

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            bound = self.max_grad_norm or float("inf")
            seen.append(float(torch.nn.utils.clip_grad_norm_(parameters, bound)))
            if not _is_finite(seen[0]):
                for parameter in parameters:
                    parameter.grad = None  # torch's step skips these

        hook = self.optimizer.register_step_pre_hook(before)
        try:
            self.deepspeed.step()
        finally:
            hook.remove()
        self.deepspeed.zero_grad()
        return StepOutcome(_is_finite(seen[0]), seen[0])

    def discard_gradients(self) -> None:
        """Discards the gradients of all backwards since the last step, also of one that failed. Only for stages 0 and 1."""
        assert self.stage < 2
        self.deepspeed.zero_grad()
        if not self.plain:
            zero: Any = self.deepspeed.optimizer
            while zero._backward_active_depth:
                zero.exit_backward()
            zero._backward_hook_state.reset_for_new_step()
            zero._backward_hook_state.remaining_grad_acc_hooks = 0
            zero.zero_grad(set_to_none=True)
            if hasattr(zero, "ipg_buckets"):  # the optimiser for bf16 at stage 1 has none
                for bucket in zero.ipg_buckets.values():
                    bucket.clear()
                zero._release_ipg_buffers()
                zero.params_already_reduced[:] = [False] * len(zero.params_already_reduced)
                zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))
                zero.all_grad_tensors.update(dict.fromkeys(zero.all_grad_tensors))
        for _, parameter in self.trained_parameters():
            parameter.grad = None

    def loss_scale(self) -> float | None:
        """The loss scale of fp16; None for other types."""
        return float(self.deepspeed.optimizer.cur_scale) if self.dtype == torch.float16 else None

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Makes the weights of these parameters whole inside the `with` block (ZeRO-3 shards them)."""
        context: Any = nullcontext()
        if self.stage == 3:
            context = _deepspeed().zero.GatheredParameters(parameters, modifier_rank=None)
        with context:
            yield

    def whole_weights(self) -> dict[str, Tensor]:
        """All weights by name, on rank 0's CPU; {} on other ranks. All ranks call it: ZeRO-3 gathers one parameter at a time."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with self.gathered([parameter]):
                if self.rank == 0:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        if self.rank == 0:
            weights |= {name: buffer.detach().cpu() for name, buffer in _persistent_buffers(self.module)}
        return weights

    def optimizer_state(self) -> dict[str, Tensor]:
        """Adam's moments and the fp32 weights (the master weights of a 16-bit model), whole, on rank 0's CPU; {} on other ranks.

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
        """Loads what optimizer_state returned, saved with any number of ranks, stage and dtype. All ranks pass the whole state.

        Call restore_weights before the engine is created: in fp32 training the module's own weights are the master weights.
        """
        self._link_states()
        # The key None means the fp32 weights.
        keys: tuple[str | None, ...] = MOMENTS if self.dtype == torch.float32 else (None, *MOMENTS)
        for name, parameter in self.trained_parameters():
            for key in keys:
                self._set_whole(parameter, key, _entry(state, f"{name}.{key or 'master'}", parameter))
        self.optimizer.set_step(int(state["step"]))
        if "loss_scale" in state and self.dtype == torch.float16:
            scaler = getattr(self.deepspeed.optimizer, "loss_scaler", self.deepspeed.optimizer)
            scaler.cur_scale = float(state["loss_scale"])

    def _link_states(self) -> None:
        """Maps optimiser states to parameters. ZeRO 1 and 2 do so at the first step, and only for the first parameter group."""
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
            # DeepSpeed's own setter rejects sizes that are not divisible by the number of ranks: the last shard is padded.
            shard, _ = self.deepspeed.optimizer._get_fp32_opt_state_partition(parameter, True, optim_state_key=key)
            part = value.flatten()[shard.numel() * self.rank :][: shard.numel()]
            shard.data.zero_()
            shard.data[: part.numel()].copy_(part)
        else:
            parameter.set_full_hp_param(value.to(parameter.device), key)


def restore_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies the fp32 weights from optimizer_state into a module, before its engine is created. The checkpoint's own weights have
    its dtype: without this, a bf16 run resumed in fp32 would begin with rounded weights."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and f"{name}.master" in state:
                parameter.copy_(_entry(dict(state), f"{name}.master", parameter))


def _entry(state: dict[str, Tensor], name: str, parameter: Any) -> Tensor:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if name not in state and name.endswith(".master"):
        raise UserError(
            f"the checkpoint holds no fp32 weights ({name}), which bf16 and fp16 need: it was saved in fp32 by an earlier "
            "version; resume in fp32 (bf16=false)"
        )
    if name not in state or tuple(state[name].shape) != shape:
        found = "missing" if name not in state else f"of shape {tuple(state[name].shape)}"
        raise UserError(f"the checkpoint's {name} is {found}, expected {shape}: it belongs to another model or adapter")
    return state[name]


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state_dict holds. They are whole at every stage, since ZeRO shards only parameters."""
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
    """Hides what DeepSpeed prints at its start, such as its whole configuration. Errors are still shown.

    It uses a filter, because importing DeepSpeed resets its logger's level.
    """
    logger = logging.getLogger("DeepSpeed")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    if not config.verbose:
        logger.addFilter(is_error)
    try:
        # DeepSpeed's 16-bit optimisers print memory numbers to stdout.
        with nullcontext() if config.verbose else redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeFilter(is_error)


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise MissingPackage("training needs deepspeed: pip install 'synpo-fast[train]'") from error
    return deepspeed
