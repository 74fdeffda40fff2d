"""A synthetic world of videos with known truth, a tiny model that learns it, and `synpo-fast demo`, which trains it."""
