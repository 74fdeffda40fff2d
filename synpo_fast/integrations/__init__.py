"""The fused loss in other trainers: trl.py and hf_trainer.py. Each needs its own library, so nothing is imported here."""
