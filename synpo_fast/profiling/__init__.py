"""Measures a training step: time by stage, peak memory, counted FLOPs, and a fair comparison of SynPO with DPO."""
