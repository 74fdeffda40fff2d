"""Rotary embeddings whose frequencies depend on the length of the row: rope types "dynamic" and "longrope".

transformers takes the length from the highest position of the row. In a row with several responses, each would change the
others' angles, so models with such a rope run every response in a row of its own. This module handles two more problems.
First, the length must include the last token of the sequence, which predicts nothing and is not in our row. Second, "dynamic"
remembers the longest row computed so far, so without a reset a result would depend on the order of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

BY_LENGTH = frozenset({"dynamic", "longrope"})


def ropes_by_length(config: Any) -> list[str]:
    """Returns the language model's rope types whose frequencies depend on the row's length, sorted. Most models have none."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    return sorted({str(one.get("rope_type")) for one in each} & BY_LENGTH)


@contextmanager
def fresh_frequencies(language_model: nn.Module) -> Iterator[None]:
    """Resets the ropes' frequencies to those of a freshly loaded model, both on entering and on leaving the context."""
    _forget(language_model)
    try:
        yield
    finally:
        _forget(language_model)


@contextmanager
def whole_sequence(language_model: nn.Module) -> Iterator[None]:
    """Applies fresh_frequencies and makes ropes count one position more than the row has, for the last token of its sequence."""
    with fresh_frequencies(language_model), ExitStack() as hooks:
        for rope in _ropes(language_model):
            hooks.callback(rope.register_forward_pre_hook(_one_more, with_kwargs=True).remove)
            hooks.callback(rope.register_forward_hook(_without_last).remove)
        yield


def _one_more(
    rope: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Appends a position to position_ids. Models call rope(x, position_ids), with a positional or a keyword argument."""
    arguments, keywords = (*arguments,), dict(keywords)
    positions = keywords.pop("position_ids") if "position_ids" in keywords else arguments[1]
    longer = torch.cat([positions, positions[..., -1:] + 1], -1)
    return (*arguments[:1], longer, *arguments[2:]), keywords


def _without_last(rope: nn.Module, arguments: Any, cos_and_sin: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(part[..., :-1, :] for part in cos_and_sin)


def _ropes(module: nn.Module) -> list[Any]:
    return [each for each in module.modules() if _types(each)]


def _types(module: nn.Module) -> list[str]:
    """Returns the prefixes of a rope's buffers with a type in BY_LENGTH; the prefix is "" if all layers have one type."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, str):
        return [""] if kind in BY_LENGTH else []
    return [f"{layer}_" for layer, one in kind.items() if one in BY_LENGTH] if isinstance(kind, Mapping) else []


def _forget(language_model: nn.Module) -> None:
    for rope in _ropes(language_model):
        for prefix in _types(rope):
            now = getattr(rope, f"{prefix}inv_freq")
            # A copy: otherwise one tensor would be registered under two names, and be counted once.
            setattr(rope, f"{prefix}inv_freq", getattr(rope, f"{prefix}original_inv_freq").to(now.device, copy=True))
            setattr(rope, f"{prefix}max_seq_len_cached", rope.original_max_seq_len)
