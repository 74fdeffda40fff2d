"""Faults in a run: it is killed, told to stop, given bad videos or values that are not finite, or cannot write."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from synpo_fast.data import Pair, read_manifest, write_manifest
from synpo_fast.errors import UserError
from synpo_fast.run_folder.checkpoint import checkpoint_problem, list_checkpoints, newest_checkpoint
from synpo_fast.training.loop import TrainingStopped
from synpo_fast.training.metrics import read_metrics
from tests.world import command_line, environment, options, run, train_command


def final_weights(folder, step):
    return load_file(folder / f"checkpoint-{step:06d}" / "adapter_model.safetensors")


def assert_equal_runs(folder, whole, steps):
    """Bit for bit, in weights and in every step's loss."""
    found, expected = final_weights(folder, steps), final_weights(whole, steps)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    rows = [[(row["step"], row["loss"]) for row in read_metrics(each / "metrics.jsonl")] for each in (folder, whole)]
    assert rows[0] == rows[1] and len(rows[0]) == steps


def kill_and_resume(world, tmp_path, in_one_process, *, steps, kills, seed):
    """Starts the command again and again and kills it at a random moment, until it has been killed `kills` times."""
    rng = random.Random(seed)
    # 16 pairs a step: slow enough for the run not to end while it is being watched.
    more = {"max_steps": steps, "save_steps": 2, "lora_dropout": 0.2, "gradient_accumulation_steps": 16}
    values = options(world, tmp_path / "killed", **more)
    in_one_process({**values, "output_dir": str(tmp_path / "whole"), "save_steps": 0})
    metrics, killed_at = tmp_path / "killed" / "metrics.jsonl", []
    while len(killed_at) < kills:
        before = len(read_metrics(metrics))
        # Resumed runs begin at a checkpoint, up to 2 steps back. Some are killed while they write one.
        target = rng.randint(1, max(1, (steps - before) // (kills - len(killed_at) + 1)))
        process = subprocess.Popen(
            train_command({**values, "resume": "auto"}),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 200
        while process.poll() is None and len(read_metrics(metrics)) < min(steps - 1, before + target):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        assert process.poll() is None, "the run was over before it was killed: choose more steps"
        process.kill()
        process.wait()
        killed_at.append(len(read_metrics(metrics)))
        for folder in list_checkpoints(tmp_path / "killed"):
            assert checkpoint_problem(folder) is None
    done = run(train_command({**values, "resume": "auto"}))
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole", steps)
    return killed_at


def test_a_killed_run_ends_as_the_one_nobody_killed(world, tmp_path, in_one_process):
    assert len(kill_and_resume(world, tmp_path, in_one_process, steps=16, kills=2, seed=1)) == 2


@pytest.mark.heavy
def test_twenty_kills_in_sixty_steps(world, tmp_path, in_one_process):
    print(kill_and_resume(world, tmp_path, in_one_process, steps=60, kills=20, seed=7))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sigterm_saves_and_ends(world, tmp_path, port, num_ranks):
    """A scheduler sends SIGTERM to every process of the job, the launcher included."""
    values = options(world, tmp_path / "out", max_steps=5000, save_steps=0, gradient_accumulation_steps=2)
    process = subprocess.Popen(
        train_command(values, num_ranks=num_ranks, port=port),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while len(read_metrics(tmp_path / "out" / "metrics.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    try:
        output, _ = process.communicate(timeout=100)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "stopped by SIGTERM at step" in output
    checkpoint = newest_checkpoint(tmp_path / "out")
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert checkpoint is not None and checkpoint.name == f"checkpoint-{rows[-1]['step']:06d}"
    if num_ranks == 1:
        assert process.returncode == 0


def test_a_disk_that_fills_up_in_mid_run(world, tmp_path):
    """The first checkpoint and the metrics file fit under the limit of a file's size; the second checkpoint does not."""
    values = options(world, tmp_path / "out", max_steps=4, save_steps=2, lora_r=2)
    assert run(train_command({**values, "max_steps": 2})).returncode == 0
    done = run(
        train_command({**values, "resume": "auto", "lr_scheduler_type": "linear"}),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),
    )
    assert done.returncode == 1 and "could not write" in done.stderr and "File too large" in done.stderr
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-000002"
    assert not list((tmp_path / "out").glob("*.partial"))


def test_an_output_folder_that_cannot_be_written_stops_before_the_model_is_loaded(world, tmp_path):
    (tmp_path / "file").write_text("x")
    shutil.copytree(world / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_text("no weights: whoever reads them has come too far")
    values = {**options(world, tmp_path / "file" / "out"), "model_name_or_path": str(tmp_path / "base")}
    done = run(train_command(values))
    assert done.returncode == 2 and "cannot be written" in done.stderr


def bad_world(world, tmp_path, num_bad):
    """The world's pairs, the first `num_bad` of them with files that are not videos."""
    pairs = read_manifest(world / "pairs.jsonl")
    for file in world.glob("*.mp4"):
        os.link(file, tmp_path / file.name)
    for index in range(num_bad):
        (tmp_path / f"bad{index}.mp4").write_text("not a video")
    videos = [f"bad{index}.mp4" for index in range(num_bad)]
    changed = [
        Pair(pair.prompt, pair.chosen, pair.rejected, video=videos.pop(0) if videos else pair.video, id=pair.id)
        for pair in pairs
    ]
    write_manifest(tmp_path / "pairs.jsonl", changed)
    return str(tmp_path / "pairs.jsonl")


def test_bad_videos_are_counted_skipped_and_listed(world, tmp_path, in_one_process, capfd):
    values = options(world, tmp_path / "out", max_steps=4, save_steps=1, max_bad_share=0.5)
    in_one_process({**values, "train_file": bad_world(world, tmp_path, 2)})
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    file = tmp_path / "out" / "skipped_pairs.rank0.jsonl"
    first = json.loads(file.read_text().splitlines()[0])
    assert (
        f"2 of 16 pairs could not be used. {first['id']!r}: {first['reason']}. {file} lists them"
        in capfd.readouterr().err
    )
    assert rows[-1]["skipped_pairs"] == 2  # 4 steps of 4: each pair once
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped_pairs.rank0.jsonl").read_text().splitlines()]
    assert {row["id"] for row in listed} == {"p0-0", "p0-1"} and all("bad" in row["reason"] for row in listed)
    # A resumed run meets them again, and lists them once; on fewer ranks than before, too.
    shutil.rmtree(tmp_path / "out" / "checkpoint-000004")
    (tmp_path / "out" / "skipped_pairs.rank1.jsonl").write_text(
        '{"id": "a", "step": 1}\n{"id": "of a ki{"id": "c", "step": 2}\n{"id": "b", "step": 4}\n'
    )
    in_one_process({**values, "train_file": str(tmp_path / "pairs.jsonl"), "resume": "auto"})
    again = [json.loads(line) for line in (tmp_path / "out" / "skipped_pairs.rank0.jsonl").read_text().splitlines()]
    assert again == listed
    assert (tmp_path / "out" / "skipped_pairs.rank1.jsonl").read_text() == '{"id": "a", "step": 1}\n'


def test_too_many_bad_videos_stop_the_run(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "out", max_steps=4, save_steps=0, seed=1)
    values["train_file"] = bad_world(world, tmp_path, 8)
    with pytest.raises(TrainingStopped, match=r"pairs could not be used, more than max_bad_share=0\.05") as error:
        in_one_process(values)
    assert "raise max_bad_share, and start again with --resume auto: checkpoint-0000" in str(error.value)
    stopped_at = int(newest_checkpoint(tmp_path / "out").name.removeprefix("checkpoint-"))
    state = in_one_process({**values, "resume": "auto", "max_bad_share": 1.0})
    assert (state.step, state.bad_pairs, state.seen_pairs) == (4, 8, 16)
    in_one_process({**values, "output_dir": str(tmp_path / "whole"), "max_bad_share": 1.0})
    stopped, whole = (final_weights(tmp_path / name, 4) for name in ("out", "whole"))
    assert stopped_at < 4 and all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_two_ranks_with_gaps_equal_one_rank_with_the_same_gaps(world, tmp_path, port, in_one_process):
    """A rank without a good pair still takes part, and the mean is over the good pairs of all ranks."""
    file = bad_world(world, tmp_path, 9)
    values = options(world, tmp_path / "one", max_steps=4, max_bad_share=1.0, gradient_accumulation_steps=2)
    values["train_file"] = file
    in_one_process(values)
    two = {**values, "gradient_accumulation_steps": 1, "output_dir": str(tmp_path / "two"), "zero_stage": 3}
    done = run(train_command(two, num_ranks=2, port=port))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert [row.get("loss") for row in rows[0]] == pytest.approx([row.get("loss") for row in rows[1]], abs=2e-5)
    ends = [final_weights(tmp_path / name, 4) for name in ("one", "two")]
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=5e-5)


def poison(monkeypatch, steps):
    """Makes the loss of these steps (from 0) nan."""
    from synpo_fast.training import pair_module

    original, calls = pair_module.PairModule.forward, []

    def forward(self, pairs, scale):
        loss, sums = original(self, pairs, scale)
        calls.append(1)
        return (loss * float("nan") if (len(calls) - 1) // 4 in steps else loss), sums

    monkeypatch.setattr(pair_module.PairModule, "forward", forward)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_changes_nothing(world, tmp_path, in_one_process, monkeypatch, zero_stage):
    poison(monkeypatch, {1})
    values = options(world, tmp_path / "out", max_steps=2, save_steps=1, zero_stage=zero_stage, save_total_limit=9)
    state = in_one_process(values)
    assert (state.nonfinite_steps, state.nonfinite_in_a_row) == (1, 1)
    weights = [final_weights(tmp_path / "out", step) for step in (1, 2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["nonfinite_steps"] == 1


def test_such_steps_in_a_row_stop_the_run_and_one_good_one_between_does_not(
    world, tmp_path, in_one_process, monkeypatch
):
    poison(monkeypatch, {1, 3, 4, 5})
    values = options(world, tmp_path / "out", max_steps=9, max_nonfinite_steps=3, save_steps=0)
    with pytest.raises(
        TrainingStopped, match=r"not finite in 3 steps in a row \(to step 6\).*: checkpoint-000006 holds"
    ):
        in_one_process(values)
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-000006"
    monkeypatch.undo()
    poison(monkeypatch, {0})  # one such step after a resume is one, not the fourth in a row
    assert in_one_process({**values, "resume": "auto"}).step == 9


def test_resuming_another_run_is_refused(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "out", max_steps=2, save_steps=1)
    in_one_process(values)
    with pytest.raises(ValueError, match="holds checkpoints: continue with --resume auto"):
        in_one_process(values)
    for change, message in (
        ({"seed": 7}, "seed was 42, now 7"),
        ({"gradient_accumulation_steps": 2}, "pairs of a step was 4, now 2"),
        ({"loss_type": "dpo"}, "loss_type was synpo, now dpo"),
    ):
        with pytest.raises(ValueError, match=message):
            in_one_process({**values, **change, "resume": "auto"})
    with pytest.raises(UserError, match="is not there: give a checkpoint-N folder, a run's folder"):
        in_one_process({**values, "resume": str(tmp_path / "nope")})
    with pytest.raises(UserError, match=r"cannot resume from .*-000002: .*\. Give another one: a checkpoint-N"):
        shutil.rmtree(tmp_path / "out" / "checkpoint-000002" / "state")
        in_one_process({**values, "resume": str(tmp_path / "out" / "checkpoint-000002")})
    state = in_one_process({**values, "resume": "auto", "max_steps": 3})
    assert state.step == 3
    in_one_process({**values, "overwrite_output_dir": True})
    assert [folder.name for folder in list_checkpoints(tmp_path / "out")] == ["checkpoint-000001", "checkpoint-000002"]


@pytest.mark.heavy
def test_memory_does_not_grow_over_500_steps(world, tmp_path):
    """Samples the resident memory of a separate process while it trains; the first 100 steps fill caches."""
    values = options(
        world, tmp_path / "out", max_steps=500, save_steps=100, eval_split=0.2, eval_steps=100, max_new_tokens=4
    )
    code = (
        "import sys, threading, time, psutil, json\n"
        "from synpo_fast.train import main\n"
        "from synpo_fast.training import loop\n"
        "seen = []; original = loop.train_step\n"
        "def step(run, batch):\n"
        "    seen.append(psutil.Process().memory_info().rss)\n"
        "    return original(run, batch)\n"
        "loop.train_step = step\n"
        "status = main(sys.argv[1:]); print('SEEN', json.dumps(seen)); sys.exit(status)"
    )
    done = run([sys.executable, "-c", code, *command_line(values)], timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.split("SEEN ")[1])
    tail = torch.tensor(seen[100:], dtype=torch.float64) / 2**20
    steps = torch.arange(len(tail), dtype=torch.float64)
    slope = float(((steps - steps.mean()) * (tail - tail.mean())).sum() / (steps - steps.mean()).square().sum())
    print(f"{slope * 1000:.1f} KiB a step, {tail[0]:.0f} -> {tail[-1]:.0f} MiB")
    assert slope * 400 < 16, f"{slope * 400:.1f} MiB over 400 steps"


def test_ranks_with_unequal_evaluations_take_part_in_each_others(world, tmp_path, port, in_one_process):
    """3 held-out pairs on 2 ranks, one pair per forward: one rank has one more forward, which under ZeRO-3 both must run."""
    pairs = read_manifest(world / "pairs.jsonl")
    write_manifest(world / "three.jsonl", pairs[:3])
    values = options(
        world, tmp_path / "one", max_steps=1, zero_stage=3, eval_file=str(world / "three.jsonl"), report=False,
        max_batch_tokens=1, per_device_eval_batch_size=2, num_eval_captions=0, gradient_accumulation_steps=2,
    )  # fmt: skip
    in_one_process(values)
    two = {**values, "output_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 1}
    done = run(train_command(two, num_ranks=2, port=port), timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = [
        [row["eval_loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "eval_loss" in row]
        for name in ("one", "two")
    ]
    assert len(found[0]) == 2 and found[0] == pytest.approx(found[1], abs=2e-5)
