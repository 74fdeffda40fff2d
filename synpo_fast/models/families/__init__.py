"""One file per model family: its prompt, its vision tower and its positions."""
