"""SynPO in the plain Hugging Face Trainer.

    loss_func = synpo_loss_func(model)
    Trainer(model, args, train_dataset=rows, data_collator=PairCollator(pad_token_id), compute_loss_func=loss_func)

with remove_unused_columns=False in args. Trainer calls model(**inputs) and passes the outputs to compute_loss_func, and
normally the logits have been computed by then. So the model's forward gets an additional argument, pair_labels, that makes it
return the loss instead (pair_forward.py), and PairCollator adds pair_labels to the batch. The loss function only scales.

With gradient accumulation Trainer leaves the scaling to compute_loss_func and passes it num_items_in_batch: the number of
entries of `labels` other than -100 in all micro-batches of the step, on all processes. PairCollator's `labels` have one such
entry per pair, so the loss of a step is the mean over its pairs, independent of their distribution over micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synpo_fast.fused import FusedLinearPreferenceLoss
from synpo_fast.integrations.pair_forward import IGNORE_INDEX, add_pair_loss
from synpo_fast.losses.metric_sums import metric_means, metric_sums


def synpo_loss_func(model: nn.Module, *, alpha: float = 30.0, beta: float = 0.2, link: str = "sigmoid") -> PairLossFunc:
    """Returns a compute_loss_func for Trainer. Adds the argument pair_labels to `model` (plain or wrapped by peft only).

    Args:
        alpha: steepness of the contrast between the two geometric means.
        beta: weight of the chosen response's mean token probability.
        link: "sigmoid" (the authors' code) or "logsigmoid".

    Raises ValueError for an adapter on the head and for any other head that head_of refuses.
    """
    return PairLossFunc(add_pair_loss(model, "synpo", alpha=alpha, beta=beta, link=link))


class PairLossFunc:
    """The loss function that Trainer calls: scales the loss of a forward with pair_labels to its share of the step's mean."""

    def __init__(self, module: FusedLinearPreferenceLoss) -> None:
        self.module = module
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}

    def __call__(
        self, outputs: Mapping[str, Tensor], labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if "chosen_logps" not in outputs or labels is None:
            raise ValueError(
                "the model returned no pair loss, or the batch had no labels: use PairCollator as data_collator, and do "
                "not replace the model's forward after synpo_loss_func (use_liger_kernel replaces it, unless "
                "liger_kernel_config={'fused_linear_cross_entropy': False})"
            )
        num_pairs = outputs["chosen_logps"].shape[0]
        if labels.shape != (num_pairs, 2):
            raise ValueError(
                f"labels is {list(labels.shape)}, expected [{num_pairs}, 2] as PairCollator makes it: Trainer counts its "
                "entries to scale the loss, and these must be pairs and not tokens"
            )
        if num_items_in_batch is None:
            num_items_in_batch = num_pairs
        if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.dim() > 0:
            raise ValueError(
                "Trainer runs nn.DataParallel, which splits the batch between chosen and rejected: start one process "
                "per GPU with accelerate launch or torchrun"
            )
        self._record(outputs)
        return outputs["loss"] * (num_pairs / num_items_in_batch)

    @torch.no_grad()
    def _record(self, outputs: Mapping[str, Tensor]) -> None:
        assert self.module.last_output is not None
        sums = self._sums["train" if outputs["loss"].requires_grad else "eval"]
        for name, value in metric_sums(self.module.last_output, outputs).items():
            sums[name] = sums[name] + value if name in sums else value

    def pop_metrics(self, mode: Literal["train", "eval"] = "train") -> dict[str, float]:
        """Returns this process's metrics since the last call, under TRL's names (without eval_); {} if there was no batch."""
        sums, self._sums[mode] = self._sums[mode], {}
        if not sums:
            return {}
        return metric_means(dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)))


@dataclass
class PairCollator:
    """Collates rows {prompt_ids, chosen_ids, rejected_ids} (lists of token ids, EOS included) to a batch, padded on the right.

    labels [B, 2]: -100 and 1 in each row, so that Trainer counts pairs (it may skip the first column).
    input_ids, attention_mask, pair_labels [2B, T]: the chosen half first; pair_labels is -100 on prompt and padding.

    The collator truncates nothing. Truncate prompts when tokenising, so that no response loses its end.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        for row in rows:
            _check_row(row)
        pairs = [(row["prompt_ids"], row[response]) for response in ("chosen_ids", "rejected_ids") for row in rows]
        width = max(len(prompt) + len(response) for prompt, response in pairs)
        shape = (len(pairs), width)
        input_ids = torch.full(shape, self.pad_token_id)
        pair_labels = torch.full(shape, IGNORE_INDEX)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for i, (prompt, response) in enumerate(pairs):
            ids, end = torch.tensor([*prompt, *response]), len(prompt) + len(response)
            input_ids[i, :end] = ids
            attention_mask[i, :end] = 1
            pair_labels[i, len(prompt) : end] = ids[len(prompt) :]
        return {
            "labels": torch.tensor(
                [[IGNORE_INDEX, 1]] * len(rows)
            ),  # first entry: Trainer takes its length as the batch size
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pair_labels": pair_labels,
        }


def _check_row(row: Mapping[str, Any]) -> None:
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        if name not in row:
            raise ValueError(
                f"a row has no {name}, only {list(row)}; set remove_unused_columns=False in TrainingArguments"
            )
        if len(row[name]) == 0:
            raise ValueError(f"a row's {name} is empty")
