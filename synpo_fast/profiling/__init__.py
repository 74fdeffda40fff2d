"""Time by stage, peak memory and counted FLOPs of a training step, and a fair comparison of SynPO with DPO."""
