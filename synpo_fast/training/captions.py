"""What the model says about a few held-out videos, at each evaluation: numbers do not show that language decays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from synpo_fast.data.pair import Pair
from synpo_fast.models.generate import greedy_text
from synpo_fast.scoring import EncodedPair
from synpo_fast.training.engine import Engine


def sample_captions(
    engine: Engine, chosen: Sequence[tuple[Pair, EncodedPair]], *, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy captions beside the pair's two. All ranks call it; rank 0's result counts.

    Under ZeRO-3 every rank writes the same captions in lockstep, since each layer's weights are gathered for all.
    """
    sharded = engine.stage == 3
    if engine.rank != 0 and not sharded:
        return []
    policy = engine.module.policy
    head = list(policy.base.get_output_embeddings().parameters())
    rows = []
    with engine.gathered(head):
        for pair, encoded in chosen:
            text = greedy_text(policy, encoded.sample, max_new_tokens=max_new_tokens, run_to_the_end=sharded)
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
