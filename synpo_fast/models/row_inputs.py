"""The integers of packed rows, made on the host and sent to the device together: one copy for a whole micro-batch.

Tokens, positions, where a video's features go, which rows predict which labels, and where each segment of attention begins
and ends: all of it follows from the plan of the rows and from the samples, and nothing of it is on the device. Sent one by
one, every such tensor would stop the host until the device has caught up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from synpo_fast.models.attention import PackedRow, pack_row
from synpo_fast.models.families.registry import Family
from synpo_fast.models.layout import RowLayout
from synpo_fast.ops.host_copy import to_device

if TYPE_CHECKING:
    from synpo_fast.models.policy import Sample


@dataclass(frozen=True, eq=False)
class RowInputs:
    """Inputs of one packed row of length L, on the policy's device, int64.

    tokens [L]; positions [L], or [3, L] for mRoPE; placeholders [P]: the rows that hold a video token; rows [N] and labels [N]:
    which row predicts which token, response after response.
    """

    tokens: Tensor
    positions: Tensor
    placeholders: Tensor
    rows: Tensor
    labels: Tensor
    packed: PackedRow


def row_inputs(
    plan: Sequence[RowLayout], samples: Sequence[Sample], *, family: Family, model: Any, device: torch.device
) -> list[RowInputs]:
    """The inputs of every row of a plan, in one copy. `model` is the transformers model: its config decides positions."""
    positions = _prompt_positions(plan, samples, family, model)
    host: dict[tuple[int, str], Tensor] = {}
    longest = []
    for number, row in enumerate(plan):
        segments = pack_row(row)
        parts = {
            "tokens": torch.tensor(_tokens(row, samples)),
            "positions": _positions(row, positions),
            "placeholders": torch.tensor(_placeholders(row, samples), dtype=torch.int64),
            "rows": torch.tensor(_predicting_rows(row)),
            "labels": torch.tensor(_labels(row, samples)),
            "query_ends": segments.query_ends,
            "key_ends": segments.key_ends,
            "key_index": segments.key_index,
        }
        host |= {(number, name): tensor for name, tensor in parts.items()}
        longest.append((segments.max_query, segments.max_key))
    sent = to_device(host, device)
    made = []
    for number, (row, (max_query, max_key)) in enumerate(zip(plan, longest, strict=True)):
        ends_and_index = {name: sent[number, name] for name in ("query_ends", "key_ends", "key_index")}
        packed = PackedRow(layout=row, max_query=max_query, max_key=max_key, **ends_and_index)
        integers = {name: sent[number, name] for name in ("tokens", "positions", "placeholders", "rows", "labels")}
        made.append(RowInputs(packed=packed, **integers))
    return made


def _prompt_positions(plan: Sequence[RowLayout], samples: Sequence[Sample], family: Family, model: Any) -> list[Tensor]:
    """Each sample's own, on the host, from its prompt's start; the same for every group that holds its prompt."""
    used = {group.sample for row in plan for group in row.groups}
    return [
        family.position_ids(model, torch.tensor(sample.prompt), sample.video) if index in used else torch.empty(0)
        for index, sample in enumerate(samples)
    ]


def _positions(row: RowLayout, prompts: Sequence[Tensor]) -> Tensor:
    """[L], or [3, L] for mRoPE: every prompt starts anew, and every branch goes on where its prompt ends."""
    parts = []
    for group in row.groups:
        prompt = prompts[group.sample]
        parts.append(prompt)
        for branch in group.branches:
            # From the last position, not the highest: a video's time may run ahead of the text behind it.
            parts.append(prompt[..., -1:] + 1 + torch.arange(branch.length))
    return torch.cat(parts, -1)


def _tokens(row: RowLayout, samples: Sequence[Sample]) -> list[int]:
    tokens: list[int] = []
    for group in row.groups:
        sample = samples[group.sample]
        tokens += sample.prompt
        for response in group.responses:
            tokens += sample.responses[response][:-1]
    return tokens


def _placeholders(row: RowLayout, samples: Sequence[Sample]) -> list[int]:
    rows: list[int] = []
    for group in row.groups:
        sample = samples[group.sample]
        if sample.video is not None:
            wanted = sample.video.placeholder_id
            rows += [group.prefix.start + i for i, token in enumerate(sample.prompt) if token == wanted]
    return rows


def _predicting_rows(row: RowLayout) -> list[int]:
    return [
        index
        for group in row.groups
        for branch in range(len(group.responses))
        for index in group.predicting_rows(branch)
    ]


def _labels(row: RowLayout, samples: Sequence[Sample]) -> list[int]:
    return [
        token
        for group in row.groups
        for response in group.responses
        for token in samples[group.sample].responses[response]
    ]
