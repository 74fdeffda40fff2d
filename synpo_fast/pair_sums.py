"""The metric sums of a micro-batch of encoded rows: what the loss reports, tokens, pairs, and what the tokens' outputs show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from synpo_fast.data.encoded import EncodedPair
from synpo_fast.losses import LossOutput
from synpo_fast.losses.metric_sums import metric_sums
from synpo_fast.ops.linear_logprobs import TokenOutputs

Outputs = Sequence[Sequence[TokenOutputs]]  # for each row, for each of its responses


@torch.no_grad()
def batch_sums(pairs: Sequence[EncodedPair], output: LossOutput, outputs: Outputs) -> dict[str, Tensor]:
    """Returns metric_sums with the loss, the numbers of pairs and of tokens, accuracy and entropy. The host reads none of them.

    Tokens and pairs are counted as the loss sees them: a response counts once for each comparison that uses it. `tokens` is the
    number of tokens that ran, without ground truths and mismatched responses.
    """

    def number(value: int) -> Tensor:
        """A scalar filled on the device: a tensor made from a host number would be copied, and the host would wait for it."""
        return torch.full((), float(value), device=output.losses.device)

    def total(values: list[Tensor]) -> Tensor:
        return torch.cat(values).sum() if values else number(0)

    better, worse = (outputs_of_pairs(pairs, outputs, better=side) for side in (True, False))
    sums = metric_sums(
        output,
        {
            "chosen_tokens": number(sum(each.logps.shape[0] for each in better)),
            "rejected_tokens": number(sum(each.logps.shape[0] for each in worse)),
            "top1_tokens": total([each.is_top1 for each in better]),
            "entropies": total([each.entropy for each in (*better, *worse)]),
        },
    )
    sums["loss"] = output.losses.sum().float()
    sums["pairs"] = number(sum(pair.num_pairs for pair in pairs))
    sums["tokens"] = number(sum(_num_tokens(pair) for pair in pairs))
    return sums


def outputs_of_pairs(pairs: Sequence[EncodedPair], outputs: Outputs, *, better: bool) -> list[TokenOutputs]:
    """The outputs of the better or of the worse response of each pair that the loss sees, where it has one."""
    return [
        responses[index]
        for pair, responses in zip(pairs, outputs, strict=True)
        for index in (both[0 if better else 1] for both in pair.pairs)
        if index is not None
    ]


def _num_tokens(pair: EncodedPair) -> int:
    lengths = [len(response) for response in pair.sample.responses]
    beside = [index for index in (pair.ground_truth, pair.mismatched) if index is not None]
    return len(pair.sample.prompt) + sum(lengths) - sum(lengths[index] for index in beside)
