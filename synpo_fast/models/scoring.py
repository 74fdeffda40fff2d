"""From pairs to the token log-probs of their responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from synpo_fast.data.pair import Pair
from synpo_fast.models.policy import Policy, Sample


@dataclass(frozen=True)
class EncodedPairs:
    """samples[i] has the responses (chosen, rejected) of pair kept[i]; the others were too long."""

    samples: list[Sample]
    kept: list[int]
    dropped: list[int]


def encode_pairs(
    policy: Policy,
    pairs: Sequence[Pair],
    *,
    video_root: str | Path | None = None,
    max_tokens: int | None = None,
    drop_too_long: bool = False,
) -> EncodedPairs:
    """Tokens of every pair. max_tokens bounds the prompt with its longer response.

    Nothing is ever cut: a cut response is another response, and a cut video is not that video. A pair that is too long
    is a ValueError, or with drop_too_long is left out and counted.
    """
    samples, kept, dropped = [], [], []
    for index, pair in enumerate(pairs):
        sample = encode_pair(policy, pair, video_root=video_root)
        longest = len(sample.prompt) + max(len(response) for response in sample.responses)
        if max_tokens is not None and longest > max_tokens:
            if not drop_too_long:
                raise ValueError(
                    f"pair {pair.id!r} needs {longest} tokens ({len(sample.prompt)} of them prompt and video), "
                    f"more than max_tokens={max_tokens}; raise it, sample fewer frames, or drop such pairs"
                )
            dropped.append(index)
            continue
        samples.append(sample)
        kept.append(index)
    return EncodedPairs(samples, kept, dropped)


def encode_pair(policy: Policy, pair: Pair, *, video_root: str | Path | None = None) -> Sample:
    """The prompt with its video's placeholders, and both responses closed by EOS."""
    if isinstance(pair.video, (str, Path)):
        raise ValueError(
            f"pair {pair.id!r}: video {str(pair.video)!r} under {video_root} must be decoded first; "
            "pass its frames as a uint8 tensor [T, H, W, 3]"
        )
    video = None
    if pair.video is not None:
        video = policy.family.video_inputs(
            policy.base.config, policy.tokenizer, pair.video, processing=policy.processing
        )
    prompt = policy.family.prompt_ids(policy.tokenizer, pair.prompt, None if video is None else video.token_ids)
    responses = tuple(_response_ids(policy, text) for text in (pair.chosen, pair.rejected))
    if pair.loss == "preference" and responses[0] == responses[1]:
        raise ValueError(f"pair {pair.id!r}: chosen and rejected are the same tokens, so there is nothing to prefer")
    return Sample(tuple(prompt), responses, video, pair.id)


def _response_ids(policy: Policy, text: str) -> tuple[int, ...]:
    eos = policy.tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no eos_token: a response could not end")
    return (*policy.tokenizer(text, add_special_tokens=False)["input_ids"], eos)


def score_pairs(
    policy: Policy,
    pairs: Sequence[Pair],
    *,
    video_root: str | Path | None = None,
    share_prefix: bool = True,
    pack: bool = True,
) -> list[tuple[Tensor, Tensor]]:
    """For each pair (chosen_logps, rejected_logps): 1-D fp32, one value per response token, EOS included, with autograd."""
    encoded = encode_pairs(policy, pairs, video_root=video_root)
    logps = policy(encoded.samples, share_prefix=share_prefix, pack=pack)
    return [(chosen, rejected) for chosen, rejected in logps]
