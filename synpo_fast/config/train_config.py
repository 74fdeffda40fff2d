"""The config of a training run: its checked options, and values derived from them.

Options come from, in this order: the defaults in options.py, a packaged recipe (`--recipe NAME`), a YAML file
(`--config FILE`), and the command line. sources.py reads them. Everything is checked before a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from synpo_fast.config.checks import check_config
from synpo_fast.config.options import LOSS_OPTIONS, TrainOptions
from synpo_fast.losses import LOSSES
from synpo_fast.losses.weighted_sum import LOSS_METRIC, SFT, canonical_name, spec_of


@dataclass(frozen=True)
class TrainConfig(TrainOptions):
    """The checked options of a training run, by name; model_name_or_path, train_file and output_dir must be given.

    Raises UserError, which says what to change, for a value out of range and for options that contradict each other.
    """

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            object.__setattr__(self, "loss_type", canonical_name(self.loss_type))
        if self.zero_stage is None:
            object.__setattr__(self, "zero_stage", 1 if self.use_peft else 2)
        if self.pairs_from is None:
            members = str(self.loss_type).split(",")
            unpaired = any(LOSSES[member].unpaired for member in members if member in LOSSES)
            object.__setattr__(self, "pairs_from", "best_worst" if unpaired else "all")
        check_config(self)

    @property
    def loss_options(self) -> dict[str, Any]:
        """The loss's options that were set; the loss has defaults for the others."""
        return {name: getattr(self, name) for name in LOSS_OPTIONS if getattr(self, name) is not None}

    @property
    def applied_loss_options(self) -> dict[str, Any]:
        """The options given to the loss: those that were set, and nll_reduce for an NLL inside the loss. That NLL is
        averaged per pair by default: a mean over a micro-batch's tokens would make the loss depend on how a step is split."""
        has_nll = self.loss_type != SFT and spec_of(self.loss_type).has_nll
        return {"nll_reduce": "token_mean", **self.loss_options} if has_nll else self.loss_options

    @property
    def num_reading_processes(self) -> int:
        """The number of worker processes that decode videos: 0 when videos are decoded on the GPU, which workers do not see."""
        return self.dataloader_num_workers if self.video_device == "cpu" else 0

    @property
    def reads_ahead(self) -> bool:
        """True if videos are decoded while a step is computed: in worker processes, or in a thread when decoded on a GPU."""
        return self.num_reading_processes > 0 or self.video_device == "cuda"

    @property
    def compares_evaluations(self) -> str:
        """The name of the option that makes evaluations be compared with each other; "" if they are not compared."""
        if self.load_best_model_at_end:
            return "load_best_model_at_end"
        return "early_stopping_patience" if self.early_stopping_patience is not None else ""

    @property
    def best_metric(self) -> str:
        """The name of `metric_for_best_model` as an evaluation writes it, with eval_ in front."""
        return f"eval_{(self.metric_for_best_model or 'loss').removeprefix('eval_')}"

    @property
    def best_is_greater(self) -> bool:
        """The value of `greater_is_better`, its default resolved by Hugging Face's rule; a member's loss/NAME is a loss, too."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.best_metric.endswith("loss") and not self.best_metric.startswith(f"eval_{LOSS_METRIC}")

    @property
    def needs_reference(self) -> bool:
        """True if the loss uses a reference's log-probs."""
        return self.loss_type != SFT and spec_of(self.loss_type).reads_reference(self.loss_options)

    @property
    def reads_single_responses(self) -> bool:
        """True if the loss reads each response by itself, with a label (kto)."""
        return self.loss_type != SFT and spec_of(self.loss_type).unpaired

    @property
    def needs_kl(self) -> bool:
        """True if the loss needs a reference point from mismatched responses (kto)."""
        return self.loss_type != SFT and spec_of(self.loss_type).needs_kl

    @property
    def reference_kind(self) -> str:
        """The value of `reference`, with auto resolved."""
        if self.reference != "auto":
            return self.reference
        return "adapter_off" if self.use_peft else "frozen_copy"
