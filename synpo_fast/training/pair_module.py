"""The module that the engine trains: it takes pairs and returns the loss of a micro-batch and its metric sums.

Everything between pairs and loss happens in this one forward, because DeepSpeed (like DDP) only synchronises what goes through
its own forward, and because a head sharded by ZeRO-3 can only be read in there.

A row of a manifest is one pair or, with several responses, as many pairs as it has comparisons. Each response runs once, and its
log-probs are repeated for every comparison that uses it, so a row and its comparisons as separate rows have equal losses.

The loss is a sum over the micro-batch's pairs times `scale`. With scale = world_size / (pairs of the whole step, on all ranks)
and gradients that DeepSpeed averages over ranks, a step's gradient is that of the mean over all its pairs, however they were
split into micro-batches and over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoded import EncodedPair
from synpo_fast.losses import AuxiliaryNLL, LossOutput, kl_reference_point, preference_loss, spec_of, wpo_weights
from synpo_fast.losses.nll import TokenPenalties, token_penalties
from synpo_fast.losses.weighted_sum import SFT
from synpo_fast.models.policy import Logps, Policy, Sample
from synpo_fast.models.shared_features import shared_video_features
from synpo_fast.ops.host_copy import to_device
from synpo_fast.ops.linear_logprobs import TokenOutputs
from synpo_fast.pair_logprobs import mismatched_log_ratios, pair_logprobs
from synpo_fast.pair_sums import batch_sums, outputs_of_pairs
from synpo_fast.references import Reference

Sums = dict[str, Tensor]


class PairModule(nn.Module):
    """A policy and its loss. The `reference`, if the loss needs one, runs under no_grad inside the same forward."""

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        super().__init__()
        self.policy = policy
        self.loss_type, self.options = config.loss_type, config.applied_loss_options
        self.share_prefix = config.share_prefix
        self.encodes_once = True  # policy and reference share one pass of a frozen tower
        self.auxiliary: AuxiliaryNLL | None = None
        if config.auxiliary_nll:
            self.auxiliary = AuxiliaryNLL(target=config.auxiliary_target, weight=config.auxiliary_nll)
        self.penalties = TokenPenalties(config.label_smoothing_factor, config.z_loss)
        self.use_weighting = config.use_weighting
        self._reference: list[Reference] = []  # in a list: a frozen copy must not become a trained submodule

    @property
    def reference(self) -> Reference | None:
        return self._reference[0] if self._reference else None

    @reference.setter
    def reference(self, reference: Reference | None) -> None:
        self._reference = [] if reference is None else [reference]

    def forward(self, pairs: Sequence[EncodedPair], scale: float) -> tuple[Tensor, Sums]:
        samples = [pair.sample for pair in pairs]
        with self._one_pass_of_the_tower():
            outputs = self.policy.token_outputs(
                samples,
                share_prefix=self.share_prefix,
                logsumexp_grad=self.penalties.needs_logsumexp,
                with_mean_logits=self.penalties.label_smoothing > 0,
            )
            reference = None if self.reference is None else self.reference_logps(samples)
            logps = [[each.logps for each in row] for row in outputs]
            kl = self._reference_point(pairs, logps, reference, counted=scale != 0)
        squares = [[each.log_sum_sq_probs for each in row] for row in outputs] if self.use_weighting else None
        output = self._with_penalties(pairs, outputs, self.loss_of_logps(pairs, logps, reference, kl, squares))
        loss = output.losses.sum() * scale
        # A loss that is not finite makes every gradient nan, so that the engine skips the step on all ranks.
        loss = loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        with torch.no_grad():
            return loss, batch_sums(pairs, output, outputs)

    def _one_pass_of_the_tower(self) -> AbstractContextManager[None]:
        other = None if self.reference is None else self.reference.same_tower
        return shared_video_features([self.policy, other]) if self.encodes_once and other is not None else nullcontext()

    def reference_logps(self, samples: Sequence[Sample]) -> Logps:
        """The reference's log-probs, on the policy's device: precomputed ones come from a file, on the CPU."""
        assert self.reference is not None
        logps = self.reference(samples)
        if all(values.device == self.policy.device for each in logps for values in each):
            return logps
        places = {(i, j): values for i, each in enumerate(logps) for j, values in enumerate(each)}
        sent = to_device(places, self.policy.device)
        return [[sent[i, j] for j in range(len(each))] for i, each in enumerate(logps)]

    @property
    def needs_kl(self) -> bool:
        """True if the loss needs a reference point from mismatched responses. All ranks then run each forward together."""
        return self.loss_type != SFT and spec_of(self.loss_type).needs_kl

    @torch.no_grad()
    def _reference_point(
        self, pairs: Sequence[EncodedPair], logps: Logps, reference: Logps | None, *, counted: bool
    ) -> Tensor | None:
        """kto's reference point, over the mismatched responses of this forward on all ranks. counted: False for a placeholder."""
        if not self.needs_kl or reference is None:
            return None
        total, count = mismatched_log_ratios(pairs, logps, reference)
        sums = torch.stack([total, torch.full_like(total, count)])
        sums = sums if counted else torch.zeros_like(sums)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        return kl_reference_point(sums[0], sums[1]).float()

    def loss_of_logps(
        self,
        pairs: Sequence[EncodedPair],
        logps: Logps,
        reference: Logps | None,
        kl: Tensor | None = None,
        log_sum_sq_probs: Logps | None = None,
    ) -> LossOutput:
        """The loss of each pair, from token log-probs in the layout of the samples' responses.

        kl: kto's reference point. log_sum_sq_probs: in the same layout, for the weights of WPO (wpo.py); without it no pair is
        weighed.
        """
        if self.loss_type == SFT:
            # SynPO on pairs that are all marked "sft" is the NLL of the chosen responses.
            return preference_loss("synpo", pair_logprobs(pairs, logps, all_sft=True))
        ref = None if reference is None else pair_logprobs(pairs, reference)
        policy, weights = pair_logprobs(pairs, logps, kl=kl), None
        if log_sum_sq_probs is not None:
            weights = wpo_weights(policy, pair_logprobs(pairs, log_sum_sq_probs))
        return preference_loss(
            self.loss_type, policy, ref, auxiliary=self.auxiliary, pair_weights=weights, **self.options
        )

    def _with_penalties(
        self, pairs: Sequence[EncodedPair], outputs: Sequence[Sequence[TokenOutputs]], output: LossOutput
    ) -> LossOutput:
        """Adds the mean penalty over each chosen response's tokens to its loss."""
        if self.penalties == TokenPenalties():
            return output
        means = [
            token_penalties(each.logps, each.logsumexp, each.mean_logits, self.penalties).mean()
            for each in outputs_of_pairs(pairs, outputs, better=True)
        ]
        return replace(output, losses=output.losses + torch.stack(means))
