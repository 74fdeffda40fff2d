"""The options of a training run: their values, where they come from, and their help."""
