"""Starts a training run from a config, trains it, and finishes it: best model, report and last lines.

Mistakes in the output folder, the checkpoint or the manifest are reported before a model is loaded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from synpo_fast.config.deepspeed_config import deepspeed_config
from synpo_fast.config.sources import dump_config
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.hold_out import num_files
from synpo_fast.data.loader import PairLoader
from synpo_fast.data.order import num_steps as steps_in_epoch
from synpo_fast.data.workers.early_workers import EarlyWorkers
from synpo_fast.errors import MissingPackage, UserError
from synpo_fast.losses.units import describe_units
from synpo_fast.models.feature_cache import FeatureCache
from synpo_fast.run_folder.checkpoint import CheckpointError, check_writable, folder_of, read_state
from synpo_fast.run_folder.lock import RunLock
from synpo_fast.run_folder.model_files import fetch_processor_files
from synpo_fast.run_folder.resume_choice import resolve_resume
from synpo_fast.run_folder.start_choice import Start, choose_start, prepare_run_folder, record_origin
from synpo_fast.terminal.console import hide_bars_of_libraries, say
from synpo_fast.terminal.printable import counted
from synpo_fast.terminal.progress import Progress
from synpo_fast.terminal.report_once import ReportedByAnotherProcess, first_to_report
from synpo_fast.terminal.stopping import Interrupted, Stopper
from synpo_fast.training.best_model import check_held_out, resumed_best
from synpo_fast.training.engine import Engine, restore_weights, start_distributed, stop_distributed
from synpo_fast.training.evaluation_loop import Evaluator
from synpo_fast.training.loop import Run, TrainingStopped, train
from synpo_fast.training.metrics import MetricsLog
from synpo_fast.training.rank_zero import on_rank_zero
from synpo_fast.training.run_data import (
    RunData,
    ordered_loader,
    read_data,
    read_first_pairs,
    resolution_of,
    sampling_of,
    start_early_workers,
    train_loader,
    with_mismatched_responses,
)
from synpo_fast.training.run_model import build_engine, build_model, training_dtype
from synpo_fast.training.run_state import NUMBER_OF_PAIRS, RunState, Saver, check_same_run
from synpo_fast.training.text_checks import check_texts
from synpo_fast.training.unusable_pairs import nothing_used_error, unusable_pairs_line

logger = logging.getLogger(__name__)


# Errors whose message is complete without a traceback. Every process of a launch may raise the same one.
EXPECTED_ERRORS = (UserError, MissingPackage, TrainingStopped, CheckpointError)


@contextmanager
def process_group(config: TrainConfig) -> Iterator[torch.device]:
    """Joins the process group of a launch and yields this process's device. Every process enters it.

    If another process of the launch has already reported the same error, ReportedByAnotherProcess is raised instead.
    """
    say("starting DeepSpeed")
    device = start_distributed(config)
    if not config.verbose:
        hide_bars_of_libraries()
    try:
        yield device
    except EXPECTED_ERRORS as error:
        if not first_to_report(str(error)):
            raise ReportedByAnotherProcess(error) from error
        raise
    finally:
        stop_distributed()


def check_options_for_device(device: torch.device, config: TrainConfig) -> None:
    """Raises UserError for options that do not fit this device, and for DeepSpeed entries that are not allowed."""
    if config.video_device == "cuda" and device.type != "cuda":
        raise UserError("video_device=cuda, but this run is on the CPU: there is no GPU, or use_cpu is set")
    deepspeed_config(config, training_dtype(config, device))


def train_in_group(
    config: TrainConfig,
    device: torch.device,
    stopper: Stopper | None = None,
    *,
    write_report: Callable[[list[Path]], Path] | None = None,
) -> RunState:
    """Trains and returns the run's final state. Every process of a group calls it.

    write_report: writes the HTML report of the run's folder and returns its file. Called at the end if config.report is set.
    """
    assert not config.profile, "train.run_in_group measures in place of training"
    stopper = stopper or Stopper()
    check_options_for_device(device, config)
    loaders: list[PairLoader] = []
    try:
        with _lock_output_folder(config) as start:
            return _train(config, device, start, loaders, stopper, write_report)
    finally:
        for loader in loaders:
            loader.close()


@contextmanager
def _lock_output_folder(config: TrainConfig) -> Iterator[Start]:
    """Creates the output folder, locks it against other runs and chooses where to start: the same Start on every rank."""
    locks: list[RunLock] = []

    def prepare() -> Start:
        check_writable(Path(config.output_dir))
        locks.append(RunLock(Path(config.output_dir)))
        return choose_start(resolve_resume(config))

    try:
        start = on_rank_zero(prepare)
        for folder, problem in start.broken if dist.get_rank() == 0 else ():
            logger.warning("skipping %s: %s", folder, problem)
        for note in start.notes:
            say(note)
        yield start
    finally:
        for lock in locks:
            lock.release()


def _train(
    config: TrainConfig,
    device: torch.device,
    start: Start,
    loaders: list[PairLoader],
    stopper: Stopper,
    write_report: Callable[[list[Path]], Path] | None,
) -> RunState:
    data = check_texts(config, read_data(config))
    if config.needs_kl:
        data = with_mismatched_responses(config, data)
    warn_of_schedule(config, data, dist.get_world_size())
    check_held_out(config, data.evaluation)
    early = start_early_workers(config, data)
    try:
        run = _build_run(config, data, device, start, loaders, early)
    finally:
        early.close()
    run.stopper = stopper
    try:
        if (nothing := _nothing_to_do(run)) is not None:
            run.progress.say(f"nothing to do: {nothing} at {start.checkpoint}", "nothing_to_do")
            if not start.in_folder_of(config):  # noted, so that a later start resumes it and does not begin a new run
                on_rank_zero(lambda: record_origin(Path(config.output_dir), start))
            if (problem := _copy_best(run)) is not None:
                raise problem
            _check_pairs_were_used(run)
            return run.state
        _take_over_folder(run, start)
        first = "evaluating, before the first step" if _evaluates_first(run) else "reading the first batch"
        run.progress.say(first, "start")
        state = train(run)
    finally:
        run.progress.close()
        run.log.close()
    problem = None if state.stopped_early else _copy_best(run)
    if write_report is not None and config.report and dist.get_rank() == 0 and state.step:
        _write_report(run, write_report)
    store = run.engine.module.policy.feature_store
    if isinstance(store, FeatureCache):
        run.progress.say(f"feature_cache: {store.hits} of {store.hits + store.misses} videos were found there")
    _check_pairs_were_used(run)
    if (gaps := unusable_pairs_line(state, run.saver)) is not None:
        run.progress.say(gaps)
    done = f"stopped by {_why_stopped(stopper)} at" if state.stopped_early else "finished at"
    impatient = run.ran_out_of_patience and state.step < run.num_steps
    if impatient:
        done = f"no improvement in {counted(state.best.without_improvement, 'evaluation')}: stopped early at"
    run.progress.say(
        f"{done} step {state.step} of {run.num_steps}; checkpoint: {run.saver.last or 'none'}",
        "stopped" if state.stopped_early or impatient else "finished",
    )
    if problem is not None:
        raise problem
    return state


def warn_of_schedule(config: TrainConfig, data: RunData, world_size: int) -> None:
    """Warns if the learning rate never falls. This is no error: users often try a longer run's options for a few steps."""
    pairs = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps = steps_of(config, steps_in_epoch(len(data.train), world_size=world_size, pairs_per_rank=pairs))
    if config.warmup_steps and config.lr_scheduler_type == "constant":
        say(f"warning: warmup_steps={config.warmup_steps} has no effect with lr_scheduler_type=constant", "warning")
    elif config.warmup_steps >= steps or config.warmup_ratio == 1:
        given = f"warmup_steps={config.warmup_steps}" if config.warmup_steps else "warmup_ratio=1"
        say(
            f"warning: {given}, and the run has {counted(steps, 'step')}: the learning rate rises to the last and never falls",
            "warning",
        )


def steps_of(config: TrainConfig, steps_per_epoch: int) -> int:
    """The number of optimiser steps of the whole run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * steps_per_epoch - 1e-9)


def _build_run(
    config: TrainConfig,
    data: RunData,
    device: torch.device,
    start: Start,
    loaders: list[PairLoader],
    early: EarlyWorkers,
) -> Run:
    rank, world_size, checkpoint = dist.get_rank(), dist.get_world_size(), start.checkpoint
    facts = _run_facts(config, data, world_size)
    optimizer_state, trainer_state = read_state(checkpoint) if checkpoint is not None else ({}, None)
    if trainer_state is not None and checkpoint is not None:
        if not isinstance(trainer_state.get("facts"), dict):
            raise CheckpointError(f"cannot resume from {checkpoint}: its state/trainer.json has no facts of the run")
        check_same_run(trainer_state["facts"], facts, checkpoint)
    on_rank_zero(lambda: fetch_processor_files(config.model_name_or_path))
    model = build_model(config, data, device, checkpoint)
    restore_weights(model.module, optimizer_state)
    engine = build_engine(config, model)
    state = RunState()
    if trainer_state is not None:
        engine.load_optimizer_state(optimizer_state)
        state = RunState.of(trainer_state["state"])
    state.best, compared_anew = resumed_best(state.best, config)
    num_workers = config.num_reading_processes
    loader = train_loader(config, data, model.policy, rank, world_size, early.take(num_workers))
    loaders.append(loader)
    evaluator = None
    if data.evaluation:
        eval_loader = ordered_loader(
            config, data.evaluation, data.eval_root, model.policy, rank, world_size, early.take(num_workers)
        )
        loaders.append(eval_loader)
        # Every rank gets rank 0's pairs: under ZeRO-3 all ranks generate the same captions.
        found: list[Any] = [None]
        if rank == 0:
            found = [read_first_pairs(config, data, model.policy, config.num_eval_captions)]
        dist.broadcast_object_list(found, src=0, device=device)
        evaluator = Evaluator(eval_loader, found[0], config.max_new_tokens, device, max_tokens=config.max_batch_tokens)
    num_steps = steps_of(config, loader.steps_per_epoch)
    progress = Progress(
        shows=rank == 0,
        bar=not config.disable_tqdm,
        first_step=state.step,
        num_steps=num_steps,
        every=config.logging_steps,
    )
    _announce(progress, config, data, model.policy, engine, num_steps, checkpoint)
    for line in compared_anew:
        progress.say(line)
    log = MetricsLog(Path(config.output_dir), config, first_step=state.step + 1 if checkpoint else 0)
    saver = Saver(config, facts, checkpoint, setting=_machine_facts(engine))
    for name, value in saver.setting.items():
        was = (trainer_state or {}).get("setting", {}).get(name, value)
        if was != value:
            progress.say(f"changed: {name} was {was}, is {value}")
    if trainer_state is not None and start.in_folder_of(config):
        saver.run = trainer_state.get("run", saver.run)
    return Run(config, engine, loader, state, saver, evaluator, log, progress, device, num_steps)


def _run_facts(config: TrainConfig, data: RunData, world_size: int) -> dict[str, Any]:
    """The options and data that decide a step's pairs and loss. A resumed run must have the same ones."""
    return {
        "training pairs": data.key,
        NUMBER_OF_PAIRS: len(data.train),
        "pairs of a step": config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size,
        "seed": config.seed,
        "model_name_or_path": config.model_name_or_path,
        "use_peft": config.use_peft,
        "freeze_vision": config.freeze_vision,
        "loss_type": config.loss_type,
        "loss options": {name: list(v) if isinstance(v, tuple) else v for name, v in config.loss_options.items()},
        "use_weighting": config.use_weighting or None,
        "label_smoothing_factor": config.label_smoothing_factor or None,
        "z_loss": config.z_loss or None,
        "auxiliary": [config.auxiliary_nll, config.auxiliary_target],
        "reference": config.reference_kind if config.needs_reference else None,
        "adapter": [config.lora_r, config.lora_alpha, config.lora_dropout, sorted(config.lora_target_modules)],
        "frames": repr(sampling_of(config)),
        **resolution_of(config),
        "model_options": config.model_options or None,
    }


def _announce(
    progress: Progress,
    config: TrainConfig,
    data: RunData,
    policy: Any,
    engine: Engine,
    num_steps: int,
    checkpoint: Path | None,
) -> None:
    trained = sum(getattr(p, "ds_numel", p.numel()) for _, p in engine.trained_parameters())
    every = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters())
    dtype = str(engine.dtype).removeprefix("torch.")
    pairs = config.per_device_train_batch_size * config.gradient_accumulation_steps * engine.world_size
    progress.say(
        f"{config.loss_type} on {counted(len(data.train), 'pair')} ({_held_out_text(data)}), {counted(num_steps, 'step')} of "
        f"{counted(pairs, 'pair')}; "
        f"{policy.family.name}, {trained:,} of {every:,} parameters train, {dtype}, ZeRO {engine.stage}, "
        f"{counted(engine.world_size, 'process', 'processes')} on {policy.device.type}",
        "run",
    )
    progress.say(f"{config.loss_type}: {describe_units(config.loss_type, config.loss_options)}")
    for note in policy.notes:
        progress.say(note)
    if checkpoint is not None:
        progress.say(f"resuming from {checkpoint}", "resuming")
    if config.needs_reference:
        progress.say(f"reference: {config.reference_kind}", "reference")


def _held_out_text(data: RunData) -> str:
    files = num_files(data.evaluation, data.eval_root)
    return f"{len(data.evaluation)} held out" + (f", of {counted(files, 'file')}" if files else "")


def _machine_facts(engine: Engine) -> dict[str, Any]:
    """Facts that depend on the machine. They may differ when the run is resumed elsewhere; the change is then printed."""
    return {
        "dtype": str(engine.dtype).removeprefix("torch."),
        "processes": engine.world_size,
        "device": engine.module.policy.device.type,
    }


def _nothing_to_do(run: Run) -> str | None:
    """The reason why a resumed run is already over, or None."""
    state, patience = run.state, run.config.early_stopping_patience
    if state.evaluation_due:
        return None
    if state.step >= run.num_steps:
        return f"the run has taken all of its {counted(run.num_steps, 'step')}"
    if run.ran_out_of_patience:
        return f"the run stopped early (to continue, raise early_stopping_patience={patience} or leave it out)"
    return None


def _take_over_folder(run: Run, start: Start) -> None:
    """Makes the output folder this run's own. Nothing in it changes before, so a start that fails earlier leaves it as it was."""
    config = run.config
    kept = dump_config(replace(config, resume=None, overwrite_output_dir=False))  # safe to start from again
    for line in on_rank_zero(lambda: prepare_run_folder(config, start, steps_done=run.state.step, config_text=kept)):
        run.progress.say(line)
    on_rank_zero(run.log.open)


def _evaluates_first(run: Run) -> bool:
    return run.evaluator is not None and run.config.eval_on_start and run.state.step == 0


def _copy_best(run: Run) -> CheckpointError | None:
    """Copies the best model to the top of the folder. Returns an error instead of raising it, so that the report of the finished
    run is written first."""
    best = run.state.best
    if not best.metric:
        return None
    run.progress.say(f"best evaluation: {best.description()}", "best")
    if not run.config.load_best_model_at_end or best.value is None:
        return None
    try:
        earlier = run.saver.copy_best(best)
    except CheckpointError as error:
        return error
    name = folder_of(run.saver.folder, best.step).name
    if earlier is not None:
        run.progress.say(f"best model: the earlier one is now {earlier}", "best")
    run.progress.say(f"best model: in {run.config.output_dir}, a copy of {name}", "best")
    return None


def _write_report(run: Run, write_report: Callable[[list[Path]], Path]) -> None:
    """Writes the HTML report. If it cannot be written, the run only warns, since it is already saved."""
    try:
        run.progress.say(f"report: {write_report([Path(run.config.output_dir)])}", "report")
    except (OSError, ValueError) as error:
        logger.warning("report.html could not be written: %s", error)
    except Interrupted as error:
        run.stopper.cancel_forced_end()
        run.progress.say(f"report.html was not written: {error}; `synpo-fast report {run.config.output_dir}` writes it")


def _check_pairs_were_used(run: Run) -> None:
    if (problem := nothing_used_error(run.state, run.saver)) is not None:
        raise TrainingStopped(problem)


def _why_stopped(stopper: Stopper) -> str:
    """The stop reason of the first rank that has one. Other ranks stop with it and may have received no signal themselves. All
    ranks call it."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, stopper.reason)
    return next((reason for reason in reasons if reason is not None), "another process")
