"""Evaluation on the held-out pairs: the metrics of training, under eval_ names, and sample captions of a few pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from synpo_fast.data.encoded import EncodedPair
from synpo_fast.data.encoding import BadPair, quoted
from synpo_fast.data.loader import PairLoader
from synpo_fast.data.pair import Pair
from synpo_fast.models.batching import micro_batches
from synpo_fast.models.generate import greedy_text
from synpo_fast.training.engine import Engine
from synpo_fast.training.metrics import add_sums, means_of, summed_over_ranks
from synpo_fast.training.step import agree_on_forwards

logger = logging.getLogger(__name__)


@dataclass
class Evaluator:
    """Evaluates the held-out pairs. captioned: the pairs for sample captions. max_tokens: the bound of one forward."""

    loader: PairLoader
    captioned: Sequence[tuple[Pair, EncodedPair]]
    max_new_tokens: int
    device: torch.device
    placeholder: EncodedPair | None = None  # runs if this rank has fewer forwards than others, as in training
    max_tokens: int | None = None
    warned: bool = False  # of unusable pairs: only at the first evaluation, since they are the same at each

    def evaluate(self, engine: Engine, step: int, stop: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
        """Returns the metrics, equal on all ranks. All ranks call it and take part in every forward, as ZeRO-3 needs.

        stop: called between batches, and must answer alike on all ranks; once it is true, evaluate returns None.
        """
        module = engine.module
        module.eval()
        sums: dict[str, torch.Tensor] = {}
        bad: list[BadPair] = []
        try:
            with torch.no_grad():
                for batch in self.loader.steps(0):
                    if stop():
                        return None
                    bad += batch.bad
                    groups = micro_batches(
                        [pair.sample for pair in batch.pairs],
                        max_pairs=max(1, len(batch.pairs)),
                        max_tokens=self.max_tokens,
                    )
                    most = self._num_forwards(engine, batch.pairs, len(groups))
                    for group in groups:
                        add_sums(sums, engine.forward([batch.pairs[index] for index in group], 1.0)[1])
                    for _ in range(most - len(groups)):
                        assert self.placeholder is not None
                        engine.forward([self.placeholder], 0.0)
            if stop():
                return None
            captions = sample_captions(engine, self.captioned, max_new_tokens=self.max_new_tokens)
        finally:
            module.train()
        if bad and not self.warned:
            self.warned = True
            logger.warning("%d held-out pairs could not be used: %s", len(bad), quoted(bad))
        sums["bad"] = torch.full((), float(len(bad)), device=self.device)
        total = summed_over_ranks(sums, self.device)
        numbers: dict[str, Any] = {f"eval_{name}": value for name, value in means_of(total).items()}
        numbers["eval_skipped_pairs"] = total["bad"]
        if captions:
            numbers["eval_captions"] = captions
        return numbers

    def _num_forwards(self, engine: Engine, pairs: Sequence[EncodedPair], own: int) -> int:
        """The number of forwards that this rank must run, placeholders included."""
        if engine.stage < 3 and not engine.module.needs_kl:
            return own
        self.placeholder = pairs[0] if pairs else self.placeholder
        most, _, self.placeholder = agree_on_forwards(own, len(pairs), self.placeholder, self.device)
        return most


def sample_captions(
    engine: Engine, chosen: Sequence[tuple[Pair, EncodedPair]], *, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy captions, each with the pair's two responses. All ranks call it; only rank 0's result is used.

    Under ZeRO-3 all ranks generate the same captions in lockstep, since each layer's weights are gathered for all.
    """
    sharded = engine.stage == 3
    if engine.rank != 0 and not sharded:
        return []
    policy = engine.module.policy
    head = list(policy.base.get_output_embeddings().parameters())
    rows = []
    with engine.gathered(head):
        for pair, encoded in chosen:
            text = greedy_text(policy, encoded.sample, max_new_tokens=max_new_tokens, continue_after_eos=sharded)
            rows.append(
                {
                    "id": pair.id,
                    "video": str(pair.video) if isinstance(pair.video, str) else None,
                    "prompt": pair.prompt,
                    "caption": text,
                    "chosen": pair.chosen,
                    "rejected": pair.rejected,
                }
            )
    return rows
