"""The metrics of a run, under TRL's names: always in metrics.jsonl, and in TensorBoard and W&B if the options ask for them.

A step's metrics are sums that add up over micro-batches and ranks; `means_of` turns them into the values shown. The JSONL file
is appended to and flushed line by line. Before a resumed run appends, run_folder/start_choice.py moves the rows of later steps
aside, so that no step appears twice.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.errors import MissingPackage, UserError
from synpo_fast.losses.metric_sums import metric_means

Numbers = dict[str, float]
logger = logging.getLogger(__name__)


def add_sums(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


def summed_over_ranks(sums: Mapping[str, Tensor], device: torch.device) -> Numbers:
    """Sums a step's numbers over ranks, with one all-reduce and one read from the device. A number missing on a rank is 0."""
    names: list[Any] = [sorted(sums)]
    if dist.get_world_size() > 1:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, names[0])
        names = gathered
    every = sorted(set().union(*names))
    zero = torch.zeros((), device=device)
    vector = torch.stack([sums.get(name, zero).double() for name in every]) if every else torch.zeros(0)
    dist.all_reduce(vector)
    return dict(zip(every, vector.tolist(), strict=True))


def means_of(sums: Numbers) -> Numbers:
    """The values shown for these sums. `loss` is the mean over pairs. {} if there are no pairs."""
    if not sums.get("pairs"):
        return {}
    return {"loss": sums["loss"] / sums["pairs"], **metric_means(sums)}


# Numbers that describe the state of the run, not a single step: over several steps the last value is shown.
LAST_VALUES = (
    "epoch", "learning_rate", "num_tokens", "skipped_pairs", "oom_skipped", "nonfinite_steps", "loss_scale", "peak_memory_gib",
    "feature_cache/hits", "feature_cache/misses",
)  # fmt: skip
RATES = ("pairs_per_s", "tokens_per_s", "data_wait_share")  # over several steps: averaged by time


@dataclass
class Window:
    """Collects the numbers of steps since the last line of metrics. Checkpoints store it: a resumed run writes equal lines."""

    sums: Numbers = field(default_factory=dict)
    weights: Numbers = field(default_factory=dict)

    def add(self, numbers: Numbers) -> None:
        for name, value in numbers.items():
            if name in LAST_VALUES:
                self.sums[name], self.weights[name] = value, 1
            else:  # a loss that is not finite is left out, or it would hide all others; nonfinite_steps counts it
                weight = numbers["step_s"] if name in RATES else 1.0
                weight = weight if math.isfinite(value) else 0.0
                self.sums[name] = self.sums.get(name, 0.0) + (weight * value if weight else 0.0)
                self.weights[name] = self.weights.get(name, 0.0) + weight

    def take(self) -> Numbers:
        """Returns each number's mean over the steps that had it, and empties the window."""
        means = {
            name: value / weight if (weight := self.weights[name]) else math.nan for name, value in self.sums.items()
        }
        self.sums, self.weights = {}, {}
        return means


class MetricsLog:
    """Writes metrics on the rank that opens it; does nothing on other ranks. first_step: the first step after this start."""

    def __init__(self, output_dir: Path, config: TrainConfig, *, first_step: int) -> None:
        self.folder, self.config, self.first_step = output_dir, config, first_step
        self._stream: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None

    def open(self) -> None:
        self._stream = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        if "tensorboard" in self.config.report_to:
            self._tensorboard = _tensorboard(self.folder, self.first_step)
        if "wandb" in self.config.report_to:
            self._wandb = _wandb(self.folder, self.config, resumed=self.first_step > 0)

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        if self._stream is None:
            return
        # JSON has no nan and no inf, so they become null.
        row = {name: None if _not_finite(value) else value for name, value in numbers.items()}
        try:
            self._stream.write(json.dumps({"step": step, **row}) + "\n")
            self._stream.flush()
        except OSError:
            with suppress(OSError):  # closing tries to write once more
                self._stream.close()
            self._stream = None  # no line may follow the missing one
            raise
        scalars = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(_tensorboard_name(name), value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def close(self) -> None:
        if self._stream is None:
            return
        self._stream.close()
        if self._tensorboard is not None:
            try:
                self._tensorboard.close()
            except OSError as error:
                logger.warning("the last numbers for TensorBoard could not be written: %s", error)
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of a metrics.jsonl; leaves out a last line that was cut off. Raises UserError for any other broken line."""
    rows: list[dict[str, Any]] = []
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{file}:{number} is not JSON: {error}") from error
    return rows


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _tensorboard_name(name: str) -> str:
    """The name with a group for TensorBoard, which groups names by the part before the slash."""
    if name.startswith("eval_"):
        return f"eval/{name.removeprefix('eval_')}"
    return name if "/" in name else f"train/{name}"


def _tensorboard(output_dir: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackage("report_to=tensorboard needs tensorboard: pip install 'synpo-fast[train]'") from error
    return SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step)


def _wandb(output_dir: Path, config: TrainConfig, *, resumed: bool) -> Any:
    """Starts W&B. A resumed run keeps its W&B run; W&B ignores lines of steps that it already has."""
    try:
        import wandb
    except ImportError as error:
        raise MissingPackage("report_to=wandb needs wandb: pip install wandb") from error
    kept = output_dir / "wandb_run_id"
    own = kept.read_text(encoding="utf-8") if resumed and kept.exists() else secrets.token_hex(4)
    identifier = os.environ.get("WANDB_RUN_ID", own)
    kept.write_text(identifier, encoding="utf-8")
    return wandb.init(id=identifier, name=config.run_name, dir=str(output_dir), config=asdict(config), resume="allow")
