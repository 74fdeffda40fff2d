"""Shapes of LM heads (hidden size D, vocabulary size V), named after the models that have them."""

from __future__ import annotations

import re
from typing import NamedTuple


class Shape(NamedTuple):
    name: str
    D: int
    V: int


SHAPES = {
    "qwen2.5-7b": Shape("qwen2.5-7b", 3584, 152064),
    "llama3-8b": Shape("llama3-8b", 4096, 128256),
    "qwen3-1.7b": Shape("qwen3-1.7b", 2048, 151936),
    "vicuna-7b": Shape("vicuna-7b", 4096, 32000),
    # Small enough for a CPU. cpu-small belongs to no model: it is the shape of the CPU target, near pythia-410m's (1024x50304).
    "cpu-small": Shape("cpu-small", 1024, 50000),
    "smollm2-135m": Shape("smollm2-135m", 576, 49152),
    "qwen2.5-0.5b": Shape("qwen2.5-0.5b", 896, 151936),
}

GROUPS = {
    "headline": ("qwen2.5-7b", "llama3-8b", "qwen3-1.7b", "vicuna-7b"),
    "cpu": ("cpu-small", "smollm2-135m", "qwen2.5-0.5b"),
}


def find_shapes(words: list[str]) -> list[Shape]:
    """Shapes for names, group names ("headline", "cpu") or "DxV". Raises ValueError for anything else."""
    shapes = []
    for word in words:
        if word in GROUPS:
            shapes += [SHAPES[name] for name in GROUPS[word]]
        elif word in SHAPES:
            shapes.append(SHAPES[word])
        elif match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word):
            D, V = int(match[1]), int(match[2])
            named = [shape for shape in SHAPES.values() if (shape.D, shape.V) == (D, V)]
            shapes.append(named[0] if named else Shape(word, D, V))
        else:
            known = ", ".join([*SHAPES, *GROUPS])
            raise ValueError(f"unknown shape {word!r}: give DxV (such as 1024x50000) or one of {known}")
    return shapes
