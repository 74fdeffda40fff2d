"""The sweeps of benchmarks/throughput.py, their pictures, and the search for the largest batch."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft", reason="the variants train an adapter")
pytest.importorskip("trl", reason="TRL is what is compared with")

from benchmarks import throughput
from benchmarks.steps import BASELINE, VARIANTS, largest_batch, sweeps
from benchmarks.steps import plot as plot_throughput
from benchmarks.steps.presets import PRESETS, build_policy
from benchmarks.steps.sweeps import SWEEPS, presets_along
from benchmarks.steps.workload import MARKERS, make_workload, visual_tokens
from synpo_fast.profiling.rounds import median_interval
from tests.benchmarks.test_throughput import CPU, TINY, one_thread  # noqa: F401


@pytest.mark.parametrize("name", list(SWEEPS))
@pytest.mark.parametrize(("preset", "device"), [("cpu", "cpu"), ("gpu", "cuda")])
def test_every_point_of_a_sweep_is_a_possible_pair(name, preset, device):
    points = list(presets_along(SWEEPS[name], PRESETS[preset], device))
    assert [value for value, _ in points] == list(SWEEPS[name].values)
    for value, point in points:
        assert visual_tokens(point) + MARKERS < point.prefix, (value, point)
        along = {
            "ratio": point.prefix / point.completion,
            "frames": point.frames,
            "valid": point.completion / (point.prefix + point.completion),
        }
        assert along[name] == pytest.approx(value, rel=0.02, abs=0.005)  # whole tokens


def test_a_text_model_has_no_frames_to_sweep_over():
    assert [point.frames for _, point in presets_along(SWEEPS["ratio"], PRESETS["text"], "cpu")] == [0] * 6
    with pytest.raises(ValueError, match="preset 'text' has no frames"):
        list(presets_along(SWEEPS["frames"], PRESETS["text"], "cpu"))


def test_visual_tokens_are_those_of_the_video():
    policy = build_policy(TINY, CPU)
    for frames, size in ((1, 56), (2, 84), (5, 84), (6, 112)):
        preset = replace(TINY, frames=frames, size=size, prefix=100, pairs=1)
        (sample,) = make_workload(preset, CPU, policy=policy).samples
        assert sample.video.num_placeholders == visual_tokens(preset)


@pytest.mark.parametrize("name", ["ratio", "valid"])
def test_a_sweep_prints_writes_and_draws(name, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures are matplotlib's")
    monkeypatch.setitem(PRESETS, "cpu", replace(TINY, prefix=60, completion=30))
    monkeypatch.setitem(sweeps.SIZE, "cpu", 56)
    monkeypatch.setitem(
        SWEEPS, name, replace(SWEEPS[name], values=SWEEPS[name].values[2:4], variants=(BASELINE, "synpo-fast"))
    )
    file = tmp_path / "out.json"
    assert throughput.main(
        ["--device", "cpu", "--rounds", "1", "--sweep", name, "--json", str(file), "--plot", str(tmp_path)]
    ) == 0  # fmt: skip
    record = json.loads(file.read_text())
    (sweep,) = record["sweeps"]
    assert "runs" not in record and [point["value"] for point in sweep["points"]] == list(SWEEPS[name].values)
    assert all(row["ratio"] is not None and row["limit"] > 0 for point in sweep["points"] for row in point["rows"])
    assert (tmp_path / f"sweep-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("synpo-fast") >= 2
    assert plot_throughput.main([str(file), "--out", str(tmp_path / "again")]) == 0
    assert [path.name for path in (tmp_path / "again").iterdir()] == [f"sweep-{name}.png"]


def test_the_interval_is_named_by_how_often_it_contains_the_median():
    random = torch.Generator().manual_seed(0)
    for rounds in (1, 3, 4, 5, 7, 8, 11, 20):
        trials = torch.randn(20_000, rounds, generator=random, dtype=torch.float64)
        held = sum(low <= 0 <= high for low, high in map(median_interval, trials.tolist())) / len(trials)
        assert (plot_throughput._interval_name(rounds) == "the median's 90 % interval") == (held >= 0.895), (
            rounds,
            held,
        )


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 31, 32, 33, 100])
@pytest.mark.parametrize("most", [1, 7, 32])
def test_the_largest_count_that_fits_is_found(limit, most):
    tried = []

    def fits(count):
        tried.append(count)
        return count <= limit

    assert largest_batch.largest(fits, most) == min(limit, most)
    assert len(tried) == len(set(tried)) <= 12 and max(tried) <= most


def test_running_out_of_memory_ends_the_search_and_another_error_does_not(monkeypatch):
    policy = build_policy(TINY, CPU)
    pairs_run = []

    def short_of_memory(workload, variant, forward):
        def run():
            pairs_run.append(len(workload.samples))
            if len(workload.samples) > 2:
                raise torch.OutOfMemoryError("too much")

        return run

    monkeypatch.setattr(largest_batch, "full_step", short_of_memory)
    variant = VARIANTS["synpo-fast"]
    assert largest_batch.largest_batch(TINY, policy, variant, CPU) == 2
    assert pairs_run == [1, 2, 4, 3]

    def broken(workload, variant, forward):
        raise RuntimeError("not memory")

    monkeypatch.setattr(largest_batch, "full_step", broken)
    with pytest.raises(RuntimeError, match="not memory"):
        largest_batch.largest_batch(TINY, policy, variant, CPU)
