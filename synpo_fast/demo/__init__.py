"""Synthetic videos with known true captions, a tiny model that learns to describe them, and `synpo-fast demo`."""
