"""Turns videos into frames: decoders, probing, frame sampling and colour conversion."""
