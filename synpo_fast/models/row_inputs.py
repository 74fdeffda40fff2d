"""The integer inputs of packed rows, made on the host and sent to the device in one copy for a whole micro-batch.

They are the tokens, positions, placeholder positions, predicting rows with their labels, and the start and end of each attention
segment. All of them follow from the row plan and the samples, which are on the host. If they were sent one by one, the host
would wait for the device at each of them.
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
    """The inputs of one packed row of length L: int64 tensors on the policy's device.

    tokens [L]; positions [L], or [3, L] for mRoPE; placeholders [P]: the indices of video tokens; rows [N] and labels [N]: the
    row index that predicts each response token, and that token, response after response.
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
    """Makes the inputs of every row of a plan and sends them in one copy. `model` is the transformers model (for positions)."""
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
    """Computes the position ids of each sample's prompt, on the host. All groups with that prompt share them."""
    used = {group.sample for row in plan for group in row.groups}
    return [
        family.position_ids(model, torch.tensor(sample.prompt), sample.video) if index in used else torch.empty(0)
        for index, sample in enumerate(samples)
    ]


def _positions(row: RowLayout, prompts: Sequence[Tensor]) -> Tensor:
    """Returns the position ids of a row, [L] or [3, L] for mRoPE: each prompt starts anew, each branch continues its prompt."""
    parts = []
    for group in row.groups:
        prompt = prompts[group.sample]
        parts.append(prompt)
        for branch in group.branches:
            # From the last position, not the highest: a video's time positions may exceed those of the text after it.
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
