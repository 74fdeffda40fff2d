"""Checks that the needed packages and files exist, before anything heavy is imported or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from pathlib import Path

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.pair import Pair
from synpo_fast.data.row_folders import named_split
from synpo_fast.data.video.decode import require_backend
from synpo_fast.data.video.video_info import VideoError
from synpo_fast.data.video.video_path import resolve_video
from synpo_fast.errors import MissingPackage, UserError
from synpo_fast.models.model_source import find_model

VIDEOS_LOOKED_FOR = 20  # per manifest: enough to tell a wrong folder from a few lost files


def check_start(config: TrainConfig) -> None:
    """Raises UserError or MissingPackage, with a message of one line, if a package, a file or a folder is missing."""
    _check_packages(config)
    _check_manifest("train_file", config.train_file)
    if config.eval_file:
        _check_manifest("eval_file", config.eval_file)
    if config.video_root is not None and not Path(config.video_root).is_dir():
        what = "is a file, not a folder" if Path(config.video_root).exists() else "does not exist"
        what += _looked_for(config.video_root, config.video_root)
        raise UserError(
            f"video_root={config.video_root!r} {what}: give the folder that the manifest's video paths are relative to"
        )
    find_model(config.model_name_or_path)


def check_videos(pairs: Sequence[Pair], root: Path, manifest: str) -> None:
    """Raises UserError if none of the first videos can be found: then the root is wrong, and not just a few files missing."""
    named = [
        pair.clips[0].path if pair.clips else str(pair.video) for pair in pairs if pair.clips or pair.video is not None
    ]
    reasons = []
    for name in named[:VIDEOS_LOOKED_FOR]:
        try:
            resolve_video(name, root)
        except VideoError as error:
            reasons.append(str(error))
        else:
            return
    if reasons:
        wanted = root.resolve() / named[0]
        raise UserError(
            f"{manifest}: not one of the first {len(reasons)} videos can be used. The first should be {wanted} "
            f"({reasons[0]}): set video_root to the folder that the manifest's paths are relative to"
        )


def _check_manifest(option: str, file: str) -> None:
    path, _ = named_split(file)
    if not path.exists():
        raise UserError(f"{option}={file!r}: there is no such manifest{_looked_for(file, path)}")
    try:
        next(path.iterdir(), None) if path.is_dir() else path.open("rb").close()
    except OSError as error:
        raise UserError(f"{option}={file!r} cannot be read: {error.strerror}") from error


def _looked_for(given: str, path: str | Path) -> str:
    """The absolute path, as part of a message, unless it was given so."""
    absolute = str(Path(path).absolute())
    return "" if given.startswith(absolute) else f" (looked for {absolute})"


def _check_packages(config: TrainConfig) -> None:
    wanted = {"deepspeed": ("training", "'synpo-fast[train]'")}
    if config.use_peft:
        wanted["peft"] = ("use_peft=true", "'synpo-fast[train]'")
    if config.liger_kernels:
        wanted["liger_kernel"] = ("liger_kernels=true", "'synpo-fast[gpu]'")
    for name in config.report_to:
        wanted[name] = (f"report_to={name}", "'synpo-fast[train]'" if name == "tensorboard" else name)
    if config.video_backend != "auto":
        require_backend(config.video_backend)
    for package, (option, source) in wanted.items():
        if not _is_installed(package):
            raise MissingPackage(f"{option} needs {package}, which is not installed: pip install {source}")


def _is_installed(package: str) -> bool:
    """True if the package can be imported. A mere folder of that name, such as W&B's wandb/, is found too but has no origin."""
    spec = util.find_spec(package)
    return spec is not None and spec.origin is not None
