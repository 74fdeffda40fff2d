"""Videos to frames: decoders, probing, frame sampling and colour."""
