"""A run killed in mid-epoch resumes with exactly the pairs that were left, in the same order."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from synpo_fast.testing.clips import write_clip
from tests.data import resume_run

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for k in range(2):
        write_clip(root / f"{k}.mp4", codec="h264", num_frames=4 + k, width=96, height=64)
    return root


def whole_run(root: Path, epochs: int) -> list:
    """The run as one rank without workers reads it, uninterrupted; global steps of 4 pairs."""
    (loader,) = resume_run.loaders(root, 1, 0)
    return [resume_run.described((batch,)) for epoch in range(epochs) for batch in loader.steps(epoch)]


def merged(step: list) -> list:
    """A global step whatever the number of ranks: its place, its good pairs and its bad ones, sorted."""
    places = {(epoch, number) for epoch, number, _, _ in step}
    assert len(places) == 1, "ranks in lockstep"
    return [*places, sorted(pair for *_, good, _ in step for pair in good), [name for *_, bad in step for name in bad]]


@pytest.mark.parametrize(
    ("world_size", "num_workers", "steps_before"),
    [
        (1, 0, 3),
        (2, 1, 8),  # in the second of the epochs of 6 steps
        pytest.param(1, 2, 6, marks=pytest.mark.heavy),  # at the end of an epoch
        pytest.param(2, 2, 1, marks=pytest.mark.heavy),
    ],
)
def test_a_killed_run_goes_on_where_it_was(root, world_size, num_workers, steps_before):
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.data.resume_run", str(root), str(world_size), str(num_workers)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdin is not None and run.stdout is not None
    before = []
    for _ in range(steps_before):
        before.append(json.loads(run.stdout.readline()))
        run.stdin.write("\n")
        run.stdin.flush()
    before.append(json.loads(run.stdout.readline()))  # this step was begun, and is lost
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) == world_size * num_workers
    memory = Path(f"/proc/{run.pid}/maps").read_text()
    assert "/dev/shm" not in memory and ("memfd:synpo_fast" in memory) == (num_workers > 0), "it leaves with its owner"
    run.kill()
    run.wait()
    run.stdin.close()
    run.stdout.close()
    assert not psutil.wait_procs(children, timeout=20)[1]

    epoch, step = divmod(steps_before, 6)
    resumed = resume_run.loaders(root, world_size, 0)
    after = [
        json.loads(json.dumps(resume_run.described(batches)))
        for batches in zip(*(loader.steps(epoch, step) for loader in resumed), strict=True)
    ]
    assert after[0] == before.pop(), "the step that was lost, rank by rank"
    found = [merged(step) for step in before + after]
    wanted = [merged(json.loads(json.dumps(step))) for step in whole_run(root, epoch + 1)]
    assert found == wanted
    names = [name for _, good, _ in found[6 * epoch :] for name, _ in good]
    assert sorted(names) == sorted(f"p{k}" for k in range(23) if k != 8), "every good pair once"
