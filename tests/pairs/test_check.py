"""`synpo-fast pairs`, as a command, on folders with good, missing and broken videos; and what a report counts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from synpo_fast.cli import main
from synpo_fast.pairs.check import check_manifest, histogram
from synpo_fast.pairs.cli import report_text
from synpo_fast.testing.clips import write_clip

GOOD = {"prompt": "What moves in it?", "chosen": "A small red ball.", "rejected": "A dog."}


def command(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "synpo_fast.cli", "pairs", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture
def inside(capsys):
    """Runs the command in this process: a new one takes seconds to start."""

    def run(*arguments):
        try:
            status = main(["pairs", *map(str, arguments)])
        except SystemExit as exit:
            status = exit.code
        output = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, output.out, output.err)

    return run


def manifest(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """good.mp4 lasts 1.2 s; renamed.mp4 is a text; short.mp4 lost its end, and with it the table of its frames."""
    root = tmp_path_factory.mktemp("videos")
    write_clip(root / "good.mp4", codec="h264", num_frames=30, width=64, height=48)
    (root / "renamed.mp4").write_text("not a video")
    (root / "short.mp4").write_bytes((root / "good.mp4").read_bytes()[:1000])
    (root / "empty.mp4").touch()
    return root


def found(report):
    return {finding.what: finding.examples for finding in report.findings}


def test_a_clean_manifest(tmp_path, videos):
    path = manifest(tmp_path, {**GOOD, "video": "good.mp4"}, {**GOOD, "prompt": "Else?", "video": "good.mp4"})
    run = command("check", path, "--video_root", videos, "--decode", "--num_workers", 1)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 different video, all checked" in run.stdout and run.stdout.endswith("\nclean\n")


def test_broken_videos_are_named_with_their_pairs(tmp_path, videos):
    names = ["good.mp4", "renamed.mp4", "gone.mp4", "short.mp4", "empty.mp4", "gone.mp4"]
    path = manifest(tmp_path, *({**GOOD, "prompt": f"q{i}", "video": name} for i, name in enumerate(names)))
    run = command("check", path, "--video_root", videos, "--num_workers", 2, "--json")
    assert run.returncode == 1, run.stderr
    report = json.loads(run.stdout)
    assert (report["num_pairs"], report["num_videos"], report["clean"]) == (6, 5, False)
    (finding,) = (finding for finding in report["findings"] if finding["is_problem"])
    assert finding["what"] == "videos that cannot be used"
    reasons = dict(example.split(": ", 1) for example in finding["examples"])
    assert reasons.keys() == {"renamed.mp4", "gone.mp4", "short.mp4", "empty.mp4"}
    assert reasons["gone.mp4"].endswith("(2 pairs)") and reasons["renamed.mp4"].endswith("(1 pair)")


def test_mistakes_in_the_call_exit_with_2(tmp_path, videos, inside):
    path = manifest(tmp_path, GOOD)
    for arguments in [
        ("check",),
        ("check", tmp_path / "none.jsonl"),
        ("check", path, "--video_root", tmp_path / "none"),
        ("check", path, "--decode"),
        ("import", "--format", "nope", path, tmp_path / "out.jsonl"),
        ("import", "--format", "trl", path, path),  # it exists
        ("import", "--format", "trl", path, tmp_path / "out.parquet"),
        ("import", "--format", "trl", tmp_path / "none.jsonl", tmp_path / "out.jsonl"),
    ]:
        run = command(*arguments) if arguments[-1] == "--decode" else inside(*arguments)
        assert run.returncode == 2 and "error: " in run.stderr and "Traceback" not in run.stderr, arguments
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_bad_rows_and_files_are_problems(tmp_path):
    report = check_manifest(manifest(tmp_path, GOOD, {"prompt": "q"}))
    assert (report.num_rows, report.num_pairs, report.clean) == (2, 1, False)
    assert "pairs.jsonl:2: 'chosen' and 'rejected' missing" in found(report)["bad rows"][0]
    report = check_manifest(manifest(tmp_path))
    assert not report.clean and "has no rows" in found(report)["the file is not a manifest"][0]
    assert "not clean" in report_text(report)


def test_clips_are_held_against_their_videos(tmp_path, videos):
    spans = [{}, {"start": 0.5, "end": 1.25}, {"end": 1.5}, {"start": 1.3}]  # of 1.2 s; a tenth of one is rounding
    rows = [
        {**GOOD, "id": f"{i}", "prompt": f"q{i}", "clips": [{"path": "good.mp4", **span}]}
        for i, span in enumerate(spans)
    ]
    report = check_manifest(manifest(tmp_path, *rows), video_root=videos)
    (late,) = found(report).values()
    assert late == ["2: good.mp4 from 0 to 1.5 s of 1.200", "3: good.mp4 from 1.3 to its end s of 1.200"]


def test_pairs_are_compared(tmp_path):
    video = {"video": "v.mp4"}
    rows = [
        {**GOOD, **video, "id": "a"},
        {**GOOD, **video, "id": "again"},
        {**GOOD, **video, "id": "other rejected", "rejected": "A cat."},
        {**GOOD, "video": "w.mp4", "id": "other video"},
        {**GOOD, **video, "id": "against", "chosen": "A dog.", "rejected": "A cow."},
        {**GOOD, "id": "text", "chosen": "Yes", "rejected": " yes "},
        {**GOOD, "id": "scores", "prompt": "q", "chosen_score": 1, "rejected_score": 2.5},
        {**GOOD, "id": "tie", "prompt": "r", "chosen_score": 2, "rejected_score": 2},
        {**GOOD, "id": "sft", "prompt": "s", "rejected": "", "loss": "sft"},
    ]
    report = check_manifest(manifest(tmp_path, *rows))
    assert not report.videos_checked and (report.num_videos, report.num_sft, report.num_text_pairs) == (2, 1, 4)
    assert found(report) == {
        "pairs given more than once": ["a, again"],
        "texts both chosen and rejected, for one video and prompt": [
            "against chooses what a rejects",
            "against chooses what again rejects",
        ],
        "chosen and rejected differ only in case and spaces": ["text"],
        "rejected has the higher score": ["scores: chosen 1, rejected 2.5"],
        "one chosen text against several rejected ones": ["a, again, other rejected"],
        "the same texts for different videos": ["a, again, other video"],
    }
    notes = [finding.what for finding in report.findings if not finding.is_problem]
    assert notes == ["one chosen text against several rejected ones", "the same texts for different videos"]
    assert report.score_gaps == [-1.5, 0]


def test_rows_of_one_video_and_prompt_are_noted_for_kto(tmp_path):
    rows = [{**GOOD, "video": "v.mp4", "chosen": text} for text in ("One.", "Two.")]
    note = "rows of one video and prompt alone: loss_type=kto needs several of them"
    report = check_manifest(manifest(tmp_path, *rows))
    assert report.clean and found(report) == {note: ["all 2 rows"]}
    assert note not in found(check_manifest(manifest(tmp_path, *rows, {**rows[0], "video": "w.mp4"})))
    assert note not in found(check_manifest(manifest(tmp_path, rows[0])))


def test_notes_alone_are_clean(tmp_path):
    report = check_manifest(manifest(tmp_path, GOOD, {**GOOD, "rejected": "A cat."}))
    assert report.clean and report.findings and "clean" in report_text(report)


def test_lengths_and_length_bias(tmp_path):
    texts = [("one", "two words"), ("two words", "one"), ("now three words", "one"), ("a", "b")]
    rows = [{"prompt": " ".join(["w"] * n), "chosen": c, "rejected": r} for n, (c, r) in enumerate(texts, 1)]
    report = check_manifest(manifest(tmp_path, *rows))
    assert (
        report.words["chosen"]["max"] == 3 and report.words["prompt"]["min"] == 1 and report.words["prompt"]["max"] == 4
    )
    assert report.words["rejected"]["median"] == 1 and report.chosen_longer == 0.5
    assert "chosen is longer than rejected in 50.0% of pairs" in report_text(report)


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ([0.0, 0.5, 3.9], [1, 1, 1, 1]),
        ([-0.5, 0.5], [1, 1]),
        ([7.0], [1]),
        ([0, 24.0], [2] * 13),
        ([0, 1e6], [1e5] * 11),
    ],
)
def test_histogram(values, steps):
    bins = histogram(values)
    assert [high - low for low, high, _ in bins] == steps
    assert sum(count for _, _, count in bins) == len(values)
    assert all(any(low <= value < high for low, high, count in bins if count) for value in values)


def test_import_then_check(tmp_path, inside):
    """Rows refused: nothing is written and the status is 1, unless bad rows are allowed."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    row = {"video": "v.mp4", "task_type": "t", "question": "<video>\nQ", "chosen": "A", "rejected": "B", "extra": 1}
    rows.write_text("\n".join(map(json.dumps, [row, {**row, "question": "R"}, {**row, "rejected": None}])))
    run = inside("import", "--format", "auto", rows, out, "--allow_bad")
    assert run.returncode == 2 and "longvpo accepts 2 of 3 rows" in run.stderr
    run = inside("import", "--format", "longvpo", rows, out)
    assert run.returncode == 1 and not out.exists()
    for line in (
        "read 3 rows as longvpo: 2 pairs",
        "     1  no rejected",
        f"  {rows}:3: no rejected",
        "wrote nothing",
        "extra (2",
    ):
        assert line in run.stdout
    run = inside("import", "--format", "longvpo", rows, out, "--allow_bad")
    assert run.returncode == 0 and f"wrote 2 pairs to {out}" in run.stdout
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == ["Q", "R"]
    assert inside("import", "--format", "longvpo", rows, out, "--allow_bad", "--force").returncode == 0
    assert inside("check", out).returncode == 0


@pytest.mark.parametrize(
    "form", ["itself", "relative", "OUT links to IN", "IN links to OUT", "in a folder", "in a split"]
)
def test_an_import_never_overwrites_its_input(tmp_path, inside, form):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = folder / "train.jsonl"
    rows.write_text(json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B"}))
    link = tmp_path / "link.jsonl"
    link.symlink_to(rows)
    source, target = {
        "itself": (rows, rows),
        "relative": (rows, folder / ".." / "rows" / "train.jsonl"),
        "OUT links to IN": (rows, link),
        "IN links to OUT": (link, rows),
        "in a folder": (folder, rows),
        "in a split": (f"{folder}:train", link),
    }[form]
    before = rows.read_bytes()
    run = inside("import", "--format", "trl", source, target, "--force")
    assert run.returncode == 2 and f"error: OUT {target} is the input" in run.stderr and "another OUT" in run.stderr
    assert rows.read_bytes() == before and link.is_symlink()


def test_one_row_is_not_said_in_the_plural(tmp_path, inside):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "extra": 1}
    rows.write_text(json.dumps(row))
    run = inside("import", "--format", "trl", rows, out)
    assert "read 1 row as trl: 1 pair\n" in run.stdout and "extra (1 row)" in run.stdout
    assert f"wrote 1 pair to {out}\n" in run.stdout
    assert f"{out}: 1 row, 1 pair\n  0 train on chosen alone, 1 is a text pair\n" in inside("check", out).stdout
    rows.write_text(json.dumps({**row, "chosen": None}))
    run = inside("import", "--format", "trl", rows, out, "--force")
    assert "refused 1 row:\n" in run.stdout and f"in full:\n  {rows}:1: " in run.stdout


def several(name, *scored, **more):
    responses = [{"text": text, "score": score} for text, score in scored]
    return {"id": name, "prompt": "q", "video": "v.mp4", "responses": responses, **more}


def test_rows_with_several_responses_are_compared(tmp_path):
    rows = [
        several("a", ("Good one.", 9), ("Fair.", 5), ("Poor", 1)),
        several("again", ("Poor", 2), ("Good one.", 9), ("Fair.", 4)),
        several("other", ("Good one.", 9), ("Poor.", 2), ("Fair.", 4)),
        several("spaces", ("Best.", 9), ("so  So", 4), ("So so", 3), prompt="r"),
        several("even", ("x", 3), ("y", 3), prompt="s"),
        {**GOOD, "id": "against", "prompt": "r", "video": "v.mp4", "chosen": "z", "rejected": "Best."},
    ]
    report = check_manifest(manifest(tmp_path, *rows))
    assert found(report) == {
        "pairs given more than once": ["a, again"],
        "texts both chosen and rejected, for one video and prompt": ["spaces chooses what against rejects"],
        "responses of a row differ only in case and spaces": ["spaces"],
        "all responses of a row have the same score": ["even"],
        "one chosen text against several rejected ones": ["a, again, other"],
    }
    assert (report.num_pairs, report.num_with_responses, report.num_responses) == (6, 5, 14)
    assert report.score_gaps == [8, 7, 7, 6, 0] and report.words["responses"]["max"] == 2
    assert "  5 rows with several responses, 14 responses in all\n" in report_text(report)


def test_import_keeps_a_row_whole_if_its_best_and_worst_differ_enough(tmp_path, inside):
    path, out = (
        manifest(tmp_path, several("a", ("x", 9), ("y", 8), ("z", 5)), several("b", ("x", 9), ("y", 6))),
        tmp_path / "o.jsonl",
    )
    run = inside("import", "--format", "manifest", path, out, "--min_score_gap", 4)
    assert run.returncode == 0 and "dropped 1 pair with a score gap below 4" in run.stdout
    assert json.loads(out.read_text()) == several("a", ("x", 9.0), ("y", 8.0), ("z", 5.0))


def test_import_keeps_wide_score_gaps(tmp_path, inside):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    scores = [{"score_chosen": 9, "score_rejected": 5}, {"score_chosen": 8, "score_rejected": 5}, {}]
    rows.write_text("\n".join(json.dumps({**row, **some}) for some in scores))
    run = inside("import", "--format", "trl", rows, out, "--min_score_gap", 4)
    assert run.returncode == 0 and len(out.read_text().splitlines()) == 1
    assert "dropped 1 pair with a score gap below 4" in run.stdout and "dropped 1 pair without scores" in run.stdout
    run = inside("import", "--format", "trl", rows, out, "--force", "--min_score_gap", 40)
    assert run.returncode == 1 and "no pairs are left" in run.stdout and len(out.read_text().splitlines()) == 1


def test_the_docs_name_every_option_and_no_other(inside):
    docs = Path(__file__).resolve().parents[2] / "docs" / "manifest.md"
    named = set(re.findall(r"--[a-z_]+", docs.read_text(encoding="utf-8")))
    helps = [inside(name, "--help").stdout for name in ("import", "check")]
    assert named == set(re.findall(r"--[a-z_]+", " ".join(helps))) - {"--help"}


def test_rows_of_one_labelled_response(tmp_path):
    question = {"prompt": "What moves in it?"}
    good, bad = (
        {**question, "completion": text, "label": label} for text, label in (("A ball.", True), ("A dog.", False))
    )
    rows = [
        good,
        bad,
        {**bad, "label": True},
        {**GOOD, "rejected": "A ball."},
        {**good, "label": "yes"},
        {**good, "chosen": "x"},
    ]
    report = check_manifest(manifest(tmp_path, *rows))
    assert (report.num_pairs, report.num_desirable, report.num_undesirable, report.num_sft) == (4, 2, 1, 0)
    assert "2 desirable responses, 1 undesirable response\n" in report_text(report)
    assert {name: words["median"] for name, words in report.words.items()} == {"prompt": 4, "chosen": 2, "rejected": 2}
    problems = found(report)
    assert problems["texts both chosen and rejected, for one video and prompt"] == [
        "pairs-3 chooses what pairs-2 rejects",
        "pairs-1 chooses what pairs-4 rejects",
    ]
    assert [line.split(": ", 1)[1] for line in problems["bad rows"]] == [
        "label must be true for a desirable completion or false, got 'yes'",
        "a row with completion and label has no chosen: leave out one of the two",
    ]
    of_kto = "rows of one video and prompt alone: loss_type=kto needs several of them"
    assert set(problems) == {"texts both chosen and rejected, for one video and prompt", "bad rows", of_kto}
