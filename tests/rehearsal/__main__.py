"""Rehearses every family's paths on a fake GPU, or on a real one if there is one: python -m tests.rehearsal

Prints a line for each family and path: passed or failed, and where the host waited for the device. Exits with status 1 if a
path fails, or if the host waits where paths.ALLOWED does not allow it. Without a GPU it needs torch built for CUDA
(`make rehearse`). With a GPU the same paths run on it, and torch.cuda.set_sync_debug_mode finds the waits.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tests.rehearsal.fake_gpu import fake_gpu, place_of
from tests.rehearsal.paths import ALLOWED, FAMILY_NAMES, PATHS, Rehearsed, prepare


@dataclass
class Outcome:
    """The outcome of one path. waits: places where the host waited, with counts. error: the error it raised, with its place."""

    family: str
    path: str
    waits: Counter[str]
    error: str | None = None

    @property
    def too_many(self) -> dict[str, int]:
        """Places with more waits than ALLOWED states. A place is named here without its line number."""
        by_name: Counter[str] = Counter()
        for place, count in self.waits.items():
            file, _, rest = place.partition(":")
            by_name[f"{file} {rest.partition(' ')[2]}"] += count
        return {name: count for name, count in by_name.items() if count > ALLOWED.get(name, 0)}

    @property
    def passed(self) -> bool:
        return self.error is None and not self.too_many


class RealGpu:
    """FakeGpu's interface on a real GPU: torch warns at each wait, and the warning gives the line."""

    def __init__(self) -> None:
        self.waits: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._show
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def _show(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            self.waits.append(f"{place_of(sys._getframe(1))}: waits")


@contextmanager
def machine() -> Iterator[Any]:
    if torch.cuda.is_available():
        gpu = RealGpu()
        with gpu.watching():
            yield gpu
        return
    with fake_gpu() as fake:
        yield fake


def rehearse(families: tuple[str, ...], paths: tuple[str, ...]) -> Iterator[Outcome]:
    for family in families:
        with machine() as gpu:
            try:
                ready = prepare(family)
            except Exception as error:  # any error is a finding
                yield Outcome(family, "load", Counter(), _error_text(error))
                continue
            yield Outcome(family, "load", Counter())  # loading may wait any number of times
            for path in paths:
                gpu.waits.clear()
                yield _run(family, path, ready, gpu)


def _run(family: str, path: str, ready: Rehearsed, gpu: Any) -> Outcome:
    try:
        PATHS[path](ready)
    except Exception as error:  # as above
        return Outcome(family, path, Counter(gpu.waits), _error_text(error))
    return Outcome(family, path, Counter(gpu.waits))


def _error_text(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return f"{place_of(frames[-1]) if frames else 'elsewhere'}: {type(error).__name__}: {lines[0][:160]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal", description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILY_NAMES, default=list(FAMILY_NAMES))
    parser.add_argument("--paths", nargs="+", choices=tuple(PATHS), default=list(PATHS))
    words = parser.parse_args()
    if torch.version.cuda is None:
        print(
            f"torch {torch.__version__} was not built for CUDA: `make rehearse` sets up an environment with one that was"
        )
        return 2
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a fake GPU"
    print(f"torch {torch.__version__} on {where}")
    failed = count = 0
    for outcome in rehearse(tuple(words.families), tuple(words.paths)):
        count += 1
        failed += not outcome.passed
        print(
            f"{outcome.family:16} {outcome.path:24} {'passed' if outcome.passed else 'FAILED'}  waits {outcome.waits.total()}"
        )
        for place, times in outcome.waits.items():
            print(f"{'':20} {times} x {place}")
        for name, times in outcome.too_many.items():
            print(f"{'':20} too many: {name}, {times} times, {ALLOWED.get(name, 0)} allowed")
        if outcome.error:
            print(f"{'':20} {outcome.error}")
    print(f"{count - failed} of {count} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
