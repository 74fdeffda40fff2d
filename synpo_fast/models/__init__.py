"""Video-language models as training sees them; see policy.py. Nothing here imports transformers before a model is loaded."""

from synpo_fast.models.loading import load_policy
from synpo_fast.models.policy import Policy, Sample
from synpo_fast.scoring import EncodedPairs, encode_pair, encode_pairs, score_pairs

__all__ = ["EncodedPairs", "Policy", "Sample", "encode_pair", "encode_pairs", "load_policy", "score_pairs"]
