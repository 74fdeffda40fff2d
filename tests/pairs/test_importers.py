"""Every format's rows, the usual and the odd ones, become the pairs that their authors mean, or are refused with a reason."""

import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from synpo_fast.data.manifest import ManifestError, read_manifest, row_from_pair
from synpo_fast.pairs.importers import IMPORTERS, ImportOptions, Refused, detect_format, import_pairs
from synpo_fast.pairs.importers.source_row import SourceRow

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "manifest.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^### (\S+)\n(.*?)(?=^### |\Z)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```json\n(.*?)^```", re.DOTALL | re.MULTILINE)
SAMPLES = {name: [json.loads(block) for block in BLOCK.findall(body)] for name, body in SECTION.findall(DOCS)}
V1, PLUS = "video-salmonn2-v1", "video-salmonn2-plus"


def run(name, row, **options):
    return IMPORTERS[name](SourceRow(row), ImportOptions(**options))


def refusal(name, row, **options):
    with pytest.raises(Refused) as raised:
        run(name, row, **options)
    return str(raised.value)


def sample(name, **changes):
    """The row in the docs, with changes; None takes a key out."""
    return {key: value for key, value in {**SAMPLES[name][0], **changes}.items() if value is not None}


def turns(**texts):
    return [{"from": role, "value": text} for role, text in texts.items()]


def part(**more):
    """One user turn with a video part, as Qwen's tools write it."""
    content = [{"type": "video", "video": "a.webm", **more}, {"type": "text", "text": "What happens?"}]
    return [{"role": "user", "content": content}]


@pytest.fixture
def videos(tmp_path):
    """A root with the file that the sample of synpo names without its suffix."""
    root = tmp_path / "videos"
    root.mkdir()
    (root / "v_cooking.mp4").write_bytes(b"video")
    return root


def test_docs_show_every_format():
    assert SAMPLES.keys() == IMPORTERS.keys()
    assert all(len(blocks) == 2 for blocks in SAMPLES.values())


@pytest.mark.parametrize("name", IMPORTERS)
@pytest.mark.parametrize("form", [".jsonl", ".json", "folder of Parquet"])
def test_the_sample_in_the_docs_becomes_the_pair_in_the_docs(tmp_path, videos, name, form):
    row, expected = SAMPLES[name]
    path = tmp_path / f"rows{form if form.startswith('.') else ''}"
    if form == ".json":
        path.write_text(json.dumps([row, row], indent=1))
    elif form == ".jsonl":
        path.write_text(f"{json.dumps(row)}\n{json.dumps(row)}")
    else:
        path.mkdir()
        parquet.write_table(pa.Table.from_struct_array(pa.array([row, row])), path / "rows.parquet")
    result = import_pairs(path, name, ImportOptions(videos if name == "synpo" else None))
    assert not result.refused and result.num_rows == 2
    ids = [expected["id"], f"{expected['id']}#2"] if "id" in expected else ["rows-1", "rows-2"]
    assert [pair.id for pair in result.pairs] == ids
    for pair in result.pairs:
        assert {**row_from_pair(pair), "id": None} == {**expected, "id": None}


SCORED = {
    "long_answers": ["Two eggs.", "Bread.", "Lost.", "Bread.", " ", "Cut."],
    "hallu_scores": [5.0, 1.0, 0.0, 2.0, 5.0, 4],
    "harmo_scores": [5.0, 4.0, 5.0, 4.0, 5.0, 2.5],
    "consi_scores": [3.0, 1.0, 3.0, 1.0, 3.0, None],
    "pos_pre": "Two eggs.",
    "neg_pre": "Lost.",
    "neg_score": 0,
}


@pytest.mark.parametrize("form", [".jsonl", ".parquet"])
def test_every_scored_caption_of_synpo_is_kept(tmp_path, videos, form):
    """By the published formula: 1.1 * factuality + fluency + consistency. 0 and null: the judge's reply was not read."""
    path = tmp_path / f"rows{form}"
    if form == ".jsonl":
        path.write_text(json.dumps(sample("synpo", **SCORED)))
    else:
        parquet.write_table(pa.Table.from_struct_array(pa.array([sample("synpo", **SCORED)])), path)
    result = import_pairs(path, "synpo", ImportOptions(videos, responses="all"))
    ((pair,), kept) = result.pairs, {"Two eggs.": 13.5, "Bread.": (6.1 + 7.2) / 2}
    assert {each.text: each.score for each in pair.responses} == pytest.approx(kept)
    assert result.unused_keys["long_answers without a score"] == 1
    assert row_from_pair(pair).keys() == {"id", "video", "prompt", "responses"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"long_answers": None}, "long_answers is not a list of texts: None"),
        ({"long_answers": "Two eggs."}, "long_answers is not a list of texts"),
        ({"hallu_scores": [5.0]}, "hallu_scores is not a list of 6 numbers"),
        ({"consi_scores": None}, "consi_scores is not a list of 6 numbers"),
        ({"consi_scores": [3.0, 0, 0, 0, 0, 0]}, "fewer than two of long_answers were scored: 1 of 6"),
        ({"consi_scores": [3.0, "1", 0, True, 0, float("nan")]}, "fewer than two of long_answers were scored: 1 of 6"),
        ({"pos_score": 14.0}, "pos_score is not the score of pos_pre in long_answers: 14"),
        ({"pos_pre": "Other."}, "pos_score is not the score of pos_pre in long_answers"),
        ({"pos_score": 0}, "pos_score means that the caption was not scored"),
    ],
)
def test_rows_of_synpo_whose_scores_cannot_be_read_are_refused(videos, changes, reason):
    said = refusal("synpo", sample("synpo", **{**SCORED, **changes}), video_root=videos, responses="all")
    assert said.startswith(reason)


def test_columns_of_turns_in_both_notations(tmp_path):
    """In a column every turn has the keys of all turns, null where it had none."""
    rows = [sample("llama-factory"), sample("ms-swift", conversations=None)]
    rows[1] |= {
        "conversations": [{"role": "user", "content": "Why?"}],
        "chosen": {"role": "assistant", "content": "So."},
    }
    rows[1] |= {"rejected": {"role": "assistant", "content": "No."}, "videos": None}
    parquet.write_table(pa.Table.from_struct_array(pa.array(rows)), tmp_path / "rows.parquet")
    first, second = import_pairs(tmp_path / "rows.parquet", "llama-factory").pairs
    assert (first.chosen, second.prompt, second.chosen, second.video) == ("A red cup.", "Why?", "So.", None)


def test_csv(tmp_path):
    """A CSV as TPO is published: cells are text, and an empty cell is a missing key."""
    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["video", "prompt", "answer", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows([sample("tpo", prompt='Who says "yes",\nand when?'), sample("tpo", rejected="")])
    result = import_pairs(path, "tpo")
    assert [pair.prompt for pair in result.pairs] == ['Who says "yes",\nand when?']
    assert result.reasons == {"no rejected": 1}


def test_the_same_role_has_two_meanings_in_the_salmonn_formats():
    v1 = {"video": "v.mp4", "conversations": turns(human="<image>\nQ", gpt="G", reject_gpt="R", gt="T")}
    plus = {"video": "v.mp4", "conversations": turns(human="<video>\nQ", gpt="G", chosen="C", reject="R")}
    (from_v1,), (from_plus,) = run(V1, v1), run(PLUS, plus)
    assert (from_v1.chosen, from_v1.rejected, from_v1.ground_truth) == ("G", "R", "T")
    assert (from_plus.chosen, from_plus.rejected, from_plus.ground_truth) == ("C", "R", "G")
    assert "roles of video-salmonn2-plus in a v1 row: chosen, reject" in refusal(V1, plus)
    assert "marks of video-salmonn2-v1 in a plus row: gt, reject_gpt" in refusal(PLUS, v1)
    both = {"video": "v.mp4", "conversations": turns(human="Q", gpt="G")}
    assert "fits both formats" in refusal(V1, both) and "fits both formats" in refusal(PLUS, both)
    mixed = {"video": "v.mp4", "conversations": turns(human="Q", gpt="G", reject_gpt="R", chosen="C", reject="S")}
    assert "roles of" in refusal(V1, mixed) and "marks of" in refusal(PLUS, mixed)


def test_salmonn_v1_rows_of_cross_entropy_alone():
    row = {"video": "v.mp4", "ce_only": True}
    with_truth = {**row, "conversations": turns(human="Q", gpt="G", reject_gpt="R", gt="T")}
    without = {**row, "conversations": turns(human="Q", gpt="G")}
    for content, target in [(with_truth, "T"), (without, "G")]:
        (pair,) = run(V1, content)
        assert (pair.loss, pair.chosen, pair.rejected) == ("sft", target, "")
    assert "ce_only" in refusal(PLUS, {**row, "conversations": turns(human="Q", gpt="G", chosen="C", reject="R")})
    assert "ce_only is neither" in refusal(V1, {**with_truth, "ce_only": "yes"})
    (pair,) = run(V1, {**with_truth, "ce_only": False})
    assert pair.loss == "preference"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (V1, {"conversations": turns(human="Q", gpt="G", gt="T")}, "no reject_gpt"),
        (V1, {"conversations": turns(human="Q", reject_gpt="R", gt="T")}, "no gpt"),
        (V1, {"conversations": turns(human="Q", history_gpt="H", gpt="G", reject_gpt="R")}, "not one user turn"),
        (V1, {"conversations": turns(gpt="G", human="Q", reject_gpt="R")}, "not one user turn: gpt, human"),
        (V1, {"conversations": turns(human="Q", gpt="G", reject_gpt="R") * 2}, "not one user turn"),
        (V1, {"conversations": turns(human="Q", gpt="G", reject_gpt="R", judge="J")}, "unknown role .*: judge"),
        (V1, {"conversations": [*turns(human="Q", gpt="G", reject_gpt="R"), *turns(gpt="H")]}, "role is given twice"),
        (V1, {"conversations": turns(human="Q", gpt="G", reject_gpt="G")}, "same text"),
        (V1, {"conversations": None}, "conversations is not a list"),
        (V1, {"video": None}, "no video"),
        (V1, {"image": "a.jpg"}, "images are not supported"),
        (V1, {"timestamps": [3, 3]}, "timestamps are not"),
        (V1, {"timestamps": [3, "9"]}, "timestamps are not"),
        (PLUS, {"timestamps": [2.0, 9.5]}, "has timestamps: they select a clip in v1"),
        (PLUS, {"conversations": turns(human="Q", gpt="G", chosen="C")}, "no reject"),
        (PLUS, {"conversations": turns(human="Q", gpt="G", reject="C")}, "no chosen"),
        (PLUS, {"conversations": turns(human="<video><video>Q", chosen="C", reject="R")}, "more tags than videos"),
        (PLUS, {"conversations": turns(human="<audio>Q", chosen="C", reject="R")}, "<audio> in the prompt"),
        (PLUS, {"video": ["a.mp4", "b.mp4"]}, "several videos"),
        ("llama-factory", {"images": ["a.jpg"]}, "only videos are supported"),
        ("llama-factory", {"videos": ["a.mp4", "b.mp4"]}, "several videos"),
        ("llama-factory", {"videos": [["f1.jpg", "f2.jpg"]]}, "several videos|not named by a path"),
        ("llama-factory", {"videos": None}, "more tags than videos in the prompt: 1 for 0"),
        ("llama-factory", {"rejected": None}, "no rejected"),
        ("llama-factory", {"chosen": "A red cup."}, "chosen is not a turn"),
        ("llama-factory", {"chosen": turns(human="A red cup.")}, "chosen is not one assistant turn: human"),
        ("llama-factory", {"conversations": turns(human="a", gpt="b") + turns(human="c")}, "not one user turn"),
        ("llama-factory", {"conversations": turns(observation="a")}, "unknown role"),
        ("llama-factory", {"system": "Be brief."}, "has a system message"),
        ("ms-swift", {"rejected_response": None}, "no rejected_response"),
        ("ms-swift", {"rejected_response": ["a", "b"]}, "rejected_response is not text"),
        ("ms-swift", {"rejected_messages": [{"role": "user", "content": "x"}]}, "both"),
        ("ms-swift", {"rejected_videos": ["x"]}, "may only be used with rejected_messages"),
        ("ms-swift", {"messages": [{"role": "assistant", "content": "x"}]}, "not one user turn: no turn"),
        ("ms-swift", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "images are not supported"),
        ("trl", {"images": ["a.jpg"]}, "images are not supported"),
        ("trl", {"chosen": None}, "no chosen"),
        ("trl", {"prompt": "Q", "chosen": "A", "rejected": "B", "video": "v.mp4"}, "use messages for a video"),
        ("trl", {"prompt": None}, "do not start with the same messages"),
        ("trl", {"video": "other.mp4"}, "different videos"),
        ("trl", {"prompt": part(path="b.webm")}, "names several videos"),
        ("trl", {"prompt": part(video_start=9, video_end=4)}, "not a valid part of a video: .*start=9.0 and end=4.0"),
        ("trl", {"prompt": part(video_start="9")}, "are not seconds"),
        ("trl", {"prompt": part(video_start=True)}, "are not seconds"),
        ("trl", {"prompt": part(start_time=9)}, "a video part is cut only by video_start and video_end, in seconds: start_time"),
        ("ms-swift", {"messages": part()}, "a video inside the turns"),
        ("llama-factory", {"conversations": part()}, "a video inside the turns"),
        ("llava-hound", {"conversations": part(), "prompt": None}, "a video inside the turns"),
        (V1, {"conversations": part()}, "a video inside the turns"),
        ("trl", {"tools": ["x"]}, "tools are not supported"),
        ("trl-unpaired", {"label": None}, "label is neither true nor false: None"),
        ("trl-unpaired", {"label": 1}, "label is neither true nor false: 1"),
        ("trl-unpaired", {"completion": None}, "no completion"),
        ("trl-unpaired", {"prompt": None}, "no prompt"),
        ("trl-unpaired", {"completion": "A."}, "prompt is not text"),
        ("trl-unpaired", {"chosen": "A."}, "has chosen: it belongs to pairs"),
        ("trl-unpaired", {"images": ["a.jpg"]}, "images are not supported"),
        ("longvpo", {"task_type": None}, "no task_type"),
        ("longvpo", {"question": 4}, "question is not text: 4"),
        ("longvpo", {"rejected": None}, "no rejected"),
        ("longvpo", {"rejected": ""}, "rejected is empty"),
        ("longvpo", {"question": "<video>\n"}, "prompt is empty"),
        ("longvpo", {"video": "../v.mp4"}, "may not leave the video root"),
        ("longvpo", {"video": "/data/v.mp4"}, "absolute: give the video root: /data/v.mp4"),
        ("longvpo", {"video": "https://host/v.mp4"}, "an address, not a file"),
        ("longvpo", {"video": 3}, "not named by a path: 3"),
        ("longvpo", {"video": {"bytes": b"...", "path": "v.mp4"}}, "stored inside the row"),
        ("llava-hound", {"rejected_2": "C"}, "has rejected_2"),
        ("llava-hound", {"conversations": turns(human="<video>\nOther?")}, "prompt and conversations differ"),
        ("llava-hound", {"chosen_score": "5"}, "chosen_score is not a number"),
        ("vistadpo", {"rejected_2": None}, "no rejected_2"),
        ("tpo", {"answer": None}, "no answer"),
        ("rrpo", {"pred": None}, "no pred"),
        ("rrpo", {"chosen": "C"}, "has chosen"),
        ("rrpo", {"answer": "It is <MASK> red </MASK>."}, "<MASK> tags"),
        ("rrpo", {"sample_id": 1.5}, "neither text nor a whole number"),
        ("synpo", {}, "no suffix: give the video root"),
        ("synpo", {"neg_pre": None}, "no neg_pre"),
        ("synpo", {"neg_score": None}, "no neg_score"),
        ("synpo", {"neg_score": 0.0}, "not scored: 0"),
        ("synpo", {"neg_score": 100}, "not scored: 100"),
        ("synpo", {"pos_score": 0}, "pos_score means that the caption was not scored"),
        ("manifest", {"choosen": "x"}, "did you mean 'chosen'"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(name, changes, reason):
    assert re.search(reason, refusal(name, sample(name, **changes)))


def test_trl_in_its_other_shapes():
    (pair,) = run(
        "trl", {"prompt": "Say hi.", "chosen": "Hi.", "rejected": "No.", "score_chosen": 4, "score_rejected": 1.5}
    )
    assert (pair.video, pair.prompt, pair.chosen_score, pair.rejected_score) == (None, "Say hi.", 4, 1.5)
    user = {
        "role": "user",
        "content": [{"type": "text", "text": "What "}, {"type": "video"}, {"type": "text", "text": "now?"}],
    }
    answers = [{"role": "assistant", "content": text} for text in ("A", "B")]
    for column in ({"video": "v.mp4"}, {"videos": ["v.mp4"]}):  # no prompt: what both share is the prompt
        (pair,) = run("trl", {"chosen": [user, answers[0]], "rejected": [user, answers[1]], **column})
        assert (pair.video, pair.prompt, pair.chosen, pair.rejected) == ("v.mp4", "What now?", "A", "B")
    assert "without a path" in refusal("trl", {"prompt": [user], "chosen": answers[:1], "rejected": answers[1:]})
    plain = {"role": "user", "content": "What now?"}
    row = {"prompt": [plain], "chosen": answers[:1], "rejected": answers[1:]}
    assert run("trl", row)[0].video is None
    assert "without a part" in refusal("trl", {**row, "video": "v.mp4"})
    assert "several videos" in refusal("trl", {**row, "prompt": [{"role": "user", "content": [{"type": "video"}] * 2}]})
    assert "not one user turn" in refusal("trl", {**row, "prompt": [plain, answers[0], plain]})


def test_trl_unpaired_in_its_other_shapes():
    for label, texts in ((True, ("Hi.", "")), (False, ("", "Hi."))):
        (pair,) = run("trl-unpaired", {"prompt": "Say hi.", "completion": "Hi.", "label": label, "id": 7})
        assert (pair.id, pair.video, pair.prompt, pair.loss) == (
            "7",
            None,
            "Say hi.",
            "desirable" if label else "undesirable",
        )
        assert (pair.chosen, pair.rejected) == texts
    (pair,) = run("trl-unpaired", sample("trl-unpaired", prompt=part(video_start=3)))
    assert row_from_pair(pair)["clips"] == [{"path": "a.webm", "start": 3.0}]


@pytest.mark.parametrize(
    ("times", "clip"),
    [
        ({"video_start": 3, "video_end": 9.5}, {"start": 3.0, "end": 9.5}),
        ({"video_end": 9.5}, {"end": 9.5}),
        ({"video_start": 3.0, "video_end": None}, {"start": 3.0}),
    ],
)
def test_a_span_in_a_video_part_becomes_a_clip_and_the_rest_is_listed(tmp_path, times, clip):
    """A caption of a clip must not become one of the whole video, and what is dropped must be said."""
    path = tmp_path / "rows.jsonl"
    prompt = part(fps=2.0, max_pixels=360 * 420, nframes=None, **times)
    prompt[0]["content"][1]["cache_control"] = "x"
    row = {"prompt": prompt, "chosen": [{"role": "assistant", "content": "A."}]}
    row["rejected"] = [{"role": "assistant", "content": "B.", "weight": 0.5}]
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": part(**times)}))
    result = import_pairs(path, "trl")
    assert not result.refused
    for pair in result.pairs:
        assert row_from_pair(pair)["clips"] == [{"path": "a.webm", **clip}] and pair.video is None
    assert result.unused_keys == {
        "prompt.content.fps": 1, "prompt.content.max_pixels": 1, "prompt.content.cache_control": 1, "rejected.weight": 2
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in IMPORTERS if name != "synpo"])
@pytest.mark.parametrize("sound", [{"use_audio": True}, {"audio": "a.wav"}, {"audio": True}, {"audios": ["a.wav"]}])
def test_rows_with_sound_are_refused_with_the_reason(tmp_path, name, sound):
    path = tmp_path / "rows.jsonl"
    silent = dict.fromkeys(sound, False)
    if name == "manifest" and "audio" not in sound:
        return  # keys that a manifest does not know are refused as such
    path.write_text("\n".join(map(json.dumps, [sample(name, id=None) | sound, sample(name, id=None) | silent])))
    result = import_pairs(path, name)
    assert [row.line for row in result.refused] == [1] and len(result.pairs) == 1
    assert "sound is not read yet" in str(result.refused[0])
    assert sum(result.reasons.values()) == 1 and not result.unused_keys.keys() & sound.keys()


def test_keys_of_turns_that_nothing_uses_are_listed(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = sample("ms-swift")
    first, last = row["messages"]
    row["messages"] = [first | {"loss": False}, last | {"name": ""}]  # an empty one says nothing
    path.write_text(json.dumps(row | {"objects": {"bbox": [1]}}))
    assert import_pairs(path, "ms-swift").unused_keys == {"messages.loss": 1, "objects": 1}
    path.write_text(json.dumps(sample("manifest")))
    assert import_pairs(path, "manifest").unused_keys == {"meta": 1}


def test_ms_swift_with_rejected_messages():
    row = sample("ms-swift", rejected_response=None)
    prompt, _ = row["messages"]
    row["rejected_messages"] = [prompt, {"role": "assistant", "content": "The fall."}]
    expected = SAMPLES["ms-swift"][1]
    for more in ({}, {"rejected_videos": ["t/3.mp4"]}):
        assert row_from_pair(run("ms-swift", {**row, **more})[0]) == expected
    assert "rejected_videos differ from videos" in refusal("ms-swift", {**row, "rejected_videos": ["other.mp4"]})
    other = [{"role": "user", "content": "<video>\nOther?"}, row["rejected_messages"][1]]
    assert "rejected_messages and messages have different prompts" in refusal(
        "ms-swift", {**row, "rejected_messages": other}
    )


def test_llava_hound_as_turns():
    row = sample("llava-hound", prompt=None, conversations=turns(human="<video>\nIs anyone swimming?"))
    row |= {"chosen": {"from": "gpt", "value": row["chosen"]}, "rejected": {"from": "gpt", "value": row["rejected"]}}
    assert row_from_pair(run("llava-hound", row)[0]) == SAMPLES["llava-hound"][1]


def test_several_rejected_texts(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text(json.dumps(sample("vistadpo", rejected_10="Ten.", rejected_3="Three.", rejected_note="no")))
    assert [pair.rejected for pair in import_pairs(path, "vistadpo").pairs] == ["A sandwich."]
    result = import_pairs(path, "vistadpo", ImportOptions(rejected="all"))
    assert [pair.rejected for pair in result.pairs] == ["A sandwich.", "A suitcase.", "Three.", "Ten."]
    assert [pair.id for pair in result.pairs] == ["star/A1", "star/A1#1", "star/A1#1.2", "star/A1#1.3"]
    assert result.unused_keys == {"bbox": 1, "rejected_note": 1}


@pytest.mark.parametrize("name", ["ms-swift", "llama-factory", V1])
def test_system_messages(name):
    role, text, key = ("role", "content", "messages") if name == "ms-swift" else ("from", "value", "conversations")
    row = sample(name)
    row[key] = [{role: "system", text: "Be brief."}, *row[key]]
    bare = SAMPLES[name][1]["prompt"]
    assert "has a system message: choose --system fold or --system drop" in refusal(name, row)
    assert run(name, row, system="drop")[0].prompt == bare
    assert run(name, row, system="fold")[0].prompt == f"Be brief.\n\n{bare}"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("<video>\nWhat?", "What?"), ("What?\n<video>", "What?"), ("<video>What?", "What?"), ("What?", "What?"),
        ("Look: <video> What?", "Look:  What?"), ("<image>\nWhat?", "What?"), ("A\n\n<video>\nB", "A\n\n\nB"),
    ],
)  # fmt: skip
def test_the_tag_is_removed_once(written, read):
    assert run("longvpo", sample("longvpo", question=written))[0].prompt == read


def test_videos_are_looked_up_below_the_root(tmp_path):
    root = tmp_path / "root"
    for file in ("a/x.mp4", "b/y.webm", "b/y.wav", "c/twin.mp4", "d/twin.mkv", "v.1.mp4", "frames/0.jpg"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"x")
    (tmp_path / "outside.mp4").write_bytes(b"x")

    def find(name):
        return run("longvpo", sample("longvpo", video=name), video_root=root)[0].video

    assert (
        find("a/x.mp4")
        == find("./a//x.mp4")
        == find(str(root / "a" / "x.mp4"))
        == find("a/x")
        == find("x")
        == "a/x.mp4"
    )
    assert (
        find("y") == "b/y.webm"
        and find("v.1") == "v.1.mp4"
        and find("frames") == "frames"
        and find("c/twin") == "c/twin.mp4"
    )
    assert find({"path": "a/x.mp4"}) == find(["a/x.mp4"]) == "a/x.mp4"
    for name, reason in [
        ("twin", "several files have the name of the video: twin: c/twin.mp4, d/twin.mkv"),
        ("z.mp4", "not below the video root: z.mp4"),
        (str(tmp_path / "outside.mp4"), "outside the video root"),
        (str(root / ".." / "outside.mp4"), "may not leave"),
        ("n" * 5000, "not below the video root"),
    ]:
        assert reason in refusal("longvpo", sample("longvpo", video=name), video_root=root)
    clips = [{"path": "a/x"}, {"path": "y", "start": 1.0}]
    (pair,) = run("manifest", sample("manifest", clips=clips), video_root=root)
    assert [clip.path for clip in pair.clips] == ["a/x.mp4", "b/y.webm"]
    with pytest.raises(ValueError, match="is not a folder"):
        ImportOptions(video_root=tmp_path / "none")
    with pytest.raises(ValueError, match="rejected must be one of first, all, got 'both'"):
        ImportOptions(rejected="both")


def test_rows_are_counted_by_reason(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        sample("longvpo"),
        sample("longvpo", video="/a.mp4"),
        sample("longvpo", video="/b.mp4"),
        sample("longvpo", extra=1),
    ]
    surrogate = sample("longvpo", rejected="half \ud83d")
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{\n" + json.dumps(surrogate))
    result = import_pairs(path, "longvpo")
    assert (result.num_rows, len(result.pairs)) == (6, 2)
    assert [pair.id for pair in result.pairs] == ["rows-1", "rows-4"] and result.unused_keys == {"extra": 1}
    absolute, unreadable, unwritable = (
        "the video path is absolute: give the video root",
        "not a readable row",
        "cannot be written to a manifest",
    )
    assert result.reasons == {absolute: 2, unreadable: 1, unwritable: 1}
    assert [row.line for row in result.refused] == [2, 3, 5, 6]
    with pytest.raises(ValueError, match="unknown format 'longvp'; known formats are auto, synpo"):
        import_pairs(path, "longvp")


@pytest.mark.parametrize("name", sorted(IMPORTERS))
def test_detection_never_guesses(tmp_path, videos, name):
    """Either the one format, or an error that names it among the candidates."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(sample(name))] * 3))
    options = ImportOptions(videos if name == "synpo" else None)
    if name in ("tpo", "llava-hound"):
        others = {"tpo": "llava-hound, tpo", "llava-hound": "llava-hound, manifest"}
        with pytest.raises(ValueError, match=f"fits several formats: {others[name]}"):
            detect_format(path, options)
    else:
        assert detect_format(path, options) == name


def test_detection_wants_all_of_the_first_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(sample(name)) for name in ("longvpo", "longvpo", "rrpo")))
    with pytest.raises(
        ValueError, match=r"fits no format: .*longvpo accepts 2 of 3 rows, but not .*rows.jsonl:3: no task_type"
    ):
        import_pairs(path, "auto")
    path.write_text("{\n{")
    with pytest.raises(ValueError, match="no readable rows"):
        detect_format(path)


@pytest.mark.parametrize("name", sorted(set(IMPORTERS) - {"manifest", "llava-hound"}))
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_to_import_that_is_given_as_a_manifest_is_recognised(tmp_path, name, wrapped):
    path = tmp_path / "rows.json"
    rows = [sample(name)] * 3
    path.write_text(json.dumps({"data": rows} if wrapped else rows))
    with pytest.raises(ManifestError) as raised:
        read_manifest(path)
    said = f"; this looks like {name}: `synpo-fast pairs import --format {name}`"
    assert str(raised.value).splitlines()[1].endswith(said) and str(raised.value).count("this looks like") == 1
    assert ("a list under 'data'" in str(raised.value)) == wrapped


def test_a_row_of_a_manifest_with_a_slip_is_no_other_format(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b", "clips": [], "vidoe": "a.mp4"}))
    with pytest.raises(ManifestError) as raised:
        read_manifest(path)
    assert "did you mean" in str(raised.value) and "looks like" not in str(raised.value)
