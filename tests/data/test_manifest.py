"""Manifests, from files as people write them; what was written is read back the same."""

import json
import logging
from dataclasses import fields

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from synpo_fast.data import Clip, ManifestError, Pair, Response, read_manifest, read_manifest_rows, write_manifest
from synpo_fast.data.comparisons import filter_by_score_gap

GOOD = {"prompt": "What moves?", "chosen": "A ball.", "rejected": "A dog."}


def lines(tmp_path, *rows, name="pairs.jsonl"):
    path = tmp_path / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def as_dict(pair):
    return {field.name: getattr(pair, field.name) for field in fields(Pair)}


def test_every_key_arrives(tmp_path):
    row = {**GOOD, "id": "a", "chosen_score": 12.1, "rejected_score": 6, "ground_truth": "Ball.", "loss": "preference"}
    clips = [{"path": "v/1.mp4", "start": 1, "end": 9.5}, {"path": "w"}, {"path": "v/1.mp4", "start": None}]
    path = lines(tmp_path, {**row, "video": "v/1.mp4", "meta": {"any": 1}}, {**GOOD, "clips": clips, "audio": False})
    first, second = read_manifest(path)
    assert as_dict(first) == as_dict(Pair(**{**row, "video": "v/1.mp4"}))
    assert second.clips == (Clip("v/1.mp4", 1.0, 9.5), Clip("w"), Clip("v/1.mp4"))
    assert second.id == "pairs-2" and second.video is None


def test_sft_rows_need_no_rejected_and_null_is_absent(tmp_path):
    (pair,) = read_manifest(
        lines(tmp_path, {"prompt": "q", "chosen": "a", "rejected": None, "video": None, "loss": "sft"})
    )
    assert (pair.loss, pair.rejected, pair.video) == ("sft", "", None)


def test_byte_order_mark_blank_lines_and_crlf(tmp_path):
    path = tmp_path / "w.jsonl"
    text = json.dumps({**GOOD, "prompt": "a\u2028b\x85c"}, ensure_ascii=False)  # no ends of lines, whatever str thinks
    path.write_bytes(b"\xef\xbb\xbf\r\n" + text.encode() + b"\r\n\r\n  \r\n" + text.encode())  # no newline at the end
    pairs = read_manifest(path)
    assert [pair.id for pair in pairs] == ["w-2", "w-5"] and pairs[0].prompt == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "choosen": "x"}, "unknown key 'choosen'; did you mean 'chosen'"),
        ({**GOOD, "qqq": 1}, "unknown key 'qqq'; known keys are id"),
        ({"prompt": "q", "chosen": "a"}, "'rejected' missing"),
        ({"rejected": "a"}, "'prompt' and 'chosen' missing"),
        ({**GOOD, "prompt": 3}, "prompt must be text, got 3"),
        ({**GOOD, "prompt": " \n"}, "prompt is empty"),
        ({**GOOD, "rejected": "A ball."}, "same text"),
        ({**GOOD, "chosen_score": True}, "chosen_score must be a number, got True"),
        ({**GOOD, "chosen_score": "4"}, "chosen_score must be a number, got '4'"),
        ('{"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": NaN}', "chosen_score must be finite, got nan"),
        ('{"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 1e999}', "chosen_score must be finite"),
        ({**GOOD, "rejected_score": 10**400}, "rejected_score is too large"),
        ({**GOOD, "id": 7}, "id must be text, got 7"),
        ({**GOOD, "id": ""}, "id is empty"),
        ({**GOOD, "loss": "dpo"}, "loss must be"),
        ({**GOOD, "meta": "x"}, "meta must be an object"),
        ({**GOOD, "prompt": "half \ud83d"}, "prompt has half a surrogate pair at character 6"),
        ({**GOOD, "video": ""}, "video must be a path"),
        ({**GOOD, "video": "/data/v.mp4"}, "relative to the video root"),
        ({**GOOD, "video": "C:\\v.mp4"}, "relative to the video root"),
        ({**GOOD, "video": "a/../../v.mp4"}, "may not leave the video root"),
        ({**GOOD, "video": "a\\..\\..\\v.mp4"}, "may not leave the video root"),
        ({**GOOD, "video": "v\0.mp4"}, "must be a path"),
        ({**GOOD, "video": "http://host/v.mp4"}, "got the address"),
        ({**GOOD, "clips": []}, "list of at least one clip"),
        ({**GOOD, "clips": [{"start": 0}]}, r"clips\[0\] must be an object with path"),
        ({**GOOD, "clips": [{"path": "v", "stop": 1}]}, r"clips\[0\] must be an object with path"),
        ({**GOOD, "clips": [{"path": "v"}, {"path": "../v"}]}, r"clips\[1\].path may not leave"),
        ({**GOOD, "clips": [{"path": "v", "start": 5, "end": 5}]}, "need 0 <= start < end"),
        ({**GOOD, "clips": [{"path": "v", "end": "9"}]}, r"clips\[0\].end must be a number"),
        ({**GOOD, "clips": [{"path": "v"}], "video": "w"}, "video or clips, not both"),
        ({**GOOD, "clips": [{"path": "v"}], "reference_clips": [0]}, "reference_clips is not read yet: a reference model would"),
        ({**GOOD, "video": "v.mp4", "audio": True}, "audio must be false: sound is not read yet, .*silent, got True"),
        ({**GOOD, "video": "v.mp4", "audio": "v.wav"}, "audio must be false: sound is not read yet"),
        ("{", "not JSON: "),
        ("[1]", "a row must be a JSON object"),
        ('{"prompt": "q", "prompt": "r"}', "key 'prompt' is given twice"),
        ("[" * 100_000, "nesting|recursion|not JSON"),
        ("1" * 5000, "not usable JSON"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, row, reason):
    path = lines(tmp_path, GOOD, "", row, GOOD)
    pairs, bad_rows = read_manifest_rows(path)
    assert [pair.id for pair in pairs] == ["pairs-1", "pairs-4"]
    (bad,) = bad_rows
    assert (bad.file, bad.line) == (str(path), 3)
    with pytest.raises(ManifestError, match=reason) as raised:
        read_manifest(path)
    assert f"{path}:3: " in str(raised.value) and "1 of 3 rows are bad" in str(raised.value)


def test_bad_utf8_is_one_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n' + json.dumps(GOOD).encode())
    pairs, bad_rows = read_manifest_rows(path)
    assert len(pairs) == 2 and [str(row) for row in bad_rows] == [f"{path}:2: not UTF-8: byte 13 is 0xff"]


def test_ids_are_used_once_made_or_given(tmp_path):
    path = lines(tmp_path, {**GOOD, "id": "a"}, {**GOOD, "id": "a"}, {**GOOD, "id": "pairs-4"}, GOOD)
    pairs, bad_rows = read_manifest_rows(path)
    assert [pair.id for pair in pairs] == ["a", "pairs-4"]
    assert [row.reason for row in bad_rows] == [
        "id 'a' is already used in line 1",
        "id 'pairs-4' is already used in line 3",
    ]


def test_the_error_shows_twenty_rows_and_skipping_logs_all(tmp_path, caplog):
    path = lines(tmp_path, GOOD, *[{"prompt": "q"}] * 23)
    with pytest.raises(ManifestError) as raised:
        read_manifest(path)
    assert len(str(raised.value).splitlines()) == 22 and "... and 3 more" in str(raised.value)
    assert len(raised.value.bad_rows) == 23
    with caplog.at_level(logging.WARNING):
        assert len(read_manifest(path, on_bad="skip")) == 1
    assert len(caplog.records) == 23 and f"{path}:24: " in caplog.text
    with pytest.raises(ManifestError, match="1 of 1 rows are bad"):
        read_manifest(lines(tmp_path, {"prompt": "q"}), on_bad="skip")
    with pytest.raises(ValueError, match="on_bad must be 'raise' or 'skip', got 'drop'"):
        read_manifest(path, on_bad="drop")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf", b"[]"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "e.jsonl").write_bytes(content)
    with pytest.raises(ManifestError, match="has no rows"):
        read_manifest(tmp_path / "e.jsonl")


def test_files_that_are_no_manifest(tmp_path):
    for name in ("a.parquet", "a.txt", "a.csv", "a.json"):
        (tmp_path / name).write_bytes(b"[{]")
    with pytest.raises(ManifestError, match="not readable as Parquet"):
        read_manifest(tmp_path / "a.parquet")
    with pytest.raises(ManifestError, match="cannot tell its format"):
        read_manifest(tmp_path / "a.txt")
    with pytest.raises(ManifestError, match="pairs import"):
        read_manifest(tmp_path / "a.csv")
    with pytest.raises(ManifestError, match=r"not a JSON list: .* in line 1, column 3"):
        read_manifest(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / "none.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ManifestError, match="no data-"):
        read_manifest(tmp_path / "folder")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_utf_16_is_said_once(tmp_path, encoding, name):
    (tmp_path / name).write_text("\n".join([json.dumps(GOOD)] * 3), encoding=encoding)
    with pytest.raises(ManifestError, match=f"^{tmp_path}/{name} is UTF-16 text: save it as UTF-8") as raised:
        read_manifest(tmp_path / name)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_a_key_are_said_once(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [GOOD, GOOD]}, indent=indent))
    (bad,) = read_manifest_rows(path)[1]
    assert bad.line == 1 and bad.reason.endswith(
        "; the rows are a list under 'data': write that list alone into the file"
    )
    path.write_text(json.dumps(GOOD, indent=indent))
    assert len(read_manifest(path)) == 1


TABLE = [
    {**GOOD, "id": "a", "video": "v.mp4", "chosen_score": 2.5},
    {**GOOD, "prompt": "Why?", "clips": [{"path": "w.mp4", "end": 3.0}, {"path": "x", "start": 1.0}], "reference_clips": []},
    {**GOOD, "prompt": "So?", "audio": False},
    {"prompt": "Which?", "responses": [{"text": "a", "score": 2.5}, {"text": "b", "score": 1.0}, {"text": "c", "score": 0.0}]},
]  # fmt: skip


def test_columns_hold_the_same_as_lines(tmp_path):
    """Null in a column is a key left out, in structs too; rows are counted where there are no lines."""
    datasets = pytest.importorskip("datasets", reason="writes the folders that are read here")
    keys = {key for row in TABLE for key in row}
    expected = [as_dict(pair) | {"id": ""} for pair in read_manifest(lines(tmp_path, *TABLE))]
    (tmp_path / "list.json").write_text(json.dumps(TABLE))
    parquet.write_table(pa.Table.from_struct_array(pa.array(TABLE)), tmp_path / "t.parquet")
    (tmp_path / "parts").mkdir()
    parquet.write_table(pa.Table.from_struct_array(pa.array(TABLE[:1])), tmp_path / "parts" / "train-00000.parquet")
    parquet.write_table(pa.Table.from_struct_array(pa.array(TABLE[1:])), tmp_path / "parts" / "train-00001.parquet")
    datasets.Dataset.from_list([{key: row.get(key) for key in keys} for row in TABLE]).save_to_disk(
        tmp_path / "hf", num_shards=2
    )
    table = pa.Table.from_struct_array(pa.array(TABLE))
    with pa.ipc.new_file(str(tmp_path / "indexed.arrow"), table.schema) as file:
        file.write_table(table)
    ids = {
        "list.json": ["a", "list-2", "list-3", "list-4"],
        "t.parquet": ["a", "t-2", "t-3", "t-4"],
        "parts": ["a", "train-00001-1", "train-00001-2", "train-00001-3"],
        "hf": ["a", "data-00000-of-00002-2", "data-00001-of-00002-1", "data-00001-of-00002-2"],
        "indexed.arrow": ["a", "indexed-2", "indexed-3", "indexed-4"],
    }
    for name, wanted in ids.items():
        pairs = read_manifest(tmp_path / name)
        assert [pair.id for pair in pairs] == wanted
        assert [as_dict(pair) | {"id": ""} for pair in pairs] == expected, name


def test_hugging_face_folders(tmp_path):
    """Rows in the order of the data set, not of file names or of a cache beside them; splits must be named."""
    datasets = pytest.importorskip("datasets", reason="writes the folders that are read here")
    rows = [{**GOOD, "prompt": f"q{i}"} for i in range(7)]
    datasets.Dataset.from_list(rows).select([4, 2, 6]).save_to_disk(tmp_path / "selected")
    (tmp_path / "selected" / "cache-1234.arrow").write_bytes(b"not for us")
    assert [pair.prompt for pair in read_manifest(tmp_path / "selected")] == ["q4", "q2", "q6"]
    (tmp_path / "selected" / "data-00000-of-00001.arrow").rename(
        tmp_path / "selected" / "dataset.arrow"
    )  # as it once was
    state = json.loads((tmp_path / "selected" / "state.json").read_text())
    state["_data_files"] = [{"filename": "dataset.arrow"}]
    (tmp_path / "selected" / "state.json").write_text(json.dumps(state))
    assert [pair.prompt for pair in read_manifest(tmp_path / "selected")] == ["q4", "q2", "q6"]
    (tmp_path / "selected" / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "i"}]}))
    with pytest.raises(ManifestError, match="holds a selection of rows"):
        read_manifest(tmp_path / "selected")
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    with pytest.raises(ManifestError, match=r"several splits: test \(1 file\), train \(1 file\)"):
        read_manifest(tmp_path / "splits")
    assert len(read_manifest(tmp_path / "splits" / "test")) == 2


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
words = text.filter(str.strip)
part = st.text("abc.\u00e9 -_", min_size=1, max_size=6).filter(lambda name: name.strip() and name not in (".", ".."))
paths = st.lists(part, min_size=1, max_size=3).map("/".join)
clips = st.builds(Clip, paths, st.none() | st.floats(0, 50), st.none() | st.floats(51, 1e6))
finite = st.floats(allow_nan=False, allow_infinity=False)
scores = st.none() | finite
several = st.lists(st.builds(Response, words, finite), min_size=2, max_size=5, unique_by=lambda each: each.text)


@st.composite
def some_pairs(draw):
    pairs = []
    for index in range(draw(st.integers(1, 4))):
        shown = draw(st.sampled_from(["video", "clips", "text"]))
        chosen, rejected = draw(st.tuples(words, words).filter(lambda both: both[0] != both[1]))
        answers = {
            "chosen": chosen, "rejected": rejected, "chosen_score": draw(scores), "rejected_score": draw(scores),
            "loss": draw(st.sampled_from(["preference", "sft"])),
        }  # fmt: skip
        if draw(st.booleans()):
            answers = {"responses": tuple(draw(several))}
        some_clips = tuple(draw(st.lists(clips, min_size=1, max_size=3))) if shown == "clips" else ()
        pairs.append(
            Pair(
                prompt=draw(words), id=f"{draw(text)}-{index}", **answers,
                video=draw(paths) if shown == "video" else None, clips=some_clips,
                ground_truth=draw(st.none() | text),
            )
        )  # fmt: skip
    return pairs


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_pairs())
def test_what_is_written_is_read_back(tmp_path, pairs):
    write_manifest(tmp_path / "w.jsonl", pairs)
    assert [as_dict(pair) for pair in read_manifest(tmp_path / "w.jsonl")] == [as_dict(pair) for pair in pairs]


@pytest.mark.parametrize("label", [True, False])
def test_a_labelled_response_is_written_as_completion_and_label(tmp_path, label):
    texts = {"chosen": "A ball.", "rejected": ""} if label else {"chosen": "", "rejected": "A ball."}
    loss = "desirable" if label else "undesirable"
    pair = Pair(prompt="What?", video="a.mp4", id="x", ground_truth="T.", loss=loss, mismatched="Not written.", **texts)
    write_manifest(tmp_path / "w.jsonl", [pair])
    assert json.loads((tmp_path / "w.jsonl").read_text()) == {
        "id": "x", "video": "a.mp4", "prompt": "What?", "completion": "A ball.", "label": label, "ground_truth": "T."
    }  # fmt: skip
    (back,) = read_manifest(tmp_path / "w.jsonl")
    assert as_dict(back) == {**as_dict(pair), "mismatched": None}
    assert pair.has_label and not Pair(**GOOD).has_label


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "completion": "A"}, "'label' missing"),
        ({"completion": "A", "label": False}, "'prompt' missing"),
        ({"prompt": "Q", "label": True}, "'completion' missing"),
        ({"prompt": "Q", "completion": " ", "label": True}, "chosen is empty"),
        (
            {"prompt": "Q", "completion": "A", "label": 1},
            "label must be true for a desirable completion or false, got 1",
        ),
        ({"prompt": "Q", "completion": "A", "label": True, "loss": "sft"}, "has no loss: leave out one of the two"),
        ({"prompt": "Q", "chosen": "A", "loss": "desirable"}, "'desirable' is written with completion and label"),
    ],
)
def test_bad_rows_of_a_labelled_response(tmp_path, row, reason):
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    _, (bad,) = read_manifest_rows(tmp_path / "m.jsonl")
    assert reason in bad.reason


def test_a_check_of_the_caller_makes_bad_rows(tmp_path):
    write_manifest(tmp_path / "w.jsonl", [Pair(**GOOD, id="a"), Pair(**GOOD, id="b")])

    def check(pair):
        if pair.id == "b":
            raise ValueError("not this one")

    with pytest.raises(ManifestError, match=r"w\.jsonl:2: not this one"):
        read_manifest(tmp_path / "w.jsonl", check=check)
    assert [pair.id for pair in read_manifest(tmp_path / "w.jsonl", on_bad="skip", check=check)] == ["a"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.jsonl"
    write_manifest(path, [Pair(**GOOD, id="old")])
    before = path.read_bytes()
    good = Pair(**GOOD, id="new")
    for bad, message in [
        ([good, Pair(**GOOD, video="/abs.mp4")], "relative to the video root"),
        ([good, Pair(**GOOD, video=torch.zeros(1, 2, 2, 3, dtype=torch.uint8))], "names video files"),
        ([good, good], "'new' is used twice"),
        ([], "no pairs"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_manifest(path, bad)
    with pytest.raises(ValueError, match=r"written as \.jsonl"):
        write_manifest(tmp_path / "w.parquet", [good])
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["w.jsonl"]


def test_filter_by_score_gap():
    def pair(name, chosen, rejected, **more):
        return Pair(**GOOD, id=name, chosen_score=chosen, rejected_score=rejected, **more)

    pairs = [
        pair("wide", 12.1, 6.4), pair("exact", 10.0, 6.0), pair("rounded", 1.1 + 1 + 3, 1.1), pair("narrow", 9.9, 6.0),
        pair("none", None, 3.0), pair("sft", None, None, loss="sft"), pair("reversed", 2.0, 9.0),
    ]  # fmt: skip
    result = filter_by_score_gap(pairs, 4)
    assert [kept.id for kept in result.kept] == ["wide", "exact", "rounded", "sft"]
    assert (result.below, result.without_scores) == (2, 1)
    with pytest.raises(ValueError, match="must be finite, got nan"):
        filter_by_score_gap(pairs, float("nan"))
