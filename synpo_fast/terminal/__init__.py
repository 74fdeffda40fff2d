"""Output of the commands: progress, messages, events, and text made safe to print. Also signals that stop a run."""
