"""benchmarks/decode.py: its JSON, the wrong results it does not show, the cases it skips. No test asserts a time."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import decode
from benchmarks.contest import Options, Step, Unavailable
from benchmarks.decoding import cases as decode_cases
from benchmarks.decoding import cold as decode_cold
from benchmarks.decoding.cases import BASELINE, CONTESTANTS, Case, Clip, cases_of, prepare, why_wrong

CPU = torch.device("cpu")
OPTIONS = Options(CPU, rounds=2, budget_seconds=60.0)
VP9 = Clip("vp9", 96, 64, 1, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clips")


def clips_only(case: Case, folder: Path) -> list:
    return [path.name for path in folder.iterdir() if path.name.startswith(case.clip.name)]


@pytest.mark.parametrize("wanted", ["3", "half", "all"])
def test_a_case_of_every_contestant(folder, wanted):
    case = Case(VP9, wanted)
    record = decode.run_case(case, list(CONTESTANTS), folder, OPTIONS)
    json.dumps(record, allow_nan=False)
    rows = {row["name"]: row for row in record["rows"]}
    assert record["num_wanted"] == {"3": 3, "half": 13, "all": 25}[wanted] and record["num_frames"] == 25
    assert list(rows) == list(CONTESTANTS)
    for name in (BASELINE, "pyav"):
        row = rows[name]
        assert row["skipped"] is None and row["seconds"]["rounds"] == 2
        median = row["seconds"]["median"]
        assert row["frames_per_second"] == pytest.approx(record["num_wanted"] / median)
        assert row["video_seconds_per_second"] == pytest.approx(1 / median)
    assert rows[BASELINE]["speedup"] == 1
    ratios = [b / o for b, o in zip(*(rows[n]["seconds"]["samples"] for n in (BASELINE, "pyav")), strict=True)]
    assert rows["pyav"]["speedup"] == pytest.approx(sum(ratios) / 2)
    assert decode.case_title(record) in decode.case_table(record)


def test_clips_are_written_once(folder):
    case = Case(VP9, "3")
    path = case.clip.file(folder)
    before = path.stat().st_mtime_ns
    assert case.clip.file(folder) == path and path.stat().st_mtime_ns == before
    assert clips_only(case, folder) == [path.name], "and no unfinished file is left"


def test_indices_are_evenly_spread():
    case = Case(Clip("h264", 64, 64, 2, 10), "8")
    assert case.indices == [0, 7, 14, 21, 28, 35, 42, 49]
    assert [case.wanted for case in cases_of((VP9, "8 half"), (VP9, "all"))] == ["8", "half", "all"]


@pytest.mark.parametrize("fault", ["shifted", "short", "grey"])
def test_wrong_frames_are_shown_without_speed(folder, monkeypatch, fault):
    def broken(path, indices, device):
        right = decode_cases.decode_all_then_pick(path, indices, device)
        return {"shifted": right.flip(0), "short": right[:-1], "grey": torch.full_like(right, 128)}[fault]

    monkeypatch.setitem(CONTESTANTS, "pyav", (broken, "wrong on purpose"))
    record = decode.run_case(Case(VP9, "4"), [BASELINE, "pyav"], folder, OPTIONS)
    row = record["rows"][1]
    assert row["faulty"] and row["skipped"].startswith("WRONG: ")
    assert row["seconds"] is row["speedup"] is row["frames_per_second"] is None
    assert "WRONG" in decode.case_table(record)


def test_what_is_wrong_is_said(folder):
    case = Case(VP9, "3")
    frames = decode_cases.decode_all_then_pick(case.clip.file(folder), [0, 12, 13], CPU)
    assert why_wrong(frames, case) == "frame 2 is number 13, wanted 24"


def test_a_contestant_that_fails_only_later_is_not_shown(folder, monkeypatch):
    calls = []

    def at_first(path, indices, device):
        calls.append(1)
        right = decode_cases.decode_all_then_pick(path, indices, device)
        return right if len(calls) < 3 else right.flip(0)

    monkeypatch.setitem(CONTESTANTS, "pyav", (at_first, "right at first"))
    record = decode.run_case(Case(VP9, "4"), [BASELINE, "pyav"], folder, OPTIONS)
    assert record["rows"][1]["faulty"] and record["rows"][1]["seconds"] is None


def test_what_a_backend_can_not_do_is_skipped_with_the_reason(tmp_path):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    clip = Clip("h264", 64, 64, 1, 10)
    with pytest.raises(Unavailable, match="DALI has no h264 decoder on cpu"):
        prepare("dali", Case(clip, "3"), tmp_path / "none.mp4", CPU)
    record = decode.run_case(Case(clip, "3"), ["dali", "pyav"], tmp_path, OPTIONS)
    row = record["rows"][0]
    assert row["skipped"] == "DALI has no h264 decoder on cpu" and not row["faulty"]
    assert record["rows"][1]["seconds"] and record["rows"][1]["speedup"] is None, "there is no baseline to compare with"
    assert isinstance(prepare("dali", Case(VP9, "3"), tmp_path / "none.webm", CPU), Step)


def test_first_frames_come_from_fresh_processes(folder):
    record = decode_cold.first_frames(Case(VP9, "3"), [BASELINE, "torchcodec-alone"], folder, CPU, runs=1)
    baseline, torchcodec = record["rows"]
    assert len(baseline["samples"]) == 1 and baseline["skipped"] is None
    assert torchcodec["skipped"] or torchcodec["samples"]
    assert "fresh process" in decode_cold.first_table(record)


def test_the_whole_program(tmp_path, folder, monkeypatch, capsys):
    cold = {"clip": "a clip", "num_wanted": 3, "rows": [{"name": "pyav", "skipped": None, "samples": [0.25]}]}
    monkeypatch.setattr(decode, "first_frames", lambda *_, **__: cold)  # it has a test of its own
    monkeypatch.setattr(decode, "QUICK_CASES", cases_of((VP9, "3")))
    arguments = ["--quick", "--backends", BASELINE, "pyav", "--clips", str(folder), "--rounds", "1"]
    code = decode.main([*arguments, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "pictures")])
    record = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and len(record["cases"]) == 1 and record["first_frames"] == cold
    assert record["environment"]["packages"]["av"]
    assert (tmp_path / "pictures" / "decode.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "3 of 25 frames" in shown and "250 ms" in shown

    monkeypatch.setitem(CONTESTANTS, "pyav", (lambda path, indices, device: torch.zeros(1), "wrong on purpose"))
    assert decode.main(arguments) == 1
    assert "pyav on vp9 96x64" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rounds", "-1"], ["--codecs", "mpeg1"], ["--backends", "decord"]])
def test_bad_arguments(arguments):
    with pytest.raises(SystemExit):
        decode.parse(arguments)


def test_the_readme_names_only_what_exists(capsys):
    text = (Path(decode.__file__).parent / "README.md").read_text().split("\n## Decoding")[1].split("\n## ")[0]
    with pytest.raises(SystemExit):
        decode.parse(["--help"])
    shown = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert set(re.findall(r"--\w+", text)) <= shown
    assert {name for name in re.findall(r"^\| ([\w-]+) \|", text, re.M) if name != "name"} == set(CONTESTANTS)
