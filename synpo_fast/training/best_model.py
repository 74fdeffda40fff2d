"""The best evaluation of a run so far, and early stopping when evaluations no longer improve.

The rules are those of Hugging Face's trainer. `metric_for_best_model` names a metric of the evaluation. An evaluation is better
only if its value is strictly better: a tie or nan is no improvement. `early_stopping_patience` evaluations in a row without
improvement end the run. The evaluation before the first step does not count, since it has no checkpoint; its value is kept, so
that the last line of the run can say that training did not improve on it.

BestSoFar is part of a checkpoint's state: a resumed run judges exactly as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.pair import Pair
from synpo_fast.errors import UserError
from synpo_fast.run_folder.best_files import copies_are_intact, is_stored_elsewhere
from synpo_fast.run_folder.checkpoint import checkpoint_problem, folder_of
from synpo_fast.terminal.printable import counted
from synpo_fast.training.rank_zero import on_rank_zero


@dataclass
class BestSoFar:
    """The best evaluation so far.

    metric: its name, with eval_ before it; "" if evaluations are not compared. value, step: None and 0 before the first one.
    before: the value before the first step, if it was evaluated. without_improvement: evaluations since the best one.
    copied: True if the best model exists only at the top of the folder, since its checkpoint is gone or broken. earlier: steps
    of checkpoints that were the best under another rule and whose models exist nowhere else.
    """

    metric: str = ""
    greater_is_better: bool = False
    value: float | None = None
    step: int = 0
    before: float | None = None
    without_improvement: int = 0
    copied: bool = False
    earlier: list[int] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """Identifies the best evaluation in best_model.json."""
        return {
            "step": self.step,
            "metric": self.metric,
            "greater_is_better": self.greater_is_better,
            "value": self.value,
        }

    def is_improved_by(self, value: float | None) -> bool:
        if value is None or not math.isfinite(value):
            return False
        if self.value is None:
            return True
        return value > self.value if self.greater_is_better else value < self.value

    def record(self, value: float | None, step: int) -> bool:
        """Records an evaluation; returns True if it is the best so far."""
        if step == 0:
            self.before = value if value is not None and math.isfinite(value) else None
            return False
        if not self.is_improved_by(value):
            self.without_improvement += 1
            return False
        self.value, self.step, self.without_improvement, self.copied = value, step, 0, False
        return True

    def is_out_of_patience(self, config: TrainConfig) -> bool:
        patience = config.early_stopping_patience
        return patience is not None and bool(self.metric) and self.without_improvement >= patience

    def description(self) -> str:
        """A sentence with the best value and its step. It says so if the value before training was no worse."""
        if self.value is None and not self.without_improvement:
            return f"{self.metric} was compared in no evaluation"
        if self.value is None:
            return f"{self.metric} was finite in no evaluation"
        text = f"{self.metric} {self.value:.4g} at step {self.step}"
        started_better = self.before is not None and not BestSoFar(
            value=self.before, greater_is_better=self.greater_is_better
        ).is_improved_by(self.value)
        return text + (f" (before training it was {self.before:.4g}, which is no worse)" if started_better else "")


def initial_best(config: TrainConfig) -> BestSoFar:
    """The state with which a new run of this config begins."""
    if not config.compares_evaluations:
        return BestSoFar()
    return BestSoFar(metric=config.best_metric, greater_is_better=config.best_is_greater)


def resumed_best(saved: BestSoFar, config: TrainConfig) -> tuple[BestSoFar, list[str]]:
    """The state with which a resumed run begins, and lines that say how it differs from the saved one. All ranks call it."""
    now = initial_best(config)
    if not now.metric or not saved.metric:
        return now, []
    same_rule = _rule(saved) == _rule(now)
    anew = [] if same_rule else [f"evaluations are compared anew: by {_rule(now)}, until now by {_rule(saved)}"]
    if not config.load_best_model_at_end or saved.value is None:
        return (saved if same_rule else now), anew
    root = Path(config.output_dir)
    folder = folder_of(root, saved.step)

    def look() -> tuple[list[int], str | None, bool]:
        """Reads the disk once for all ranks: (earlier bests to keep, what is wrong with the best, True if its copy is whole)."""
        bests = sorted({*saved.earlier, *([] if same_rule else [saved.step])})
        only_there = [step for step in bests if _is_only_copy(root, folder_of(root, step))]
        if not same_rule:
            return only_there, None, False
        problem = checkpoint_problem(folder) if folder.is_dir() else "is not there"
        return only_there, problem, problem is not None and copies_are_intact(root, saved.facts)

    earlier, problem, copied = on_rank_zero(look)
    if problem is not None:
        state = problem if problem == "is not there" else f"is broken ({problem})"
        if copied:
            anew = [
                f"{folder}, the best evaluation so far, {state}: its copy in {root} is whole and stays the best model"
            ]
        else:
            anew = [
                f"evaluations are compared anew: {folder}, the best of them so far, {state}; to keep it as the best, put it "
                "back before the next start"
            ]
    if not same_rule or (problem is not None and not copied):
        return replace(now, earlier=earlier), anew
    return replace(saved, copied=copied, earlier=earlier), anew


def _is_only_copy(root: Path, checkpoint: Path) -> bool:
    whole = checkpoint.is_dir() and checkpoint_problem(checkpoint) is None
    return whole and not is_stored_elsewhere(root, checkpoint)


def check_held_out(config: TrainConfig, pairs: Sequence[Pair]) -> None:
    """Raises UserError if the held-out pairs cannot give the metric that is to be compared."""
    if not config.compares_evaluations:
        return
    if not pairs:
        raise UserError(
            f"{config.compares_evaluations} compares evaluations, but no pair was held out: give eval_file or eval_split"
        )
    name = config.best_metric.removeprefix("eval_")
    if name.startswith(("rewards/", "logps/")) and all(pair.loss == "sft" for pair in pairs):
        raise UserError(
            f'metric_for_best_model={name} compares chosen and rejected responses, but every held-out pair has "loss": "sft"'
        )


def judge(best: BestSoFar, numbers: Mapping[str, Any], step: int, device: torch.device) -> tuple[bool, str]:
    """Returns (True if this evaluation is the best so far, a line to print or ""). All ranks call it and judge rank 0's value."""
    found = numbers.get(best.metric)
    value = torch.tensor(found if isinstance(found, float) else math.nan, dtype=torch.float64, device=device)
    dist.broadcast(value, src=0)
    improved = best.record(float(value), step)
    if step == 0:
        return False, ""
    if improved:
        return True, f"best so far: {best.description()}"
    return False, f"no improvement in {counted(best.without_improvement, 'evaluation')}: {best.description()}"


def _rule(best: BestSoFar) -> str:
    return f"the {'greatest' if best.greater_is_better else 'least'} {best.metric}"
