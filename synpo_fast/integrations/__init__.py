"""The fused loss inside other trainers: trl.py, hf_trainer.py. Each needs its own library, so nothing is imported here."""
