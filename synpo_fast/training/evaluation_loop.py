"""The held-out pairs: the same numbers as in training, under eval_ names, and captions of a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from synpo_fast.data.loader import PairLoader
from synpo_fast.data.pair import Pair
from synpo_fast.models.batching import micro_batches
from synpo_fast.models.scoring import EncodedPair
from synpo_fast.training.captions import sample_captions
from synpo_fast.training.engine import Engine
from synpo_fast.training.metrics import add_sums, means_of, summed_over_ranks


@dataclass
class Evaluator:
    loader: PairLoader
    captioned: Sequence[tuple[Pair, EncodedPair]]
    max_new_tokens: int
    device: torch.device
    spare: EncodedPair | None = None
    max_tokens: int | None = None  # in one forward

    def evaluate(self, engine: Engine, step: int) -> dict[str, Any]:
        """All ranks call it and take part in every step of it, as ZeRO-3 needs; all get the same numbers."""
        module = engine.module
        module.eval()
        sums: dict[str, torch.Tensor] = {}
        bad = 0
        try:
            with torch.no_grad():
                for batch in self.loader.steps(0):
                    bad += len(batch.bad)
                    groups = micro_batches(
                        [pair.sample for pair in batch.pairs],
                        max_pairs=max(1, len(batch.pairs)),
                        max_tokens=self.max_tokens,
                    )
                    for group in groups:
                        add_sums(sums, engine.forward([batch.pairs[index] for index in group], 1.0)[1])
                    for _ in range(self._most(engine, len(groups)) - len(groups)):
                        assert self.spare is not None, "some rank has a pair, so there is one to stand in"
                        engine.forward([self.spare], 0.0)
            captions = sample_captions(engine, self.captioned, max_new_tokens=self.max_new_tokens)
        finally:
            module.train()
        sums["bad"] = torch.tensor(float(bad), device=self.device)
        total = summed_over_ranks(sums, self.device)
        numbers: dict[str, Any] = {f"eval_{name}": value for name, value in means_of(total).items()}
        numbers["eval_skipped_pairs"] = total["bad"]
        if captions:
            numbers["eval_captions"] = captions
        return numbers

    def _most(self, engine: Engine, own: int) -> int:
        """How many forwards this rank has to take part in."""
        if engine.stage < 3:
            return own
        most = torch.tensor(own, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)
