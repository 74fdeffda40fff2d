"""What turns a policy and a loss into a training run."""
