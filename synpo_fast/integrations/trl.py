"""SynPO in TRL: DPOTrainer with its data pipeline, its loop and its metric names, and no reference model.

TRL 1.16 computes DPO's loss in DPOTrainer._compute_loss, from one forward of the policy and one of the reference. Here that
method runs one forward of the policy, which returns the loss (pair_forward.py). The head is applied to completion tokens only.

DPOTrainer.__init__ creates a reference model unless it is given one. We pass a marker, and `ref_model` is a property that
stays None. So no model is copied, loaded, prepared or hashed, and no adapter is duplicated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from synpo_fast.integrations.pair_forward import IGNORE_INDEX, add_pair_loss
from synpo_fast.losses.metric_sums import metric_means, metric_sums

try:
    from trl import DPOConfig, DPOTrainer
    from trl import __version__ as TRL_VERSION
except ImportError as error:
    raise ImportError("synpo_fast.integrations.trl needs TRL 1.16: pip install 'synpo-fast[trl]'") from error

if not TRL_VERSION.startswith("1.16."):
    raise ImportError(
        f"synpo_fast.integrations.trl supports TRL 1.16 and found {TRL_VERSION}: it replaces DPOTrainer._compute_loss, "
        "which other releases may call differently. pip install 'trl>=1.16,<1.17'"
    )

NO_REFERENCE: Any = object()
# A dataset may contain reference log-probs that an earlier DPO run precomputed. They are not used.
NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")

# Options of DPOConfig that do not apply to SynPO; each must stay at its default.
WHY_REFUSED = {
    "beta": "it is DPO's distance to the reference; use synpo_beta for SynPO's weight of the language term",
    "loss_type": "the loss is SynPO; use DPOTrainer for the others",
    "loss_weights": "the loss is SynPO alone",
    "label_smoothing": "SynPO has none",
    "ld_alpha": "SynPO uses means over all tokens of a response",
    "f_divergence_type": "SynPO has no divergence term",
    "f_alpha_divergence_coef": "SynPO has no divergence term",
    "use_weighting": "SynPO does not weight pairs",
    "discopop_tau": "it belongs to loss_type='discopop'",
    "precompute_ref_log_probs": "SynPO uses no reference log-probs",
    "precompute_ref_batch_size": "SynPO uses no reference log-probs",
    "sync_ref_model": "SynPO has no reference model",
    "ref_model_mixup_alpha": "SynPO has no reference model",
    "ref_model_sync_steps": "SynPO has no reference model",
}


@dataclass
class SynPOConfig(DPOConfig):
    """DPOConfig with SynPO's options. Setting an option that only applies to DPO raises ValueError with the reason.

    SynPO's options have a prefix because DPOConfig has a `beta` with another meaning and another default.

    Args:
        synpo_alpha: steepness of the contrast between the two geometric means.
        synpo_beta: weight of the chosen response's mean token probability.
        synpo_link: "sigmoid" (the authors' code) or "logsigmoid".
    """

    synpo_alpha: float = field(default=30.0, metadata={"help": "Steepness of SynPO's contrast."})
    synpo_beta: float = field(default=0.2, metadata={"help": "Weight of SynPO's language term."})
    synpo_link: str = field(
        default="sigmoid", metadata={"help": "Link function of SynPO.", "choices": ["sigmoid", "logsigmoid"]}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in dataclasses.fields(DPOConfig):
            if option.name not in WHY_REFUSED:
                continue
            value = getattr(self, option.name)
            if value != _default(option):
                raise ValueError(f"SynPOConfig takes no {option.name}={value!r}: {WHY_REFUSED[option.name]}")


def _default(option: dataclasses.Field) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


class SynPOTrainer(DPOTrainer):
    """DPOTrainer with SynPO as its loss. Takes the arguments of DPOTrainer, with a SynPOConfig and without a ref_model.

    Datasets, tokenising, truncation, collators (also for images), peft_config, gradient accumulation, mixed precision and
    checkpoints are TRL's. A batch takes one forward of the model, with chosen and rejected concatenated.

    Logged in training and evaluation: rewards/{chosen,rejected,accuracies,margins}, where a reward is the geometric mean
    of a response's token probabilities; logps/{chosen,rejected}, means over tokens as in the loss (sums in DPOTrainer);
    nll_loss of the chosen tokens; mean_token_accuracy; entropy; logits/{chosen,rejected} unless the model caps its logits;
    num_tokens. empty_pairs is logged if truncation left a response without tokens; on a CPU such a pair raises an error.

    Raises ValueError for an adapter on the head and for any other head that head_of refuses, for a ref_model, and for a
    mixture of experts whose router has an auxiliary loss (set router_aux_loss_coef=0.0 to train without it).
    """

    _tag_names = ["trl", "synpo"]  # noqa: RUF012 - TRL declares it so
    _name = "SynPO"
    _paper = {  # noqa: RUF012
        "title": "SynPO: Synergizing Descriptiveness and Preference Optimization for Video Detailed Captioning",
        "id": "2506.00835",
    }

    def __init__(
        self,
        model: Any,
        ref_model: None = None,
        args: SynPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        if ref_model is not None:
            raise ValueError("SynPO has no reference model: leave ref_model out")
        if args is None:
            args = SynPOConfig("SynPO")
        if not isinstance(args, SynPOConfig):
            raise ValueError(f"args must be a SynPOConfig, got {type(args).__name__}")
        super().__init__(
            model=model,
            ref_model=NO_REFERENCE,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        policy: Any = self.model
        if self.aux_loss_enabled:
            raise ValueError(
                f"{type(policy).__name__} adds its router's auxiliary loss (coefficient {self.router_aux_loss_coef}), "
                "which SynPOTrainer does not compute: set router_aux_loss_coef=0.0 to train without it"
            )
        self.pair_loss = add_pair_loss(
            policy, "synpo", alpha=args.synpo_alpha, beta=args.synpo_beta, link=args.synpo_link
        )

    @property
    def ref_model(self) -> None:
        return None

    @ref_model.setter
    def ref_model(self, value: Any) -> None:
        if value is not NO_REFERENCE and value is not None:
            raise ValueError("SynPO has no reference model")

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
        model_inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
        outputs = model(**model_inputs, use_cache=False, pair_labels=labels)
        loss = outputs["loss"]
        self._record(inputs["attention_mask"], outputs)
        if return_outputs:  # compute_metrics and predict need logits, so they are computed as in DPOTrainer
            with torch.no_grad():
                outputs = model(**model_inputs, use_cache=False)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record(self, attention_mask: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
        """Adds the batch to TRL's averages, with one reduction over processes and one device sync."""
        assert self.pair_loss.last_output is not None
        sums = metric_sums(self.pair_loss.last_output, outputs)
        sums["num_tokens"] = attention_mask.sum().float()
        values = torch.stack([value.to(self.accelerator.device) for value in sums.values()])
        total = dict(zip(sums, self.accelerator.reduce(values, reduction="sum").tolist(), strict=True))

        policy: Any = self.model
        mode = "train" if policy.training else "eval"
        for name, value in metric_means(total).items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += int(total["num_tokens"]) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
