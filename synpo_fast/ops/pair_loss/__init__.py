"""SynPO's loss and its gradient to every token in one pass over token log-probs; see pair_loss.py."""

from synpo_fast.ops.pair_loss.pair_loss import PairLoss, synpo_pair_loss

__all__ = ["PairLoss", "synpo_pair_loss"]
