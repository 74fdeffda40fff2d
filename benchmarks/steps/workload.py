"""The pairs that every variant gets: as rows, as separate samples, and as the padded batch that TRL's collator makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.steps.presets import Preset, build_policy
from synpo_fast.data.comparisons import PAIRS_FROM
from synpo_fast.data.encoded import EncodedPair
from synpo_fast.models import Policy, Sample
from synpo_fast.models.families.base import VideoInputs

IGNORE_INDEX = -100
TEXT_TOKENS = 26  # texts are random letters of the byte tokenizer
MARKERS = 2  # tokens around a video


@dataclass(frozen=True, eq=False)
class Workload:
    """A model with its pairs and optimiser.

    rows: one per prompt, with all its responses. samples: one per pair, chosen and rejected, in the order of the rows'
    comparisons; with two responses per prompt they are the rows' samples. batch: [2B, L], the samples, the chosen half first,
    padded on the right. optimizer: AdamW at learning rate 0, so that every step includes an optimiser step and none changes what
    the next one computes.
    """

    preset: Preset
    policy: Policy
    rows: list[EncodedPair]
    samples: list[Sample]
    batch: dict[str, Tensor]
    optimizer: torch.optim.Optimizer

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def tokens(self) -> int:
        """Tokens of all pairs. A prompt counts once for each of its responses, as in the size of a dataset."""
        return sum(len(s.prompt) + len(r) for s in self.samples for r in s.responses)

    def static_bytes(self) -> int:
        """Bytes of weights and optimiser state, which every variant holds."""
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        tensors = [*self.policy.parameters(), *(value for value in state if isinstance(value, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def make_workload(preset: Preset, device: torch.device, *, seed: int = 0, policy: Policy | None = None) -> Workload:
    """Makes a workload. policy: a model to reuse; by default a new one is built."""
    policy = build_policy(preset, device, seed) if policy is None else policy
    rows = make_rows(policy, preset, seed)
    samples = separate_samples(rows)
    batch = {name: tensor.to(device) for name, tensor in padded_batch(policy, samples).items()}
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return Workload(preset, policy, rows, samples, batch, torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0))


def make_rows(policy: Policy, preset: Preset, seed: int) -> list[EncodedPair]:
    """Rows with prompts of exactly `prefix` tokens (video, then text) and `responses` responses that end in EOS, best first.

    Raises ValueError if the video leaves no room for text in the prefix.
    """
    generator = torch.Generator().manual_seed(seed)
    end = policy.tokenizer.eos_token_id
    comparisons = tuple(PAIRS_FROM[preset.pairs_from](preset.responses))
    rows = []
    for index in range(preset.pairs):
        video = _video(policy, preset, generator) if preset.frames else None
        before = _around_video(policy, video)
        text = preset.prefix - len(before)
        if text < 1:
            raise ValueError(
                f"{preset.frames} frames of {preset.size} px are {len(before)} tokens, which leaves no text in a prefix of "
                f"{preset.prefix}; raise --prefix or lower --frames"
            )
        responses = tuple((*_draw(_length(preset, generator) - 1, generator), end) for _ in range(preset.responses))
        sample = Sample((*before, *_draw(text, generator)), responses, video, str(index))
        rows.append(EncodedPair(sample, str(index), comparisons))
    return rows


def separate_samples(rows: list[EncodedPair]) -> list[Sample]:
    """One sample of two responses for each comparison."""
    return [
        replace(row.sample, responses=(row.sample.responses[better], row.sample.responses[worse]))
        for row in rows
        for better, worse in row.comparisons
    ]


def visual_tokens(preset: Preset) -> int:
    """Tokens of a video of the preset: one for 28 x 28 pixels of two frames, as in Qwen2.5-VL."""
    return -(-preset.frames // 2) * round(preset.size / 28) ** 2


def _video(policy: Policy, preset: Preset, generator: torch.Generator) -> VideoInputs:
    shape = (preset.frames, preset.size, preset.size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    config = policy.base.config
    processing = replace(policy.family.processing(config), min_pixels=28 * 28, max_pixels=768 * 28 * 28)
    video = policy.family.video_inputs(
        config, policy.tokenizer, frames, seconds_per_frame=preset.seconds_per_frame, processing=processing
    )
    # Pixels are on the device, so that no variant is timed with the copy; the grid is on the host, where positions are computed.
    tensors = {
        name: tensor.to(policy.device, policy.base.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in video.arguments().items()
    }
    return replace(video, tensors=tensors, frames=None, recipe=None)


def _around_video(policy: Policy, video: VideoInputs | None) -> tuple[int, ...]:
    if video is None:
        return ()
    start, end = policy.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    return (start, *video.token_ids, end)


def _draw(count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple((64 + torch.randint(TEXT_TOKENS, (count,), generator=generator)).tolist())


def _length(preset: Preset, generator: torch.Generator) -> int:
    share = preset.spread * (2 * float(torch.rand((), generator=generator)) - 1)
    return max(2, round(preset.completion * (1 + share)))


def padded_batch(policy: Policy, samples: list[Sample], responses: tuple[int, ...] = (0, 1)) -> dict[str, Tensor]:
    """The batch that TRL's collators make: all chosen, then all rejected, and the videos once for each half."""
    rows = [(sample, sample.responses[which]) for which in responses for sample in samples]
    length = max(len(sample.prompt) + len(response) for sample, response in rows)
    input_ids = torch.full((len(rows), length), policy.tokenizer.pad_token_id)
    attention_mask, completion_mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for row, (sample, response) in enumerate(rows):
        end = len(sample.prompt) + len(response)
        input_ids[row, :end] = torch.tensor([*sample.prompt, *response])
        attention_mask[row, :end] = 1
        completion_mask[row, len(sample.prompt) : end] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}
    return batch | _video_tensors([sample.video for sample, _ in rows], input_ids)


def _video_tensors(videos: list[VideoInputs | None], input_ids: Tensor) -> dict[str, Tensor]:
    present = [video for video in videos if video is not None]
    if not present:
        return {}
    tensors = {name: torch.cat([video.tensors[name] for video in present]) for name in present[0].tensors}
    seconds = [video.seconds_per_grid for video in present]
    return {
        **tensors,
        "second_per_grid_ts": torch.tensor(seconds),
        # 2 marks a video's tokens; without these types the model uses one-dimensional positions.
        "mm_token_type_ids": 2 * (input_ids == present[0].placeholder_id).int(),
    }


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor for name, tensor in batch.items() if name != "completion_mask"}


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """Labels of a batch: [2B, L], not shifted, IGNORE_INDEX outside the responses."""
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
