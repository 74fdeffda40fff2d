"""The state of a run, and the checkpoints that store it."""

from __future__ import annotations

import json
import math
import platform
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoding import BadPair
from synpo_fast.errors import UserError
from synpo_fast.run_folder.best_files import copy_best
from synpo_fast.run_folder.checkpoint import CheckpointError, folder_of, write_checkpoint
from synpo_fast.run_folder.model_files import fp32_weights, save_model_files
from synpo_fast.run_folder.resume_choice import changed_fact
from synpo_fast.run_folder.start_choice import step_of_line
from synpo_fast.training.best_model import BestSoFar
from synpo_fast.training.engine import Engine
from synpo_fast.training.metrics import Window
from synpo_fast.training.rank_zero import on_rank_zero

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "triton", "av", "nvidia-dali-cuda130")

NUMBER_OF_PAIRS = "number of training pairs"  # only for a message: checkpoints of earlier versions lack it


@dataclass
class RunState:
    """The state of a run after `step` optimiser steps.

    epoch, step_in_epoch: the position of the next step. The counts are those of the run so far, over all ranks."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    seen_pairs: int = 0
    bad_pairs: int = 0
    oom_skipped: int = 0  # the bad_pairs that did not fit the memory
    num_tokens: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    stopped_early: bool = False
    evaluation_due: bool = False  # a stop came before the evaluation of this step
    best: BestSoFar = field(default_factory=BestSoFar)
    window: Window = field(default_factory=Window)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> RunState:
        """Makes the state from a checkpoint's JSON."""
        window, best = Window(**saved.get("window", {})), BestSoFar(**saved.get("best", {}))
        return cls(**{**saved, "stopped_early": False, "window": window, "best": best})


@dataclass
class Saver:
    """Writes the checkpoints of a run and its list of pairs that could not be used."""

    config: TrainConfig
    facts: dict[str, Any]  # what must be the same for a resumed run to be the same run
    last: Path | None = None
    failure: str | None = None  # another file that rank 0 could not write: no checkpoint may be written after that
    setting: dict[str, Any] = field(default_factory=dict)  # what may differ in a resumed run; a change is printed
    run: str = field(default_factory=lambda: secrets.token_hex(8))  # marks its checkpoints, which it may delete

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def bad_file(self) -> Path:
        return self.folder / f"skipped_pairs.rank{dist.get_rank()}.jsonl"

    def save(self, engine: Engine, state: RunState) -> None:
        """Writes a checkpoint. All ranks call it and rank 0 writes. Raises CheckpointError on every rank if writing fails."""
        optimizer_state = engine.optimizer_state()
        # An adapter is saved in fp32, as peft does; a whole model in the dtype it trains in, so that its size stays.
        weights = fp32_weights(optimizer_state) if self.config.use_peft else engine.whole_weights()
        keeps_best = self.config.load_best_model_at_end
        problem = [self.failure]
        if engine.rank == 0 and self.failure is None:
            try:
                self.last = write_checkpoint(
                    self.folder,
                    state.step,
                    save_model=lambda folder: save_model_files(
                        engine.module.policy,
                        folder,
                        weights,
                        adapter=self.config.use_peft,
                        source=self.config.model_name_or_path,
                    ),
                    optimizer_state=optimizer_state,
                    trainer_state={
                        "state": asdict(state),
                        "facts": self.facts,
                        "setting": self.setting,
                        "versions": versions(),
                        "run": self.run,
                    },
                    keep=self.config.save_total_limit,
                    best=(state.best.step or None) if keeps_best and not state.best.copied else None,
                    earlier_bests=state.best.earlier if keeps_best else (),
                )
            except CheckpointError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise CheckpointError(problem[0])

    def has(self, step: int) -> bool:
        """True if this run's folder holds a checkpoint of the step. All ranks call it."""
        return on_rank_zero(folder_of(self.folder, step).is_dir)

    def copy_best(self, best: BestSoFar) -> Path | None:
        """Copies the best checkpoint's model to the top of the folder. Returns the new path of an earlier best model if one was
        moved. All ranks call it. Raises CheckpointError on every rank if it fails."""
        return on_rank_zero(lambda: copy_best(self.folder, folder_of(self.folder, best.step), best.facts))

    def note_bad(self, bad: BadPair, epoch: int, step: int) -> None:
        with self.bad_file.open("a", encoding="utf-8") as stream:
            row = {"id": bad.id, "reason": bad.reason, "epoch": epoch, "step": step}
            stream.write(json.dumps(row) + "\n")

    def first_bad(self, most: int = 3) -> list[BadPair]:
        """The first `most` pairs that this rank noted, including those from before the run was resumed."""
        lines = self.bad_file.read_text(encoding="utf-8").splitlines() if self.bad_file.exists() else []
        rows = [json.loads(line) for line in lines if step_of_line(line) < math.inf]
        return [BadPair(row["id"], row["reason"]) for row in rows[:most]]


def check_same_run(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raises UserError, naming the differences, if resuming would not continue the run that was saved."""
    model = saved.get("model_name_or_path")
    if isinstance(model, str) and Path(model).is_dir():  # earlier versions stored a relative path as it was given
        saved = {**saved, "model_name_or_path": str(Path(model).absolute())}
    differing = [name for name in now if name != NUMBER_OF_PAIRS and saved.get(name) != now[name]]
    if differing:
        what = "; ".join(
            f"train_file has other pairs than when the run began ({saved.get(NUMBER_OF_PAIRS, 'an unknown number')} then, "
            f"{now.get(NUMBER_OF_PAIRS)} now), or pairs_from, min_score_gap or eval_split chooses others"
            if name == "training pairs"
            else changed_fact(name, saved.get(name), now[name])
            for name in differing
        )
        raise UserError(f"cannot resume from {folder}: {what}. Set it back, or start anew in another output_dir")


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
