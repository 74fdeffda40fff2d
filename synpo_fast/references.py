"""Reference log-probs for losses that compare with a reference: computed on demand, or read from a file.

    FrozenCopy     a copy of the policy at this moment: twice the memory, never changes
    AdapterOff     the policy with its adapter switched off: no extra memory; correct only if nothing outside the adapter trains
    PreviousRound  a policy loaded from the last round's folder
    Precomputed    a file of log-probs, keyed by the reference's weights (digest.weights_key) and by each sample
    AnchorClip     any of the above, on a second view of each sample (LongVPO: the anchor clip without its distractors)

Each is a callable that takes samples and returns, for each sample and each response, the detached token log-probs [T].

The file (a run's reference.pt) is a torch file of {"weights": key of the reference's weights, "entries": {key of a sample:
[log-probs of each response]}}. `precompute` computes and writes such a file; `write_logps` writes entries that were merged from
several files.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from synpo_fast.errors import UserError
from synpo_fast.models.digest import sample_key
from synpo_fast.models.policy import Logps, Policy, Sample

logger = logging.getLogger(__name__)
Entries = dict[str, list[Tensor]]  # a sample's key -> the log-probs of each of its responses


class Reference(Protocol):
    """A callable that returns detached log-probs.

    same_tower: a policy whose vision tower has the same weights as the trained policy's while that tower is frozen, so that one
    pass can encode a video for both. None if the reference has no tower, or if its weights may differ.
    """

    @property
    def same_tower(self) -> Policy | None: ...

    def __call__(self, samples: Sequence[Sample]) -> Logps: ...


class FrozenCopy:
    """A copy of the policy as it is now. Later training does not change it."""

    def __init__(self, policy: Policy, *, share_prefix: bool = True) -> None:
        self.policy, self.share_prefix = copy.deepcopy(policy).requires_grad_(False).eval(), share_prefix
        self.same_tower: Policy | None = self.policy

    def __call__(self, samples: Sequence[Sample]) -> Logps:
        return detached_logps(self.policy, samples, self.share_prefix)


class PreviousRound:
    """A policy that was loaded as the reference. It is frozen in place and not copied."""

    same_tower: Policy | None = None  # its tower may have trained in that round

    def __init__(self, policy: Policy, *, share_prefix: bool = True) -> None:
        self.policy, self.share_prefix = policy.requires_grad_(False).eval(), share_prefix

    def __call__(self, samples: Sequence[Sample]) -> Logps:
        return detached_logps(self.policy, samples, self.share_prefix)


class AdapterOff:
    """The policy's base model, with its adapter switched off.

    Raises ValueError with the names of parameters that train outside the adapter: the reference would change with them. (The
    released video-SALMONN 2 v1 had this leak.)
    """

    def __init__(self, policy: Policy, *, share_prefix: bool = True) -> None:
        self.policy, self.share_prefix = policy, share_prefix
        self.same_tower: Policy | None = policy
        self._check()

    def __call__(self, samples: Sequence[Sample]) -> Logps:
        self._check()
        was_training = self.policy.training
        self.policy.eval()
        try:
            with self.policy.model.disable_adapter():  # type: ignore[operator]
                return detached_logps(self.policy, samples, self.share_prefix)
        finally:
            self.policy.train(was_training)

    def _check(self) -> None:
        if not hasattr(self.policy.model, "disable_adapter"):
            raise UserError("reference 'adapter off' needs a peft adapter; without one use a frozen copy or precompute")
        outside = [
            name for name, p in self.policy.model.named_parameters() if p.requires_grad and not _is_adapter(name)
        ]
        if outside:
            raise UserError(
                f"reference 'adapter off' would change: {len(outside)} trained parameters lie outside the adapter, "
                f"{', '.join(outside[:3])} among them; freeze them or use a frozen copy"
            )


class Precomputed:
    """Reference log-probs read from a file that `precompute` wrote.

    Raises ValueError if the file was made with other weights or has no entry for a sample: a stale reference is an error.
    """

    same_tower: Policy | None = None  # it encodes nothing

    def __init__(self, file: str | Path, *, weights_key: str) -> None:
        stored = torch.load(file, weights_only=True)
        if stored["weights"] != weights_key:
            raise UserError(
                f"{file} was computed with other reference weights ({stored['weights'][:12]}, wanted {weights_key[:12]}); "
                "compute it again"
            )
        self.file, self.entries = file, stored["entries"]

    def __call__(self, samples: Sequence[Sample]) -> Logps:
        results: Logps = []
        for sample in samples:
            key = sample_key(sample)
            if key not in self.entries:
                raise UserError(
                    f"{self.file} has no reference for sample {sample.name!r} as it is now: its video has changed, or could not "
                    "be read when the reference was made. Compute it again: delete the file, and start the run with --resume auto"
                )
            results.append(list(self.entries[key]))
        return results


def precompute(
    score: Callable[[Sequence[Sample]], Logps],
    batches: Iterable[Sequence[Sample]],
    file: str | Path,
    *,
    weights_key: str,
) -> None:
    """Computes the reference log-probs of samples and writes them to a file for `Precomputed`.

    Args:
        score: computes the log-probs: a reference, or a callable with the same signature.
        batches: samples to score together; a batch may be empty.
        weights_key: the key of the reference's weights, which `Precomputed` compares with the one it is given.
    """
    entries: Entries = {}
    for samples in batches:
        scores = score(samples) if samples else []
        for sample, logps in zip(samples, scores, strict=True):
            entries[sample_key(sample)] = [values.cpu() for values in logps]
    write_logps(file, entries, weights_key=weights_key)


def in_batches(samples: Sequence[Sample], size: int = 8) -> Iterator[Sequence[Sample]]:
    """Yields the samples in batches of `size`; the last one may be smaller."""
    for begin in range(0, len(samples), size):
        yield samples[begin : begin + size]


def write_logps(file: str | Path, entries: Entries, *, weights_key: str) -> None:
    """Writes the file atomically, so that it is never half-written. Raises UserError if it cannot be written."""
    file = Path(file)
    partial = file.with_name(file.name + ".partial")
    try:
        torch.save({"weights": weights_key, "entries": entries}, partial)
        partial.replace(file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        partial.unlink(missing_ok=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} cannot be written ({reason}): free some disk space and start again") from error


def read_logps(file: str | Path) -> Entries:
    """Reads the entries that `precompute` wrote, without checking which weights they belong to."""
    entries: Entries = torch.load(file, weights_only=True)["entries"]
    return entries


def is_fresh(file: Path, weights_key: str) -> bool:
    """True if the file exists, is complete and belongs to these weights. An unreadable file gives a warning and False."""
    try:
        found = torch.load(file, weights_only=True)
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}")
        fresh, whole = found["weights"] == weights_key, isinstance(found["entries"], dict)
    except FileNotFoundError:
        return False
    except Exception as error:  # unpickling arbitrary bytes can raise any error
        reason = (str(error).strip().splitlines() or [""])[0]
        logger.warning("%s cannot be read (%s: %s) and will be recomputed", file, type(error).__name__, reason)
        return False
    return bool(fresh) and whole


def why_stale(file: Path, weights_key: str) -> str:
    """The reason why a file is not fresh. A key of another version has another number of parts."""
    try:
        found = str(torch.load(file, weights_only=True)["weights"])
    except Exception:  # is_fresh has reported that it cannot be read
        return "could not be read"
    if _num_parts(found) != _num_parts(weights_key):
        return "was made by another version of synpo-fast"
    return "was made with other weights, pairs or video files"


def _num_parts(key: str) -> int:
    """The number of words in a key, where a Python object such as FrameSampling(fps=1.0, max_frames=8) is one word."""
    while (shorter := re.sub(r"\([^()]*\)", "", key)) != key:
        key = shorter
    return len(key.split())


class AnchorClip:
    """A reference that scores `view(sample)`, with the same responses and a smaller context, by an inner reference."""

    same_tower: Policy | None = None  # the views have other videos than the samples

    def __init__(self, inner: Reference, view: Callable[[Sample], Sample]) -> None:
        self.inner, self.view = inner, view

    def __call__(self, samples: Sequence[Sample]) -> Logps:
        seen = [self.view(sample) for sample in samples]
        for sample, other in zip(samples, seen, strict=True):
            if other.responses != sample.responses:
                raise ValueError(
                    f"the view of sample {sample.name!r} changed its responses; it may change the context only"
                )
        return self.inner(seen)


@torch.no_grad()
def detached_logps(policy: Policy, samples: Sequence[Sample], share_prefix: bool = True) -> Logps:
    """Computes the samples' log-probs under the current policy, without autograd."""
    return [[logps.detach() for logps in sample] for sample in policy(samples, share_prefix=share_prefix)]


def _is_adapter(name: str) -> bool:
    """True if the parameter belongs to peft. A fully trained module (modules_to_save) counts, because peft keeps its original."""
    return "lora_" in name or ".modules_to_save." in name
