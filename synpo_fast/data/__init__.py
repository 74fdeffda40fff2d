"""What goes into training: pairs of captions and the videos they describe."""

from synpo_fast.data.pair import Pair

__all__ = ["Pair"]
