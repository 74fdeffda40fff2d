"""Variants that run TRL's own trainers for DPO and SimPO, on video too.

DPOTrainer's data pipeline refuses video, but its compute_loss passes whatever a batch contains to the model. So it gets the batch
that its collators would make (workload.padded_batch: chosen and rejected concatenated, the video once for each). Everything after
that is TRL's code: the fused head, the reference, the loss, the metrics.

The trainers have no gradient checkpointing, mixed precision or dropout of their own, like all variants.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contest import Unavailable
from benchmarks.steps.step_variant import (
    DPO_BETA,
    SIMPO_BETA,
    SIMPO_GAMMA,
    Forward,
    Scores,
    bytes_of,
    peer_attention,
    use_attention,
)
from benchmarks.steps.workload import IGNORE_INDEX, Workload, labels_of, model_inputs, padded_batch

# The trainers require a dataset; no batch is drawn from it.
_ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}]


def dpo_trainer(workload: Workload, ref_model: Any = None) -> Any:
    """TRL's DPOTrainer with the workload's model. Without ref_model its reference is the model with the adapter switched off."""
    policy_model: Any = workload.policy.model
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(
            model=policy_model,
            ref_model=ref_model,
            args=DPOConfig(**_arguments(workload, folder), beta=DPO_BETA, loss_type=["sigmoid"], max_length=None),
            train_dataset=Dataset.from_list(_ROWS),
            processing_class=workload.policy.tokenizer,
        )
    model: Any = trainer.model
    if "ref" in model.peft_config:
        # TRL assumes that an adapter it is given has been trained, and copies it as the reference. A new adapter, which TRL
        # makes from a peft_config, has no copy: its reference is the adapter switched off.
        model.delete_adapter("ref")
    return trainer


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what a trainer prints during its set-up: progress bars, advice and warnings of its imports. None concerns a step."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _arguments(workload: Workload, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": len(workload.samples),
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": workload.device.type == "cpu",
    }


def dpo_adapter_off(workload: Workload) -> Forward:
    trainer = dpo_trainer(workload)
    return _dpo(workload, trainer, workload.batch, "reference: adapter switched off")


def dpo_frozen_copy(workload: Workload) -> Forward:
    whole: Any = copy.deepcopy(workload.policy.model)
    reference = whole.unload().requires_grad_(False)
    use_attention(workload, peer_attention(workload), reference)
    trainer = dpo_trainer(workload, reference)
    forward = _dpo(workload, trainer, workload.batch, "reference: ref_model, a frozen copy of the base")
    forward.held_bytes = bytes_of(reference)
    return forward


def dpo_precomputed(workload: Workload) -> Forward:
    trainer = dpo_trainer(workload)
    use_attention(workload, peer_attention(workload))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, workload.batch)
    trainer.precompute_ref_logps = True  # as precompute_ref_log_probs=True does
    batch = {**workload.batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return _dpo(
        workload, trainer, batch, "precompute_ref_log_probs (refused for vision; computed with its own function)"
    )


def dpo_valid_rows(workload: Workload) -> Forward:
    """DPO on a CPU with the head on response tokens only, as TRL runs it where it has Triton."""
    if workload.device.type == "cuda":
        raise Unavailable("on a GPU TRL's head drops the other rows itself, which is trl-dpo-adapter-off")
    forward = dpo_adapter_off(workload)
    plain = forward.loss

    def loss(scores: Scores) -> Tensor:
        with _compact_head():
            return plain(scores)

    return Forward(loss, "as trl-dpo-adapter-off, patched to score response tokens only, as on a GPU")


@contextmanager
def _compact_head() -> Iterator[None]:
    from trl.trainer import utils

    known = utils._use_triton
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = known


def _dpo(workload: Workload, trainer: Any, batch: dict[str, Tensor], what: str) -> Forward:
    attention = peer_attention(workload)
    mask = workload.batch["completion_mask"][:, 1:].bool()

    def loss(scores: Scores) -> Tensor:
        use_attention(workload, attention)
        with recorded(trainer.model, lambda output: record(scores, output.log_probs, mask)):
            return trainer.compute_loss(trainer.model, batch)

    return Forward(loss, f"DPOTrainer.compute_loss, {what}; {attention}")


def record(scores: Scores, log_probs: Tensor, mask: Tensor) -> None:
    if scores.padded is None:  # later calls are the reference's
        scores.padded = (log_probs.detach(), mask)


@contextmanager
def recorded(model: nn.Module, look: Callable[[Any], None]) -> Iterator[None]:
    handle = model.register_forward_hook(lambda module, args, output: look(output))
    try:
        yield
    finally:
        handle.remove()


def simpo(workload: Workload) -> Forward:
    """CPOTrainer with loss_type="simpo". It passes only token ids and mask to the model, so the video is bound beforehand."""
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        from datasets import Dataset
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        trainer: Any = CPOTrainer(
            model=workload.policy.model,
            args=CPOConfig(
                **_arguments(workload, folder), loss_type="simpo", cpo_alpha=0.0, beta=SIMPO_BETA,
                simpo_gamma=SIMPO_GAMMA, max_length=1 << 20, remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_list(_ROWS),
            processing_class=workload.policy.tokenizer,
        )  # fmt: skip
    texts = ("input_ids", "attention_mask")
    videos = {name: tensor for name, tensor in model_inputs(workload.batch).items() if name not in texts}
    model = functools.partial(trainer.model, **videos)
    batch: dict[str, Tensor] = {}
    for which, side in enumerate(("chosen", "rejected")):
        rows = {
            name: tensor.to(workload.device)
            for name, tensor in padded_batch(workload.policy, workload.samples, (which,)).items()
        }
        batch |= {f"{side}_{name}": rows[name] for name in texts}
        batch[f"{side}_labels"] = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, IGNORE_INDEX)
    lengths = (labels_of(workload.batch) != IGNORE_INDEX).sum(1)
    attention, forward_of_trl = peer_attention(workload), trainer.concatenated_forward

    def loss(scores: Scores) -> Tensor:
        def concatenated_forward(*args: Any) -> Any:
            found = forward_of_trl(*args)
            scores.sums = torch.cat(found[:2]).detach().float() * lengths  # its SimPO returns means
            return found

        use_attention(workload, attention)
        trainer.concatenated_forward = concatenated_forward
        return trainer.compute_loss(model, batch)

    return Forward(loss, f"CPOTrainer.compute_loss, loss_type='simpo', cpo_alpha=0; {attention}")
