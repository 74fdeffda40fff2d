"""The training loop, written to be read from top to bottom.

One step: take this rank's pairs, agree with the other ranks on the number of micro-batches, run each forward and backward,
step the optimiser (all of this is in step.py), and record the metrics. There are no callbacks. Whatever happens every so many
steps (log, evaluate, save) is an `if` in `_train`, in the order in which it happens: a checkpoint must state exactly what was
done before it, and a reader should see that order too.

A resumed run equals an uninterrupted one for two reasons. First, the random numbers of a step (dropout) are seeded by (seed,
step, rank), and the step's number decides its pairs; so a checkpoint holds weights, optimiser state and that number, but no
generator and no loader. Second, a pair that cannot be read leaves a gap in its own step and does not shift other pairs.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoding import quoted
from synpo_fast.data.loader import PairLoader, StepBatch
from synpo_fast.models.feature_cache import FeatureCache
from synpo_fast.run_folder.checkpoint import CheckpointError, folder_of
from synpo_fast.terminal.printable import counted
from synpo_fast.terminal.progress import Progress
from synpo_fast.terminal.stopping import Stopper
from synpo_fast.training.best_model import judge
from synpo_fast.training.engine import Engine
from synpo_fast.training.evaluation_loop import Evaluator
from synpo_fast.training.metrics import MetricsLog, Numbers, means_of, summed_over_ranks
from synpo_fast.training.optimizer import learning_rate_at, warmup_steps
from synpo_fast.training.out_of_memory import MicroBatchTooLarge, out_of_memory_message
from synpo_fast.training.run_model import checkpoints_activations
from synpo_fast.training.run_state import RunState, Saver
from synpo_fast.training.step import Stepper, StepTaken, any_rank
from synpo_fast.training.unusable_pairs import OUT_OF_MEMORY, advice, first_unusable, remedies, skipped_pairs_path


class TrainingStopped(RuntimeError):
    """The run cannot continue; the message says why and what to do. Existing checkpoints stay as they are."""


@dataclass
class Run:
    """Everything a run consists of, made by start.py."""

    config: TrainConfig
    engine: Engine
    loader: PairLoader
    state: RunState
    saver: Saver
    evaluator: Evaluator | None
    log: MetricsLog
    progress: Progress
    device: torch.device
    num_steps: int
    stepper: Stepper = field(init=False)
    asked_to_stop: bool = field(default=False)  # this rank was asked
    any_asked_to_stop: bool = field(default=False)  # some rank was asked: exchanged with the last step's numbers
    stopper: Stopper = field(default_factory=Stopper)  # notes signals and the end of the launcher
    failure: str | None = None  # what this rank could not write
    any_failed: bool = field(default=False)  # some rank could not write: exchanged with the last step's numbers

    def __post_init__(self) -> None:
        self.stepper = Stepper(self.config, self.engine, self.device)

    @property
    def stop_requested(self) -> bool:
        return self.asked_to_stop or self.stopper.reason is not None

    @property
    def ran_out_of_patience(self) -> bool:
        return self.state.best.is_out_of_patience(self.config)


def train(run: Run) -> RunState:
    """Trains up to the last step, a request to stop, or the end of early stopping's patience, and saves a checkpoint there. A
    step in progress is finished first."""
    with run.stopper.saves_at_the_end_of_a_step():
        return _train(run)


def _train(run: Run) -> RunState:
    config, state = run.config, run.state
    if run.evaluator is not None and config.eval_on_start and state.step == 0 and evaluate(run, run.evaluator) is None:
        state.stopped_early = True  # stopped before the first step: nothing to save
        return state
    if state.evaluation_due and _evaluate_due(run):
        return state
    for batch in _batches(run):
        numbers = train_step(run, batch)
        state.step += 1
        state.epoch, state.step_in_epoch = _position_after(run, batch)
        last = state.step == run.num_steps
        stop = _asked_to_stop(run)
        state.window.add(numbers)
        if state.step % config.logging_steps == 0 or last:  # after a stop, the resumed run writes the line
            _log(run, state.window.take())
        run.progress.show(state.step, numbers)
        _check_health(run, batch, numbers)
        improved = ended = False
        if run.evaluator is not None and (last or _is_due(state.step, config.eval_steps)):
            outcome = None if stop else evaluate(run, run.evaluator)
            stop = state.evaluation_due = outcome is None  # a resumed run begins with an evaluation that is due
            improved, ended = bool(outcome), outcome is not None and run.ran_out_of_patience
        if ended and not last and state.window.sums:  # no later step will write the line
            _log(run, state.window.take())
        best = improved and config.load_best_model_at_end
        if last or stop or ended or best or _is_due(state.step, config.save_steps):
            run.saver.save(run.engine, state)
        if last or stop or ended:
            state.stopped_early = stop and not last
            break
    return state


def _batches(run: Run) -> Iterator[StepBatch]:
    """Yields the run's batches from its current position, epoch after epoch."""
    epoch, step = run.state.epoch, run.state.step_in_epoch
    while True:
        yield from run.loader.steps(epoch, step)
        epoch, step = epoch + 1, 0


def train_step(run: Run, batch: StepBatch) -> Numbers:
    """Takes one optimiser step on all ranks (step.py). Returns its metrics over all ranks, read from the GPU as one tensor."""
    config, engine, step = run.config, run.engine, run.state.step
    started = time.perf_counter()
    rate = _learning_rate(run, step)
    diagnose = bool(config.diagnostics) and step % config.diagnostics == 0
    try:
        taken = run.stepper.take(
            batch, seed=_seed_of(config.seed, step, engine.rank), learning_rate=rate, diagnose=diagnose
        )
    except MicroBatchTooLarge as error:
        checkpoints = checkpoints_activations(config, run.device)
        message = out_of_memory_message(config, error.micro, step=step + 1, checkpoints=checkpoints)
        raise TrainingStopped(message) from error
    return taken.diagnostics | _step_numbers(run, taken, rate, time.perf_counter() - started)


def _learning_rate(run: Run, step: int) -> float:
    config = run.config
    warmup = warmup_steps(
        num_steps=run.num_steps, steps=config.warmup_steps, ratio=config.warmup_ratio, shape=config.lr_scheduler_type
    )
    return learning_rate_at(
        step, peak=config.learning_rate, num_steps=run.num_steps, num_warmup=warmup, shape=config.lr_scheduler_type
    )


def _seed_of(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest(), "little")


def _step_numbers(run: Run, taken: StepTaken, rate: float, seconds: float) -> Numbers:
    batch, outcome = taken.batch, taken.outcome
    try:
        for bad in batch.bad:
            run.saver.note_bad(bad, batch.epoch, run.state.step + 1)
    except OSError as error:
        run.failure = f"{run.saver.bad_file} could not be written: {error}"
    local = {
        "bad_pairs": len(batch.bad), "wanted_pairs": batch.wanted, "wait_s": batch.wait_s, "step_s": seconds,
        "asked_to_stop": run.stop_requested, "failing": run.failure is not None,
        "oom_skipped": sum(bad.reason.startswith(OUT_OF_MEMORY) for bad in batch.bad),
    }  # fmt: skip
    store = run.engine.module.policy.feature_store
    if isinstance(store, FeatureCache):
        local |= {"feature_cache/hits": store.hits, "feature_cache/misses": store.misses}
    sums = taken.sums | {name: torch.full((), float(value), device=run.device) for name, value in local.items()}
    total = summed_over_ranks(sums, run.device)
    run.any_asked_to_stop, run.any_failed = total["asked_to_stop"] > 0, total["failing"] > 0
    state, ranks = run.state, run.engine.world_size
    state.bad_pairs += int(total["bad_pairs"])
    state.oom_skipped += int(total["oom_skipped"])
    state.seen_pairs += int(total["wanted_pairs"])
    state.num_tokens += int(total.get("tokens", 0))
    finite = math.isfinite(outcome.grad_norm) and math.isfinite(total.get("loss", 0.0))
    scale = run.engine.loss_scale()
    # fp16 finds its loss scale by overflowing now and then. That is not an error while the loss is finite.
    finite = finite or (scale is not None and scale > 1 and math.isfinite(total.get("loss", 0.0)))
    state.nonfinite_in_a_row = 0 if finite else state.nonfinite_in_a_row + 1
    state.nonfinite_steps += 0 if finite else 1
    step_s, wait_s = total["step_s"] / ranks, total["wait_s"] / ranks
    numbers = {
        **means_of(total),
        "grad_norm": outcome.grad_norm,
        "learning_rate": rate,
        "epoch": batch.epoch + (batch.step + 1) / run.loader.steps_per_epoch,
        "num_tokens": state.num_tokens,
        "step_s": step_s + wait_s,
        "data_wait_share": wait_s / (step_s + wait_s),
        "pairs_per_s": total.get("pairs", 0.0) / (step_s + wait_s),
        "tokens_per_s": total.get("tokens", 0.0) / (step_s + wait_s),
        "skipped_pairs": state.bad_pairs,
        "nonfinite_steps": state.nonfinite_steps,
    }
    if "feature_cache/hits" in local:
        numbers |= {name: total[name] for name in ("feature_cache/hits", "feature_cache/misses")}
    if run.config.oom_policy == "skip":
        numbers["oom_skipped"] = state.oom_skipped
    if scale is not None:
        numbers["loss_scale"] = scale
    if run.device.type == "cuda":
        numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return numbers


def _position_after(run: Run, batch: StepBatch) -> tuple[int, int]:
    if batch.step + 1 == run.loader.steps_per_epoch:
        return batch.epoch + 1, 0
    return batch.epoch, batch.step + 1


def _asked_to_stop(run: Run) -> bool:
    """True if the run should stop: the same on every rank, since ranks exchange it with the step's numbers."""
    return run.stop_requested if run.engine.world_size == 1 else run.any_asked_to_stop


def _log(run: Run, numbers: Mapping[str, Any]) -> None:
    """Writes a line of metrics. A failure ends the run on all ranks: at the next save, or with the next step's numbers."""
    try:
        run.log.log(run.state.step, numbers)
    except OSError as error:
        run.failure = run.saver.failure = f"metrics of step {run.state.step} could not be written: {error}"


def _check_health(run: Run, batch: StepBatch, numbers: Numbers) -> None:
    """Raises TrainingStopped for failed writes, steps that are not finite and too many unusable pairs. Every rank sees the same
    numbers, so all stop together."""
    config, state = run.config, run.state
    if run.any_failed or (run.engine.world_size == 1 and run.failure is not None):
        failures: list[str | None] = [None] * run.engine.world_size
        dist.all_gather_object(failures, run.failure)
        raise TrainingStopped(
            f"{next(each for each in failures if each)}. Make room and start again with --resume auto: the last checkpoint is "
            "unchanged"
        )
    if state.nonfinite_in_a_row >= config.max_nonfinite_steps:
        raise TrainingStopped(
            f"loss or gradient was not finite in {counted(state.nonfinite_in_a_row, 'step')} in a row (to step {state.step}); "
            f"these steps changed no weights. Lower learning_rate, or look at the data of those steps{_saved_before_ending(run)}"
        )
    share = state.bad_pairs / max(1, state.seen_pairs)
    # A single bad video among the first few pairs is not enough to judge by.
    if share > config.max_bad_share and state.bad_pairs > max(1, config.max_bad_share * run.loader.pairs_per_step):
        first, remedy = first_unusable(run.saver), remedies(run.saver)
        saved = _saved_before_ending(run)
        way_on = f"To continue, raise max_bad_share{saved}"
        if remedy and state.bad_pairs == state.seen_pairs:
            way_on = f"To use them, {remedy}{saved}"
        elif remedy:  # a resumed run still counts the pairs of the steps before, so the option alone would not do
            way_on = f"To use them, {remedy} and start anew with --overwrite_output_dir. {way_on}"
        raise TrainingStopped(
            f"{state.bad_pairs} of {counted(state.seen_pairs, 'pair')} could not be used, more than max_bad_share="
            f"{config.max_bad_share}. {quoted(first)}. {skipped_pairs_path(run.saver)} lists them{advice(first)}. {way_on}"
        )


def _saved_before_ending(run: Run) -> str:
    """Saves a checkpoint before the run ends with an error, and returns the end of its message. The weights are sound: steps with
    gaps or without a finite gradient do not damage them. All ranks call it."""
    state, config = run.state, run.config
    if state.bad_pairs == state.seen_pairs or state.nonfinite_steps == state.step:
        return ". Nothing was trained, so no checkpoint was saved"
    state.nonfinite_in_a_row = 0  # the user will change something before resuming
    state.evaluation_due = run.evaluator is not None and (
        state.step == run.num_steps or _is_due(state.step, config.eval_steps)
    )
    try:
        run.saver.save(run.engine, state)
    except CheckpointError as error:
        return f". No checkpoint of step {state.step} could be saved: {error}"
    name = folder_of(run.saver.folder, state.step).name
    return f", and start again with --resume auto: {name} holds what was trained so far"


def evaluate(run: Run, evaluator: Evaluator) -> bool | None:
    """Evaluates and logs. Returns True if this evaluation is the best so far (always False without an option that compares
    evaluations), and None if a request to stop came before it was complete: no metrics are logged then."""
    state = run.state
    try:
        numbers = evaluator.evaluate(run.engine, state.step, stop=lambda: any_rank(run.stop_requested, run.device))
    except torch.OutOfMemoryError as error:
        raise TrainingStopped(
            f"out of memory in the evaluation after step {state.step}. What helps: per_device_eval_batch_size=1 "
            f"(it is {run.config.per_device_eval_batch_size}); a max_batch_tokens with which a training step fits; "
            "num_eval_captions=0"
        ) from error
    if numbers is None:
        return None
    _log(run, numbers)
    run.progress.note(numbers)
    if not state.best.metric:
        return False
    improved, said = judge(state.best, numbers, state.step, run.device)
    if said:
        run.progress.say(said, "best")
    return improved


def _evaluate_due(run: Run) -> bool:
    """Runs the evaluation that an earlier stop left out; the checkpoint of its step exists. Returns True if the run ends here."""
    state = run.state
    outcome = False if run.evaluator is None else evaluate(run, run.evaluator)
    if outcome is None:  # stopped again
        state.stopped_early = True
        return True
    state.evaluation_due = False
    ends = state.step >= run.num_steps or run.ran_out_of_patience
    if ends or (outcome and run.config.load_best_model_at_end and not run.saver.has(state.step)):
        run.saver.save(run.engine, state)
    return ends


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
