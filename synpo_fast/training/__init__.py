"""The trainer: it turns a config, a policy and a loss into a training run."""
