"""The error message for a micro-batch that does not fit the memory: it names the longest pair and the options that help."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoded import EncodedPair
from synpo_fast.models.batching import packed_tokens


class MicroBatchTooLarge(torch.OutOfMemoryError):
    """A device ran out of memory in the forward or backward of `micro`."""

    def __init__(self, micro: Sequence[EncodedPair]) -> None:
        super().__init__(f"out of memory with a micro-batch of {len(micro)} pairs")
        self.micro = micro


def tokens_of(pair: EncodedPair) -> str:
    sample = pair.sample
    video = "" if sample.video is None else f", {len(sample.video.token_ids):,} of them its video"
    *others, last = (f"{len(response):,}" for response in sample.responses)
    responses = f"{', '.join(others)} and {last}" if others else last
    return f"{packed_tokens(sample):,} tokens: prompt {len(sample.prompt):,}{video}; responses {responses}"


def out_of_memory_message(config: TrainConfig, micro: Sequence[EncodedPair], *, step: int, checkpoints: bool) -> str:
    """One line: the micro-batch's pair with the most tokens, the options that help, and how to leave the pair out."""
    longest = max(micro, key=lambda pair: packed_tokens(pair.sample))
    others = f" and {len(micro) - 1} more" if len(micro) > 1 else ""
    own = [len(response) for index, response in enumerate(longest.sample.responses) if index != longest.mismatched]
    bound = len(longest.sample.prompt) + max(own) - 1
    return (
        f"out of memory in step {step}, with pair {longest.id!r} ({tokens_of(longest)}){others}. What helps: "
        f"{'; '.join(what_helps(config, micro, checkpoints))}. If started again unchanged, the run meets the same pair: "
        f"max_length={bound} leaves it out, with all pairs as long, and oom_policy=skip leaves out whatever does not fit"
    )


def what_helps(config: TrainConfig, micro: Sequence[EncodedPair], checkpoints: bool) -> list[str]:
    """Options that help, each with a value: at least three, those that cost least first."""
    longest = max(micro, key=lambda pair: packed_tokens(pair.sample))
    found = []
    if len(micro) > 1:
        found.append(f"max_batch_tokens={packed_tokens(longest.sample)} (one such pair at a time)")
    if not checkpoints:
        found.append("gradient_checkpointing=true")
    if config.zero_stage < 3:
        found.append(f"zero_stage={config.zero_stage + 1 if config.zero_stage else 2}")
    if longest.sample.video is not None:
        found.append(f"video_max_tokens={max(1, len(longest.sample.video.token_ids) // 2)} (half of this video's)")
        frames = config.num_frames or config.max_frames
        name = "num_frames" if config.num_frames else "max_frames"
        if frames > 1:
            found.append(f"{name}={frames // 2}")
    if not config.offload_optimizer and config.zero_stage:
        found.append("offload_optimizer=true")
    if not config.use_peft:
        found.append("use_peft=true")
    if len(found) < 3 and config.use_peft and config.lora_r > 1:
        found.append(f"lora_r={config.lora_r // 2}")
    return found
