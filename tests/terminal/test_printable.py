"""Text of other people cannot steer the terminal it is printed on."""

import json
import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpo_fast.cli import main
from synpo_fast.terminal.printable import PrintableFormatter, counted, printable, printable_line
from synpo_fast.terminal.progress import Progress

EVIL = "a\x1b[2Jb\rc\u202ed\x9b31me"
SPELT = r"a\x1b[2Jb\rc\u202ed\x9b31me"


@pytest.mark.parametrize(
    ("number", "words", "told"),
    [
        (1, ("round",), "1 round"),
        (0, ("round",), "0 rounds"),
        (2, ("evaluation",), "2 evaluations"),
        (1, ("batch", "batches"), "1 batch"),
        (3, ("batch", "batches"), "3 batches"),
    ],
)
def test_a_number_is_told_with_its_noun(number, words, told):
    assert counted(number, *words) == told


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (EVIL, SPELT),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("half \ud83d", r"half \ud83d"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("ünï 日本 עברית 👩\u200d👧 ไทย\u0e49", "ünï 日本 עברית 👩\u200d👧 ไทย\u0e49"),  # letters, joiners, marks
    ],
)
def test_control_characters_are_spelt_out(text, shown):
    assert printable(text) == shown
    assert printable_line(text) == shown.replace("\n", r"\n").replace("\t", r"\t")


@given(st.text())
def test_nothing_that_steers_is_left(text):
    shown = printable(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t"]
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not [c for c in shown if unicodedata.bidirectional(c) in bidi]
    assert printable(shown) == shown and len(printable_line(text).splitlines()) <= 1


def test_captions_ids_and_messages_of_a_run(capsys):
    progress = Progress(shows=True, bar=False, first_step=0, num_steps=1, every=1)
    progress.note({"eval_loss": 1.0, "eval_captions": [{"id": f"i{EVIL}", "caption": f"{EVIL}\nnext"}]})
    progress.say(f"report: {EVIL}")
    assert capsys.readouterr().err.splitlines() == [
        "evaluation: eval_loss 1", f"  i{SPELT}: {SPELT}\\nnext", f"report: {SPELT}"
    ]  # fmt: skip


def test_log_lines():
    record = logging.LogRecord("synpo_fast", logging.WARNING, "", 0, "skipped %s", (EVIL,), None)
    assert PrintableFormatter("%(levelname)s %(message)s").format(record) == f"WARNING skipped {SPELT}"


def test_training_and_pairs_commands(tmp_path, capsys):
    name = f"no{EVIL}.jsonl"
    values = {"model_name_or_path": "tiny:text", "train_file": str(tmp_path / name), "output_dir": str(tmp_path / "o")}
    words = [word for key, value in values.items() for word in (f"--{key}", value)]
    assert main(["train", *words, "--use_cpu", "true"]) == 2
    row = {"id": f"i{EVIL}", "prompt": "q", "chosen": "A", "rejected": "a"}
    (tmp_path / name).write_text(json.dumps(row) + "\n" + json.dumps({**row, EVIL: 1}))
    assert main(["pairs", "check", str(tmp_path / name)]) == 1
    assert main(["pairs", "import", "--format", "manifest", str(tmp_path / name), str(tmp_path / "out.jsonl")]) == 1
    assert main(["pairs", "check", str(tmp_path / f"{EVIL}.jsonl")]) == 2
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert "\x1b" not in text and "\u202e" not in text and "\r" not in text and "\x9b" not in text
    assert f"i{SPELT}" in text and text.count(SPELT) >= 4
