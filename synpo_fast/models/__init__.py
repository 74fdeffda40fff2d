"""Loads video-language models for training (see policy.py). transformers is imported only when a model is loaded."""

from synpo_fast.models.loading import load_policy
from synpo_fast.models.policy import Policy, Sample

__all__ = ["Policy", "Sample", "load_policy"]
