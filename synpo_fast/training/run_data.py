"""Reads the pairs of a run, filters and splits them, and makes their loaders."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.comparisons import filter_by_score_gap
from synpo_fast.data.data_key import data_key
from synpo_fast.data.encoded import EncodedPair, FindStored
from synpo_fast.data.encoding import BadPair, PairReader
from synpo_fast.data.hold_out import files_of, hold_out
from synpo_fast.data.loader import WORKER_SLACK_S, PairLoader
from synpo_fast.data.manifest import read_manifest
from synpo_fast.data.mismatched import with_mismatched
from synpo_fast.data.pair import Pair
from synpo_fast.data.row_folders import named_split
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.data.video.video_info import VideoError
from synpo_fast.data.video_key import reading_facts, video_key
from synpo_fast.data.workers.early_workers import EarlyWorkers
from synpo_fast.data.workers.worker_process import WorkerProcess
from synpo_fast.errors import UserError
from synpo_fast.losses import LOSSES
from synpo_fast.losses.weighted_sum import SFT
from synpo_fast.models.feature_cache import StoredVideos
from synpo_fast.models.policy import Policy
from synpo_fast.scoring import PairEncoder
from synpo_fast.terminal.console import say
from synpo_fast.terminal.printable import counted
from synpo_fast.training.start_checks import check_videos

logger = logging.getLogger(__name__)
READ_SECONDS = 60.0  # deadline of one pair: a network disk may be slow, but a broken file must not stop the run


@dataclass(frozen=True, eq=False)
class RunData:
    """The pairs of a run. train_root, eval_root: the folders of their videos. key: a digest of the training pairs, in order."""

    train: list[Pair]
    evaluation: list[Pair]
    train_root: Path
    eval_root: Path
    key: str


def read_data(config: TrainConfig) -> RunData:
    """Reads the pairs. Raises UserError for bad rows (unless allow_bad_rows is set), or if no pair is left to train on."""
    say(f"reading {config.train_file}")
    train = _compared(_read(config.train_file, config), config, config.min_score_gap)
    evaluation = _compared(_read(config.eval_file, config), config, None) if config.eval_file else []
    root = Path(config.video_root) if config.video_root else None
    train_root = root or Path(config.train_file).resolve().parent
    eval_root = root or Path(config.eval_file or config.train_file).resolve().parent
    if config.eval_split:
        train, evaluation = hold_out(train, config.eval_split, seed=config.seed, root=train_root)
    elif evaluation:
        _warn_of_shared_files(config, files_of(train, train_root) & files_of(evaluation, eval_root))
    if not train:
        raise UserError(f"no pair of {config.train_file} is left to train on")
    _check_uses(config, [*train, *evaluation])
    check_videos(train, train_root, config.train_file)
    check_videos(evaluation, eval_root, config.eval_file or config.train_file)
    return RunData(train, evaluation, train_root, eval_root, data_key(train))


def _compared(pairs: list[Pair], config: TrainConfig, min_score_gap: float | None) -> list[Pair]:
    """The pairs that min_score_gap keeps, with the comparisons that pairs_from names."""
    result = filter_by_score_gap(pairs, min_score_gap, pairs_from=config.pairs_from)
    if min_score_gap is not None:
        logger.warning(
            "min_score_gap=%s keeps %d of %d pairs (%d below it, %d without scores)",
            min_score_gap, len(result.kept), len(pairs), result.below, result.without_scores,
        )  # fmt: skip
    elif result.below:
        logger.warning("left out %d of %d rows: their responses have equal scores", result.below, len(pairs))
    several = [pair for pair in pairs if pair.responses]
    if several:
        kept = [pair for pair in result.kept if pair.responses]
        say(
            f"pairs_from={config.pairs_from}: {counted(sum(len(pair.comparisons) for pair in kept), 'comparison')} of "
            f"{counted(len(kept), 'row')} with several responses, which use {sum(len(pair.responses) for pair in kept)} of "
            f"{counted(sum(len(pair.responses) for pair in several), 'response')}"
        )
    return result.kept


def with_mismatched_responses(config: TrainConfig, data: RunData) -> RunData:
    """The data in which every row carries a response that belongs to another row, for kto's reference point. Held-out rows may be
    about one video alone, so the training rows follow them."""
    point = "kto's reference point is a mean over the rows of a forward"
    if config.max_batch_tokens is not None:
        logger.warning("%s, and max_batch_tokens=%s decides how many these are", point, config.max_batch_tokens)
    elif config.per_device_train_batch_size == 1 and dist.get_world_size() == 1:
        logger.warning("%s: raise per_device_train_batch_size above 1", point)
    train = with_mismatched(data.train)
    evaluation = with_mismatched([*data.evaluation, *data.train])[: len(data.evaluation)]
    return replace(data, train=train, evaluation=evaluation, key=data_key(train))


def videos_key(config: TrainConfig, data: RunData, policy: Policy) -> str:
    """A digest of the video files of all pairs, training and evaluation, and of how they are encoded. No file is read for it."""
    encoder, sampling = encoder_of(config, policy), sampling_of(config)
    facts = reading_facts(encoder, sampling, config.video_backend, torch.device(config.video_device))
    keys = [config.max_length, config.auxiliary_target]  # they decide which pairs and texts are encoded
    for pairs, root in ((data.train, data.train_root), (data.evaluation, data.eval_root)):
        for pair in pairs:
            try:
                keys.append(video_key(pair, facts, root))
            except (VideoError, OSError):
                keys.append("not there")
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def sampling_of(config: TrainConfig) -> FrameSampling:
    if config.num_frames is not None:
        return FrameSampling(num_frames=config.num_frames)
    return FrameSampling(fps=config.fps, min_frames=config.min_frames, max_frames=config.max_frames)


def resolution_of(config: TrainConfig) -> dict[str, int | None]:
    """The options that decide the size of a video's frames."""
    return {name: getattr(config, name) for name in ("min_pixels", "max_pixels", "video_max_tokens")}


def encoder_of(config: TrainConfig, policy: Policy) -> PairEncoder:
    return PairEncoder.of(
        policy,
        max_tokens=config.max_length,
        with_ground_truth=config.auxiliary_target == "ground_truth",
        bound_name="max_length",
        labelled=config.reads_single_responses,
        chosen_only=config.loss_type == SFT and not config.profile,  # a profile also measures dpo on these pairs
    )


def start_early_workers(config: TrainConfig, data: RunData) -> EarlyWorkers:
    """Starts the worker processes for training and, if there are held-out pairs, as many for evaluation."""
    loaders = 2 if data.evaluation else 1
    return EarlyWorkers(loaders * config.num_reading_processes, READ_SECONDS + WORKER_SLACK_S)


def train_loader(
    config: TrainConfig,
    data: RunData,
    policy: Policy,
    rank: int,
    world_size: int,
    started: Sequence[WorkerProcess] = (),
) -> PairLoader:
    """A loader that shuffles the training pairs anew in each epoch."""
    pairs_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return PairLoader(
        data.train,
        encoder_of(config, policy),
        video_root=data.train_root,
        pairs_per_step=pairs_per_step,
        seed=config.seed,
        **_loader_settings(config, rank, world_size, started),
    )


def ordered_loader(
    config: TrainConfig,
    pairs: Sequence[Pair],
    root: Path,
    policy: Policy,
    rank: int,
    world_size: int,
    started: Sequence[WorkerProcess] = (),
) -> PairLoader:
    """A loader that reads each pair once, in the manifest's order: for evaluation and for a precomputed reference."""
    return PairLoader(
        pairs,
        encoder_of(config, policy),
        video_root=root,
        pairs_per_step=config.per_device_eval_batch_size,
        shuffle=False,
        **_loader_settings(config, rank, world_size, started),
    )


def _loader_settings(
    config: TrainConfig, rank: int, world_size: int, started: Sequence[WorkerProcess]
) -> dict[str, Any]:
    """The arguments that every loader of a run has in common."""
    return {
        "sampling": sampling_of(config),
        "rank": rank,
        "world_size": world_size,
        "num_workers": config.num_reading_processes,
        "prefetch_steps": config.prefetch_steps,
        "prefetch_bytes": config.prefetch_mb << 20,
        "backend": config.video_backend,
        "device": config.video_device,
        "deadline_s": READ_SECONDS,
        "keyed": True,
        "find_stored": _find_stored(config),
        "started": started,
    }


def _find_stored(config: TrainConfig) -> FindStored | None:
    return None if config.feature_cache is None else StoredVideos(Path(config.feature_cache)).find


def read_first_pairs(config: TrainConfig, data: RunData, policy: Policy, count: int) -> list[tuple[Pair, EncodedPair]]:
    """Reads the first `count` usable evaluation pairs, for sample captions. It tries at most 4 * count pairs."""
    encoder, sampling = encoder_of(config, policy), sampling_of(config)
    reader = PairReader(
        encoder, sampling, data.eval_root, config.video_backend, torch.device("cpu"),
        READ_SECONDS, reading_facts(encoder, sampling, config.video_backend, torch.device("cpu")),
    )  # fmt: skip
    found: list[tuple[Pair, EncodedPair]] = []
    for pair in data.evaluation[: 4 * count]:
        encoded = reader(pair) if len(found) < count else None
        if encoded is not None and not isinstance(encoded, BadPair):
            found.append((pair, encoded))
    return found


def _read(file: str, config: TrainConfig) -> list[Pair]:
    if not named_split(file)[0].exists():
        raise UserError(f"there is no manifest {file!r}")
    try:
        check = None if config.reads_single_responses else partial(_check_is_compared, config.loss_type)
        return read_manifest(file, on_bad="skip" if config.allow_bad_rows else "raise", check=check)
    except OSError as error:
        raise UserError(f"the manifest {file!r} cannot be read: {error}") from error


def _check_is_compared(loss_type: str, pair: Pair) -> None:
    if pair.has_label:
        names = " or ".join(name for name, spec in LOSSES.items() if spec.unpaired)
        does = "compares two" if loss_type != SFT else 'reads rows of prompt and chosen with "loss": "sft", or pairs'
        raise UserError(f"one response with a label, but loss_type={loss_type} {does}: train with loss_type={names}")


def _warn_of_shared_files(config: TrainConfig, shared: set[object]) -> None:
    if shared:
        logger.warning(
            "%d files of eval_file=%s are trained on, too: evaluation on them measures memorisation",
            len(shared),
            config.eval_file,
        )


def _check_uses(config: TrainConfig, pairs: Sequence[Pair]) -> None:
    if config.auxiliary_target == "ground_truth":
        missing = [pair.id for pair in pairs if pair.ground_truth is None]
        if missing:
            raise UserError(
                f"auxiliary_target=ground_truth, but {len(missing)} of {len(pairs)} pairs have none, {missing[0]!r} among them"
            )
    with_video = sum(1 for pair in pairs if pair.video is not None or pair.clips)
    alike = config.zero_stage == 3 or (config.zero_stage > 0 and not config.freeze_vision)
    if alike and 0 < with_video < len(pairs):
        raise UserError(
            f"{with_video} of {len(pairs)} pairs have a video: zero_stage={config.zero_stage} with freeze_vision="
            f"{str(config.freeze_vision).lower()} needs the vision tower to run on every device alike, so either all pairs or "
            "none must have a video; use zero_stage=2 with a frozen tower, zero_stage=0, or two runs"
        )
