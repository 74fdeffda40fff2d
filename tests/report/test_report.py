"""The report of a run, read back from its HTML: it holds what lies in the folder, whatever that is."""

import base64
import html.parser
import io
import json
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synpo_fast.cli import main
from synpo_fast.data import decode_frames
from synpo_fast.report.write import write_report
from synpo_fast.testing.clips import write_clip
from tests.report.runs import VERSIONS, captions, demo, make_run, profile, step_row, write_rows

EVIL = "<script>alert(1)</script><img src=x onerror='alert(2)'>\" onclick=\"alert(3)&amp;</dd></article>"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, the visible text, and each element's text by class."""

    def __init__(self, file):
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.tags, self.texts, self.hidden = [], [], 0
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def charts(self):
        return [attributes["aria-label"] for attributes in self.all("svg")]


def report(*folders, out=None):
    return Page(write_report(folders, out))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "first", learning_rate=2e-5, loss_type="synpo")


def test_the_page_tells_what_the_folder_holds(run):
    page = report(run)
    assert (run / "report.html").exists()
    assert page.text.startswith("first")
    for words in (
        "Outcome Numbers Charts Captions of held-out videos Skipped pairs Config Versions",
        "12 steps",
        "16 pairs per second",
        "12,000 tokens in total",
    ):
        assert words in page.text, words
    assert "bad-7 lost.mp4: there is no such file" in page.text
    assert "learning_rate 2e-05" in page.text and "max_grad_norm: 1.0" in page.text
    assert all(f"{name} {version}" in page.text for name, version in VERSIONS.items())
    # The last twentieth of 12 steps is the last one alone.
    last = step_row(12, 12)["loss"]
    assert re.search(rf"loss -0\.5\d* {last:.4g} -0\.6 -0\.6", page.text), page.text[:900]
    for title in ("Loss", "Reward of each response", "Log-prob of each response", "Throughput: pairs per second"):
        assert title in page.charts()
    assert "Read this first" not in page.text


def test_captions_before_and_after_stand_beside_frames(tmp_path):
    folder = make_run(tmp_path / "run")
    write_clip(folder / "v0.mp4", codec="h264", num_frames=9, width=66, height=50, fps=8)
    page = report(folder)
    before, after = page.text.index("at step 6 halfway 0"), page.text.index("at step 12 finally 0")
    assert before < after < page.text.index("chosen A red square. rejected A blue circle.")
    pictures = page.all("img")
    assert [picture["alt"] for picture in pictures] == [f"frame {n} of 9" for n in (1, 3, 6, 9)]
    frames, _ = decode_frames(folder / "v0.mp4", indices=[0, 2, 5, 8])
    for picture, frame in zip(pictures, frames, strict=True):
        shown = decoded(picture["src"])
        assert shown.shape == frame.shape
        assert (shown.float() - frame.float()).abs().mean() < 12  # JPEG


def decoded(uri):
    import av

    kind, content = uri.split(",", 1)
    assert kind == "data:image/jpeg;base64"
    with av.open(io.BytesIO(base64.b64decode(content))) as container:
        return torch.from_numpy(next(container.decode(video=0)).to_ndarray(format="rgb24"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "there is no such file"), (b"", "is empty"), (b"no video at all" * 99, "v0.mp4: ")],
)
def test_a_video_that_cannot_be_shown_is_said(run, content, reason):
    if content is not None:
        (run / "v0.mp4").write_bytes(content)
    page = report(run)
    assert not page.all("img") and "No frames to show." in page.text and reason in page.text
    assert "finally 1" in page.text


def test_text_pairs_and_runs_without_evaluation_have_their_place(tmp_path):
    row = {"step": 1, "eval_loss": 1.0, "eval_captions": captions("said", video=None)}
    page = report(make_run(tmp_path / "text", rows=[step_row(1, 1), row]))
    assert "a text pair, or a pair made of clips" in page.text and "at step 1 said 0" in page.text
    bare = report(make_run(tmp_path / "bare", rows=[step_row(step, 3) for step in (1, 2, 3)]))
    assert "No captions" in bare.text and "Circles" not in bare.text and not bare.all("circle")


def test_the_page_opens_with_the_outcome_as_a_plot(tmp_path):
    """Before any table: rewards where pairs were compared, the NLL where none were."""
    of_kto = "Responses on the right side of the reference point"
    for loss, title in (("synpo", "Pairs ranked correctly"), ("kto", of_kto), ("sft", "NLL of the chosen response")):
        folder = make_run(tmp_path / loss, loss_type=loss)
        (folder / "demo.json").write_text(json.dumps(demo("gone.mp4")))
        page = report(folder)
        assert page.charts()[0] == title and page.charts().count(title) == 1
        assert page.source.index("<svg") < page.source.index("<table")
        assert page.text.index("Outcome") < page.text.index(title) < page.text.index("12 steps")


def test_a_run_without_evaluation_has_no_empty_columns(tmp_path):
    page = report(make_run(tmp_path / "run", rows=[step_row(step, 3) for step in (1, 2, 3)]))
    table = page.text[page.text.index("training, start") :]
    assert table.startswith("training, start training, end pairs ranked correctly 63.33 % 90 % reward margin")
    assert "not finite" not in page.text


def test_accuracy_is_named_by_what_the_losses_count(tmp_path):
    runs = [make_run(tmp_path / loss, loss_type=loss) for loss in ("kto", "dpo")]
    assert "Pairs ranked correctly, or responses on the right side of the reference point" in report(*runs).charts()
    page = report(runs[0])
    assert not any("ranked" in title for title in page.charts())
    table = page.text[page.text.index("training, start") :]
    assert re.search("responses on the right side of the reference point [0-9.]+ %", table), table
    assert "pairs ranked" not in table


def test_a_supervised_run_shows_no_comparisons(tmp_path):
    page = report(make_run(tmp_path / "run", loss_type="sft"))
    assert "NLL of the chosen response" in page.charts() and "NLL of chosen" in page.text
    assert not any("Reward" in title or "ranked" in title or "Log-prob of" in title for title in page.charts())
    assert "reward margin" not in page.text and "pairs ranked correctly" not in page.text


def test_no_text_of_a_file_becomes_markup(tmp_path):
    row = captions(EVIL, video=EVIL)[0] | {"id": EVIL, "prompt": EVIL, "chosen": EVIL, "rejected": EVIL}
    rows = [step_row(1, 2) | {EVIL: 1.0}, {"step": 1, "eval_captions": [row]}]
    folder = make_run(tmp_path / "a<b onclick=x>&quot;", rows=rows, run_name=EVIL)
    write_rows(folder / "skipped_pairs.rank0.jsonl", [{"id": EVIL, "reason": EVIL, "epoch": EVIL}])
    (folder / "profile.json").write_text(
        json.dumps({"variants": [{"name": EVIL, "stages": {EVIL: 1.0}}], "environment": {EVIL: EVIL}})
    )
    (folder / "demo.json").write_text(
        json.dumps({"accuracy": {EVIL: 1}, "examples": [{"video": EVIL, EVIL: EVIL}], "seconds": {EVIL: 1}})
    )
    trainer = {"versions": {EVIL: EVIL}, "state": {"stopped_early": True, "step": EVIL}}
    (folder / "checkpoint-000012" / "state" / "trainer.json").write_text(json.dumps(trainer))
    for page in (report(folder), report(folder, make_run(tmp_path / "other"), out=tmp_path / "two.html")):
        assert len(page.all("script")) == 1 and not page.all("img")
        assert page.text.count("<script>alert(1)</script>") >= 12
        assert not [(tag, names) for tag, names in page.tags if any(name.startswith("on") for name in names)]


def test_nothing_is_loaded_from_elsewhere(run):
    page = report(run)
    links = [
        value for _, names in page.tags for name, value in names.items() if name in ("src", "href", "srcset", "action")
    ]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in page.source and "@import" not in page.source
    policy = page.all("meta")[1]["content"]
    assert "default-src 'none'" in policy and "unsafe-inline'; script" in policy and "script-src 'sha256-" in policy


def test_ten_thousand_steps_stay_small(tmp_path):
    rows = [step_row(step, 10_000) for step in range(1, 10_001)]
    long = "A long caption of a long video. " * 60
    rows += [{"step": step, "eval_loss": -0.6, "eval_captions": captions(long)} for step in range(100, 10_001, 100)]
    folders = [make_run(tmp_path / f"run{number}", rows=rows) for number in range(3)]
    sizes = [write_report(folders[:count], tmp_path / "page.html").stat().st_size for count in (1, 3)]
    assert max(sizes) < 500_000
    assert "moving mean of 400 steps" in (tmp_path / "page.html").read_text()


def test_numbers_that_are_not_finite_are_said(tmp_path):
    rows = [step_row(step, 9) for step in range(1, 10)]
    for row in rows[4:6]:
        row |= {"loss": None, "grad_norm": float("nan"), "nonfinite_steps": row["step"] - 4}
    rows[6]["nonfinite_steps"] = rows[7]["nonfinite_steps"] = rows[8]["nonfinite_steps"] = 2
    page = report(make_run(tmp_path / "run", rows=rows))
    assert "Read this first the loss or gradient was not finite in 2 steps" in page.text
    assert "2 non-finite steps" in page.text and "Steps so far with a non-finite loss or gradient" in page.charts()


BROKEN = [
    ("metrics.jsonl", None, "there is no metrics.jsonl"),
    ("metrics.jsonl", b"", "holds no training step"),
    ("metrics.jsonl", b'{"step": 1, "loss": 1.0}\n{"step": 2, "lo', "no JSON object in line 2"),
    (
        "metrics.jsonl",
        b'\xff\xfe\x00\n[1]\n{"step": 1, "loss": 1}\n' + b"[" * 90_000,
        "no JSON object in 3 lines: 1, 2, 4",
    ),
    ("metrics.jsonl", b'{"loss": 1.0}\n{"step": "3"}\n{"step": true}\n', "3 rows of metrics.jsonl have no step"),
    ("metrics.jsonl", b'{"step": 1, "loss": 1e999, "grad_norm": 1' + b"0" * 400 + b"}", None),
    ("metrics.jsonl", b'{"step": 1, "eval_captions": {"a": 1}, "loss": "low"}', None),
    ("metrics.jsonl", b'{"step": 1, "eval_captions": [{"id": "a", "caption": "lone \\ud800 half"}]}', "lone ? half"),
    ("config.yaml", None, "no config.yaml"),
    ("config.yaml", b"- a\n- b\n", "does not map options"),
    ("config.yaml", b"a: [1, {\n", "config.yaml cannot be parsed as YAML (line 2)"),
    ("config.yaml", b"a: !!python/object/apply:os.system ['true']\n", "cannot be parsed as YAML (line 1)"),
    ("config.yaml", b"", "does not map options"),
    ("config.yaml", b"train_file: 7\nvideo_root: [1]\n1: {2: 3}\n", None),
    ("checkpoint-000012/state/trainer.json", b"{", "versions are not known"),
    ("checkpoint-000012/state/trainer.json", b'{"versions": [1], "state": 3}', "no checkpoint records"),
    ("skipped_pairs.rank0.jsonl", b"{}\nnope\n", "skipped_pairs.rank0.jsonl: no JSON object in line 2"),
    ("profile.json", b"[]", "profile.json is not a JSON object"),
    ("profile.json", b'{"variants": [1, {"stages": []}, {"seconds": "x", "stages": {"a": {}}}]}', None),
    ("demo.json", b'{"accuracy": 1, "per_attribute": [], "examples": [1, {}], "seconds": {"a": "b"}}', None),
    ("demo.json", b"oops", "demo.json is not a JSON object"),
]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN)
def test_broken_files_are_said_and_the_rest_is_shown(run, name, content, said):
    file = run / name
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)
    page = report(run)
    assert said is None or said in page.text
    assert "Versions" in page.text and "Skipped pairs" in page.text


def test_a_folder_in_the_place_of_a_file_and_an_empty_folder(run, tmp_path):
    for name in ("metrics.jsonl", "config.yaml"):
        (run / name).unlink()
        (run / name).mkdir()
    assert "metrics.jsonl cannot be read" in report(run).text
    (run / "metrics.jsonl").rmdir()  # killed before its first step
    page = report(run)
    assert "there is no metrics.jsonl" in page.text and not page.charts()


def test_a_folder_without_a_run_gets_no_page(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path} holds no run (no metrics.jsonl, no config.yaml, no profile.json)" in said
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["notes.txt", "page.html", "metrics.jsonl", "ours.txt"])
def test_only_a_report_is_replaced(run, tmp_path, capsys, name):
    file = tmp_path / "first" / name if name == "metrics.jsonl" else tmp_path / name
    if name == "page.html":
        file.write_text("<!doctype html><title>my own page</title>")
    elif name == "ours.txt":  # not even where a report has another name
        write_report([run], file)
    elif name == "notes.txt":
        file.write_text("mine")
    before = file.read_bytes()
    assert main(["report", str(run), "--out", str(file)]) == 2
    assert f"{file} exists and is not a report of synpo-fast" in capsys.readouterr().err
    assert file.read_bytes() == before and not list(tmp_path.rglob("*.partial"))
    for _ in range(2):
        assert main(["report", str(run), "--out", str(tmp_path / "new.html")]) == 0


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(
    ["loss", "rewards/chosen", "grad_norm", "epoch", "skipped_pairs", "eval_loss", "eval_captions", "x"]
)
rows = st.lists(
    st.dictionaries(names, anything, max_size=5).flatmap(
        lambda row: st.builds(lambda s: {"step": s} | row, st.integers())
    )
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows, anything, anything, st.dictionaries(st.sampled_from(["variants", "ways", "stages", "environment"]), anything)
)
def test_whatever_the_files_hold_a_page_is_written(run, metrics, caption, trainer, timed):
    write_rows(
        run / "metrics.jsonl", [*metrics, {"step": 3, "eval_captions": [caption, {"id": caption, "video": caption}]}]
    )
    (run / "checkpoint-000012" / "state" / "trainer.json").write_text(json.dumps(trainer))
    (run / "profile.json").write_text(json.dumps(timed))
    write_rows(run / "skipped_pairs.rank0.jsonl", [{"id": caption, "reason": trainer}])
    assert report(run).text


def test_several_runs_stand_side_by_side(run, tmp_path):
    other = make_run(tmp_path / "second", num_steps=8, learning_rate=1e-4, loss_type="dpo")
    file = write_report([run, other])
    assert file.resolve() == (tmp_path / "report.html").resolve()
    page = Page(file)
    assert "at the end first second" in page.text and "steps 12 8" in page.text
    differing = page.text[page.text.index("Config differences option") :]
    differing = differing[: differing.index(" Charts ")]
    assert "learning_rate 2e-05 0.0001" in differing and "loss_type synpo dpo" in differing
    assert "warmup_ratio" not in differing
    assert "first, step 12 finally 0" in page.text and "second, step 8 finally 0" in page.text
    colours = {name["style"] for name in page.all("path") if name.get("data-name", "").endswith(" accuracy")}
    assert len(colours) == 2


@pytest.mark.parametrize("content", [None, "- a\n", "a: [1, {\n"])
def test_a_run_without_a_config_is_no_difference(run, tmp_path, content):
    other = make_run(tmp_path / "second", num_steps=2, learning_rate=1e-4)
    third = make_run(tmp_path / "third", num_steps=2)
    (third / "config.yaml").unlink()
    if content is not None:
        (third / "config.yaml").write_text(content)
    for folders, said in [
        ([run, other, third], "learning_rate 2e-05 0.0001"),
        ([run, third], "Nothing to compare."),
    ]:
        text = report(*folders, out=tmp_path / "page.html").text
        differing = text[text.rindex("Config differences") :]
        differing = differing[: differing.index(" Charts ")]
        assert said in differing and "warmup_ratio" not in differing and "not set" not in differing
        assert "Left out, because no options are known: third." in differing


def test_runs_of_different_folders_have_their_page_in_the_current_one(run, tmp_path, monkeypatch, capsys):
    other = make_run(tmp_path / "elsewhere" / "second", num_steps=2)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["report", str(run), str(other)]) == 0
    assert (tmp_path / "elsewhere" / "report.html").is_file()
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "in the folder that they share, otherwise in the current folder" in " ".join(capsys.readouterr().out.split())


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / name / "out", rows=[step_row(1, 1)]) for name in ("a", "b", "c")]
    page = report(*folders, out=tmp_path / "page.html")
    assert "a/out vs b/out vs c/out" in page.text


def test_the_profile_shows_bars_to_scale_and_its_figures(run):
    (run / "profile.json").write_text(json.dumps(profile()))
    page = report(run)
    bars = [names["aria-label"] for names in page.all("div") if names.get("class") == "bar"]
    assert bars == ["vision 1 s, backward 3 s", "vision 2 s, backward 4 s, reference 2 s"]
    widths = [
        float(re.match(r"width:([\d.]+)%", names["style"])[1])
        for names in page.all("span")
        if "width" in names.get("style", "")
    ]
    assert sum(widths[:3]) == pytest.approx(50) and sum(widths[3:]) == pytest.approx(100)
    assert "DPO, adapter off 2x 1.8x to 2.4x 8 s 7.2 s to 9.6 s 1,234 3 GiB 2.5e15" in page.text
    assert (
        "9 rounds, 2 pairs, 1,293 prompt tokens, 485 response tokens per step. "
        "Bars: median step by stage. Spread: lowest to highest of the rounds." in page.text
    )
    assert (
        "time of DPO, adapter off divided by the variant's time" in page.text
        and "predict a ratio of 2.59 for SynPO, 1.5 without" in page.text
    )
    assert "computing the log-probs beforehand takes 250 ms per step" in page.text
    assert "DPO, frozen copy: not measured, zero_stage=3 shards the model." in page.text


def test_a_profile_of_an_earlier_release_is_shown(run):
    """Its key for the variants was "ways"."""
    found = profile()
    (run / "profile.json").write_text(json.dumps(found))
    now = report(run).text
    found["ways"] = found.pop("variants")
    (run / "profile.json").write_text(json.dumps(found))
    assert report(run).text == now and "DPO, frozen copy: not measured" in now


def test_a_folder_with_a_profile_alone_is_no_fault(tmp_path):
    (tmp_path / "profile.json").write_text(json.dumps(profile()))
    page = report(tmp_path)
    assert "Read this first" not in page.text and "Profile Config Profile" in page.text
    assert "learning_rate 0.25" in page.text and "SynPO 1x 0.9x to 1.2x 4 s" in page.text


@pytest.mark.parametrize("by_model", [True, False])
def test_the_demo_shows_accuracy_by_attribute_and_examples(run, by_model):
    write_clip(run / "unseen.mp4", codec="vp9", num_frames=3, width=64, height=48, fps=8)
    content = demo("unseen.mp4")
    if by_model:
        content["per_attribute"] = {
            model: {"colour": content["per_attribute"]["colour"][model]} for model in content["accuracy"]
        }
    (run / "demo.json").write_text(json.dumps(content))
    page = report(run)
    assert "warm-up SynPO DPO all attributes 50.1 % 70.2 % 65.3 % colour 40.0 % 80.0 % 60.0 %" in page.text
    assert "NLL 0.71 0.72 0.93" in page.text and "before SynPO a blue square after SynPO a red square" in page.text
    assert "SynPO 12.5, DPO 10." in page.text and "Time: data 3 s." in page.text
    assert len(page.all("img")) == 3


def test_mistakes_in_the_call(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="no run folder"):
        write_report([])
    with pytest.raises(ValueError, match="more than once"):
        write_report([run, run / ".." / "first"])
    with pytest.raises(ValueError, match="it is a folder"):
        write_report([run], tmp_path)
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "such" / "page.html")]) == 2
    said = capsys.readouterr().err
    assert f"the folder {tmp_path / 'no' / 'such'} does not exist: make it, or name another file" in said
    assert "partial" not in said
    (tmp_path / "a.txt").touch()
    assert main(["report", str(run), "--out", str(tmp_path / "a.txt" / "page.html")]) == 2
    assert f"{tmp_path / 'a.txt'} is not a folder: name another file with --out" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out and not list(tmp_path.glob("*.partial"))


def test_a_run_of_the_trainer_has_everything_the_page_wants(world, tmp_path, in_one_process, capsys):
    from tests.world import options

    values = options(
        world,
        tmp_path / "out",
        max_steps=2,
        eval_split=0.2,
        num_eval_captions=1,
        max_new_tokens=3,
        eval_steps=1,
        diagnostics=1,
    )
    in_one_process(values)
    said = capsys.readouterr().err
    assert "synpo: rewards are G (probability), log-probs means (nats per token)\n" in said
    page = report(tmp_path / "out")
    assert "Read this first" not in page.text and "before training" in page.text and "at step 2" in page.text
    assert len(page.all("img")) == 4 and "Gradient norm of each response's reward" in page.charts()
    assert "deepspeed" in page.text and "No pair was skipped" in page.text
