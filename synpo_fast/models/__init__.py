"""Video-language models as training sees them; see policy.py. Nothing here imports transformers before a model is loaded."""

from synpo_fast.models.loading import load_policy
from synpo_fast.models.policy import Policy, Sample

__all__ = ["Policy", "Sample", "load_policy"]
