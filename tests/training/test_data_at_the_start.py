"""Messages about the data before the first step: which pairs are held out, and which cannot be trained on."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from synpo_fast import references
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data import Clip, Pair, read_manifest, write_manifest
from synpo_fast.data.encoding import BadPair, quoted
from synpo_fast.pairs.check import check_manifest
from synpo_fast.training import start
from synpo_fast.training.loop import TrainingStopped
from synpo_fast.training.run_data import read_data
from synpo_fast.training.run_state import Saver, check_same_run
from synpo_fast.training.text_checks import check_texts
from tests.world import options


def test_the_start_says_how_many_pairs_and_files_are_held_out(world, tmp_path, in_one_process, capsys):
    in_one_process(options(world, tmp_path / "out", max_steps=1, eval_split=0.25, eval_on_start=False, report=False))
    assert "synpo on 12 pairs (4 held out, of 2 files), 1 step of 4 pairs; " in capsys.readouterr().err


def test_clips_of_one_file_cannot_be_held_out(world, tmp_path):
    """The error comes before a model is loaded. Once, 101 pairs of one file were split into 81 and 20."""
    clips = [Pair("q", "a", "b", id=f"c{i}", clips=(Clip("v0.mp4", i / 100, 1.0),)) for i in range(100)]
    write_manifest(tmp_path / "clips.jsonl", [*clips, Pair("q", "a", "b", id="whole", video="v0.mp4")])
    values = options(world, tmp_path / "out", train_file=str(tmp_path / "clips.jsonl"), video_root=str(world))
    with pytest.raises(ValueError, match=r"eval_split=0\.2: all 101 pairs show the same file"):
        read_data(TrainConfig(**values, eval_split=0.2))


def test_an_eval_file_with_files_that_are_trained_on_is_a_warning(world, tmp_path, caplog):
    pairs = read_manifest(world / "pairs.jsonl")
    write_manifest(tmp_path / "eval.jsonl", pairs[:4])
    values = options(world, tmp_path / "out", eval_file=str(tmp_path / "eval.jsonl"), video_root=str(world))
    data = read_data(TrainConfig(**values))
    assert "2 files of eval_file=" in caplog.text and "are trained on, too" in caplog.text
    assert (len(data.train), len(data.evaluation)) == (16, 4)
    caplog.clear()
    write_manifest(tmp_path / "rest.jsonl", pairs[4:])
    read_data(TrainConfig(**{**values, "train_file": str(tmp_path / "rest.jsonl")}))
    assert not caplog.text


def changed(world, tmp_path, **texts):
    """The world's pairs, the first five with other texts."""
    pairs = list(read_manifest(world / "pairs.jsonl"))
    pairs[:5] = [replace(pair, **texts) for pair in pairs[:5]]
    write_manifest(tmp_path / "changed.jsonl", pairs)
    return {"train_file": str(tmp_path / "changed.jsonl"), "video_root": str(world)}


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|video_pad|>", "<|endoftext|>"])
def test_special_tokens_in_texts_stop_the_run_before_the_model_loads(
    world, tmp_path, in_one_process, monkeypatch, field, token
):
    monkeypatch.setattr(start, "build_model", lambda *_: pytest.fail("the model was loaded"))
    values = options(world, tmp_path / "out", **changed(world, tmp_path, **{field: f"A {token} ball"}))
    said = f"5 of 16 pairs hold special tokens of the model's tokenizer: 'p0-0' has '{token}' in {field}; 'p0-1' has"
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        in_one_process(values)
    assert str(error.value).count(" has ") == 3 and "--allow_bad_rows" in str(error.value)


def test_pairs_with_special_tokens_are_left_out_if_allowed(world, tmp_path, in_one_process, caplog):
    more = changed(world, tmp_path, chosen="A <|im_end|> ball")
    values = options(world, tmp_path / "out", max_steps=3, report=False, allow_bad_rows=True, **more)
    state = in_one_process(values)
    assert "left out: 5 of 16 pairs" in caplog.text
    assert state.epoch == 1 and state.step_in_epoch == 0, "11 pairs are 3 steps of 4"


def test_a_tag_of_another_format_is_a_warning(world, tmp_path, caplog):
    config = TrainConfig(**options(world, tmp_path / "out", **changed(world, tmp_path, chosen="<video>\nA ball")))
    assert len(check_texts(config, read_data(config)).train) == 16
    assert "5 of 16 pairs hold tags that are plain text to this model" in caplog.text
    assert "'p0-0' has '<video>' in chosen" in caplog.text
    caplog.clear()
    config = TrainConfig(**options(world, tmp_path / "out"))
    check_texts(config, read_data(config))
    assert not caplog.text


def broken_videos(world, folder):
    """A video root whose files are there and cannot be decoded: files that are missing are noticed before a model is loaded."""
    folder.mkdir()
    for video in world.glob("*.mp4"):
        (folder / video.name).write_bytes(b"no video")
    return str(folder)


def test_too_many_bad_pairs_are_named_with_their_reasons(world, tmp_path, in_one_process):
    """The message also says that the videos are broken, not just that pairs could not be used."""
    root = broken_videos(world, tmp_path / "broken")
    values = options(world, tmp_path / "out", max_steps=4, video_root=root, report=False)
    with pytest.raises(TrainingStopped) as error:
        in_one_process(values)
    text = str(error.value)
    assert text.startswith("4 of 4 pairs could not be used, more than max_bad_share=0.05. 'p")
    assert "pairs check" in text and "To continue, raise max_bad_share" in text
    assert len(re.findall(r"'p\d-\d': .*?v\d\.mp4: cannot be decoded: Invalid data", text)) == 3 and "\n" not in text


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("max_length", 8, "raise max_length"),
        ("video_max_tokens", 1, "raise video_max_tokens"),
        ("video_backend", "images", "set video_backend=auto"),
    ],
)
def test_pairs_that_an_option_leaves_out_are_answered_by_that_option(
    world, tmp_path, in_one_process, option, value, remedy
):
    values = options(world, tmp_path / "out", max_steps=4, report=False, **{option: value})
    with pytest.raises(TrainingStopped) as error:
        in_one_process(values)
    text = str(error.value)
    assert text.endswith(f"To use them, {remedy}. Nothing was trained, so no checkpoint was saved")
    assert "pairs check" not in text and "raise max_bad_share" not in text


def test_a_run_that_has_trained_must_start_anew_to_use_such_pairs(world, tmp_path, in_one_process):
    """A resumed run still counts them, so it would stop again."""
    pairs = read_manifest(world / "pairs.jsonl")
    long = [replace(pair, prompt="long " * 400) if index < 8 else pair for index, pair in enumerate(pairs)]
    write_manifest(tmp_path / "pairs.jsonl", long)
    values = options(world, tmp_path / "out", max_steps=4, save_steps=0, seed=1, report=False, max_length=1000)
    values |= {"train_file": str(tmp_path / "pairs.jsonl"), "video_root": str(world)}
    with pytest.raises(TrainingStopped) as error:
        in_one_process(values)
    anew = "To use them, raise max_length and start anew with --overwrite_output_dir. To continue, raise max_bad_share, and"
    assert anew in str(error.value)


def test_a_resumed_run_quotes_what_was_noted_before(world, tmp_path, group):
    saver = Saver(TrainConfig(**options(world, tmp_path)), {})
    assert saver.first_bad() == []
    for number in range(5):
        saver.note_bad(BadPair(f"p{number}", f"pair 'p{number}' is too long"), 0, number)
    with saver.bad_file.open("a") as file:
        file.write('{"id": "of a ki')
    assert saver.first_bad() == [BadPair(f"p{number}", f"pair 'p{number}' is too long") for number in range(3)]
    assert quoted(saver.first_bad()) == "'p0': is too long; 'p1': is too long; 'p2': is too long"


def test_held_out_pairs_that_cannot_be_used_are_said_once(world, tmp_path, in_one_process, caplog):
    root = tmp_path / "root"
    shutil.copytree(world, root)
    (root / "broken.mp4").write_bytes(b"no video")
    pairs = [replace(pair, video="broken.mp4") for pair in read_manifest(world / "pairs.jsonl")[:4]]
    write_manifest(tmp_path / "eval.jsonl", pairs)
    values = options(world, tmp_path / "out", max_steps=2, eval_steps=1, eval_file=str(tmp_path / "eval.jsonl"))
    in_one_process({**values, "video_root": str(root), "report": False})
    assert (
        len(re.findall(r"4 held-out pairs could not be used: 'p0-0': .*?broken.mp4: cannot be decoded", caplog.text))
        == 1
    )


def test_a_profile_without_a_usable_pair_says_why(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "out", profile=1, video_root=broken_videos(world, tmp_path / "broken"))
    with pytest.raises(ValueError, match=r"no step of .* every process: 'p\d-\d': .*v\d.mp4: cannot be decoded"):
        in_one_process(values)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            {"clips": [{"path": "v0.mp4"}, {"path": "v1.mp4"}], "reference_clips": [0]},
            "reference_clips is not read yet",
        ),
        ({"video": "v0.mp4", "audio": True}, "audio must be false: sound is not read yet"),
    ],
)
@pytest.mark.parametrize("name", ["train_file", "eval_file"])
def test_what_nothing_reads_is_refused_with_its_row(world, tmp_path, more, reason, name):
    file = tmp_path / "rows.jsonl"
    good, bad = {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "r", "chosen": "a", "rejected": "b", **more}
    file.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}")
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: {reason}"):
        read_data(TrainConfig(**{**options(world, tmp_path / "out"), name: str(file)}))
    (finding,) = (finding for finding in check_manifest(file).findings if finding.is_problem)
    assert finding.what == "bad rows" and f"rows.jsonl:2: {reason}" in finding.examples[0]


def test_other_pairs_are_told_by_their_numbers(tmp_path):
    then = {"training pairs": "2dd9", "number of training pairs": 16}
    with pytest.raises(ValueError, match=r"other pairs than when the run began \(16 then, 12 now\), or pairs_from"):
        check_same_run(then, {"training pairs": "77aa", "number of training pairs": 12}, tmp_path)
    check_same_run({"training pairs": "2dd9"}, then, tmp_path)  # a checkpoint of an earlier version


def test_a_reference_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(content, file):
        file.write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(references.torch, "save", full)
    with pytest.raises(ValueError, match=r"reference\.pt cannot be written \(unexpected pos"):
        references.write_logps(tmp_path / "reference.pt", {}, weights_key="key")
    assert not list(tmp_path.iterdir())


def test_videos_for_a_text_model_are_refused_before_it_is_loaded(world, tmp_path):
    config = TrainConfig(**options(world, tmp_path / "out", model_name_or_path="tiny:text"))
    with pytest.raises(ValueError, match="tiny:text is a text-only model, and all 16 pairs"):
        check_texts(config, read_data(config))
