"""A folder that holds an earlier run: the checkpoint a start resumes from, refusals, and that nothing of that run is lost."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synpo_fast.errors import UserError
from synpo_fast.run_folder.checkpoint import (
    CheckpointError,
    checkpoint_problem,
    list_checkpoints,
    newest_checkpoint,
    write_checkpoint,
)
from synpo_fast.run_folder.lock import RunLock
from synpo_fast.run_folder.superseded import set_aside, set_aside_lines
from synpo_fast.training.metrics import read_metrics
from synpo_fast.training.run_state import check_same_run
from tests.world import environment, options, train_command


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory, group):
    """A run of 4 steps with checkpoints 2 and 4. Tests work on copies."""
    from synpo_fast.config.train_config import TrainConfig
    from synpo_fast.train import run_in_group

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_in_group(TrainConfig(**options(world, folder, **SMALL)), group)
    return folder


SMALL = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 1}


@pytest.fixture
def values(world, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return options(world, tmp_path / "run", **SMALL)


def contents(folder):
    """Every file's bytes by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_anywhere(folder, name):
    """The lines of a file and of those of the same name that were set aside."""
    return [line for file in sorted(folder.rglob(f"*{name}*")) for line in file.read_text().splitlines()]


def touch_up(*names):
    def edit(checkpoint):
        for name in names:
            with (checkpoint / name).open("a") as stream:
                stream.write("\n")

    return edit


def spoil(checkpoint):
    (checkpoint / "state" / "trainer.json").write_bytes(b"")


def test_notes_in_a_readme_and_tokenizer_files_do_not_cost_a_run(values, in_one_process, finished):
    folder = Path(values["output_dir"])
    for checkpoint in list_checkpoints(folder):
        touch_up("README.md", "tokenizer_config.json", "adapter_config.json")(checkpoint)
        (checkpoint / "tokenizer.json").unlink()
        (checkpoint / "notes.txt").write_text("mine")
        assert checkpoint_problem(checkpoint) is None
    before = contents(folder)
    state = in_one_process({**values, "resume": "auto", "max_steps": 6})
    assert state.step == 6
    after = contents(folder)
    for name in before:
        if name.startswith("checkpoint"):
            assert after[name] == before[name], name
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])


def test_a_whole_model_goes_on_without_its_tokenizer_files(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "run", **SMALL, use_peft=False)
    in_one_process({**values, "max_steps": 2})
    checkpoint = newest_checkpoint(tmp_path / "run")
    for file in checkpoint.glob("*token*"):
        file.unlink()
    (checkpoint / "generation_config.json").write_text("{}")
    assert checkpoint_problem(checkpoint) is None
    assert in_one_process({**values, "resume": "auto", "max_steps": 3}).step == 3
    touch_up("config.json")(newest_checkpoint(tmp_path / "run"))  # from this a whole model is built
    assert "config.json" in checkpoint_problem(tmp_path / "run" / "checkpoint-000003")


def test_where_no_checkpoint_is_whole_nothing_is_done_and_each_is_explained(values, in_one_process):
    folder = Path(values["output_dir"])
    spoil(folder / "checkpoint-000004")
    (folder / "checkpoint-000002" / "complete.json").unlink()  # as `cp -r` of chosen files leaves it
    before = contents(folder)
    with pytest.raises(ValueError, match="none of its 2 checkpoints is whole") as raised:
        in_one_process({**values, "resume": "auto"})
    (said,) = str(raised.value).splitlines()
    for part in ("checkpoint-000004: state/trainer.json", "checkpoint-000002: complete.json", "--overwrite_output_dir"):
        assert part in said
    assert contents(folder) == before
    in_one_process({**values, "overwrite_output_dir": True, "max_steps": 1})
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1]
    assert [each.name for each in list_checkpoints(folder)] == ["checkpoint-000001"]


def test_a_broken_newest_is_set_aside_and_the_run_goes_on_from_the_one_before(values, in_one_process, caplog, finished):
    folder = Path(values["output_dir"])
    spoil(folder / "checkpoint-000004")
    before, lines = contents(folder), (folder / "metrics.jsonl").read_text().splitlines()
    in_one_process({**values, "resume": "auto"})
    assert "skipping" in caplog.text and "state/trainer.json" in caplog.text
    after = contents(folder)
    for name, content in before.items():
        if name.startswith("checkpoint-000004"):
            assert after[f"superseded/{name}"] == content
        elif name.startswith("checkpoint"):
            assert after[name] == content
    assert sorted(map(str, list_checkpoints(folder))) == [str(folder / f"checkpoint-00000{n}") for n in (2, 4)]
    assert (folder / "superseded" / "metrics.jsonl").read_text().splitlines() == lines[2:]
    assert after["superseded/report.html"] == before["report.html"]
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    ends = [load_file(each / "checkpoint-000004" / "adapter_model.safetensors") for each in (folder, finished)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_several_resumes_lose_no_line_and_no_config(values, in_one_process):
    folder = Path(values["output_dir"])
    seen = set(lines_anywhere(folder, "metrics"))
    configs = {(folder / "config.yaml").read_text()}
    for turn in range(3):
        spoil(newest_checkpoint(folder))
        in_one_process({**values, "resume": "auto", "learning_rate": 1e-4 * (turn + 1)})
        seen |= set(lines_anywhere(folder, "metrics"))
        configs.add((folder / "config.yaml").read_text())
        assert seen <= set(lines_anywhere(folder, "metrics"))
        assert configs == {file.read_text() for file in folder.glob("config*.yaml")}
    broken = [folder / "superseded" / f"checkpoint-000004{end}" for end in ("", ".2", ".3")]
    assert all(each.is_dir() for each in broken)


def test_a_run_killed_before_its_first_checkpoint_keeps_its_lines(world, tmp_path, in_one_process):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    (folder / "skipped_pairs.rank3.jsonl").write_text('{"id": "a", "step": 1}\n')
    (folder / "report.html").write_text("a page")
    (folder / "config.yaml").write_text("# my notes\n")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events").write_text("x")
    (folder / "mine.txt").write_text("x")
    before = contents(folder)
    in_one_process(options(world, folder, **{**SMALL, "max_steps": 1, "resume": "auto"}))
    after = contents(folder)
    for name in ("skipped_pairs.rank3.jsonl", "report.html", "tensorboard/events"):
        assert after[f"superseded/{name}"] == before[name]
    assert after["superseded/metrics.jsonl"] == before["metrics.jsonl"] + b"\n"
    assert after["config.until-step-0.yaml"] == before["config.yaml"]
    assert after["mine.txt"] == before["mine.txt"]
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1]


def test_overwriting_takes_what_runs_write_and_nothing_else(values, in_one_process, tmp_path):
    folder = Path(values["output_dir"])
    (folder / "notes.md").write_text("mine")
    (folder / "checkpoint-100").mkdir()  # of another trainer
    (folder / "checkpoint-100" / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-000003.partial").mkdir()
    (folder / "old.removed").mkdir()
    (folder / "config.until-step-1.yaml").write_text("a: 1")
    (folder / "superseded").mkdir()
    (folder / "superseded" / "metrics.jsonl").write_text("{}")
    (folder / "elsewhere").mkdir()
    (folder / "checkpoint-000007").symlink_to(folder / "elsewhere")
    shutil.copytree(folder / "checkpoint-000002" / "state", folder / "elsewhere" / "state")
    in_one_process({**values, "overwrite_output_dir": True, "max_steps": 1})
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-000001", "checkpoint-100", "config.yaml", "elsewhere", "metrics.jsonl", "notes.md", "old.removed",
        "report.html",
    ]  # fmt: skip
    assert (folder / "elsewhere" / "state" / "trainer.json").exists()
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("mistake", [{"train_file": "gone.jsonl"}, {"model_name_or_path": "tests"}])
def test_a_mistake_in_the_options_costs_the_earlier_run_nothing(values, in_one_process, mistake):
    folder = Path(values["output_dir"])
    before = contents(folder)
    with pytest.raises((ValueError, OSError)):
        in_one_process({**values, **mistake, "overwrite_output_dir": True})
    assert contents(folder) == before


def test_a_folder_to_resume_from_may_not_cover_a_run_of_its_own(values, in_one_process, tmp_path):
    folder = Path(values["output_dir"])
    shutil.copytree(folder / "checkpoint-000002", tmp_path / "kept")
    before = contents(folder)
    with pytest.raises(ValueError, match="holds checkpoints of its own"):
        in_one_process({**values, "resume": str(tmp_path / "kept")})
    with pytest.raises(ValueError, match="later checkpoints, checkpoint-000004 the last"):
        in_one_process({**values, "resume": str(folder / "checkpoint-000002")})
    assert contents(folder) == before
    # Lines of another run that never saved are not taken for this one's.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    in_one_process({**values, "output_dir": str(tmp_path / "new"), "resume": str(tmp_path / "kept")})
    assert [row["step"] for row in read_metrics(tmp_path / "new" / "metrics.jsonl")] == [3, 4]
    assert lines_anywhere(tmp_path / "new" / "superseded", "metrics") == ['{"step": 1, "loss": 9.0}']


def test_a_start_that_has_nothing_to_do_changes_nothing(values, in_one_process):
    folder = Path(values["output_dir"])
    spoil(folder / "checkpoint-000004")
    before = contents(folder)
    assert in_one_process({**values, "resume": "auto", "max_steps": 1, "learning_rate": 0.1}).step == 2
    assert contents(folder) == before


def test_a_finished_run_resumed_into_a_new_folder_stays_finished_there(values, in_one_process, tmp_path, capsys):
    new = {**values, "output_dir": str(tmp_path / "new")}
    assert in_one_process({**new, "resume": values["output_dir"]}).step == 4
    for _ in range(2):
        assert in_one_process({**new, "resume": "auto"}).step == 4
        assert "nothing to do" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["resumed_from.json"]
    in_one_process({**new, "resume": "auto", "max_steps": 5})
    assert [row["step"] for row in read_metrics(tmp_path / "new" / "metrics.jsonl")] == [5]


def test_only_checkpoints_of_this_run_make_room(values, in_one_process):
    """A copy somebody put there, one of another run, and one of another trainer stay."""
    folder = Path(values["output_dir"])
    shutil.copytree(folder / "checkpoint-000002", folder / "checkpoint-2")
    other = folder / "checkpoint-000001"
    shutil.copytree(folder / "checkpoint-000002", other)
    state = json.loads((other / "state" / "trainer.json").read_text())
    state["state"]["step"], state["run"] = 1, "another"
    (other / "state" / "trainer.json").write_text(json.dumps(state))
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-9.removed").mkdir()
    (folder / "my.removed").mkdir()
    in_one_process({**values, "resume": "auto", "max_steps": 6, "save_total_limit": 1})
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "checkpoint-000001", "checkpoint-000006", "checkpoint-2", "checkpoint-3", "my.removed",
    ]  # fmt: skip


def write(folder, step, **more):
    def save_model(into):
        (into / "adapter_model.safetensors").write_bytes(b"x" * 100)

    state = {"state": {"step": step}, **more}
    return write_checkpoint(folder, step, save_model=save_model, optimizer_state={}, trainer_state=state, keep=None)


def test_a_checkpoint_is_never_written_over_another(tmp_path):
    first = contents(write(tmp_path, 3, run="a"))
    second = contents(write(tmp_path, 3, run="b"))
    write(tmp_path, 3, run="c")
    assert contents(tmp_path / "superseded" / "checkpoint-000003") == first
    assert contents(tmp_path / "superseded" / "checkpoint-000003.2") == second


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "complete.json").write_text('{"files": {}}'), "names no state/optimizer"),
        (lambda folder: (folder / "complete.json").write_text('{"files": {"a": 1, "state/x": 2}}'), "cannot be read"),
        (lambda folder: (folder / "complete.json").write_text('{"files": []}'), "cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "0 bytes, 100 were written"),
        (lambda folder: folder.rename(folder.with_name("checkpoint-000009")), "renamed copy: its state is that of step 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_checkpoint_is_said(tmp_path, change, reason):
    folder = write(tmp_path, 3)
    change(folder)
    (folder,) = list_checkpoints(tmp_path)
    assert reason in checkpoint_problem(folder)


def test_lines_are_moved_and_never_lost(tmp_path):
    file = tmp_path / "log"
    file.write_bytes(b"keep 1\nmove \xe2\x80\xa8 2\nkeep 3\nmove \xff 4\nkeep 5")
    assert set_aside_lines(file, lambda line: line.startswith("keep")) == 2
    assert file.read_bytes() == b"keep 1\nkeep 3\nkeep 5\n"
    assert (tmp_path / "superseded" / "log").read_bytes() == b"move \xe2\x80\xa8 2\nmove \xff 4\n"
    assert set_aside_lines(file, lambda line: "5" not in line) == 1
    assert (tmp_path / "superseded" / "log").read_bytes().endswith(b"keep 5\n")
    assert set_aside(file) == tmp_path / "superseded" / "log.2"


def test_a_second_run_in_the_same_folder_is_turned_away(values, in_one_process, tmp_path):
    lock = RunLock(Path(values["output_dir"]))
    before = contents(Path(values["output_dir"]))
    link = tmp_path / "link"
    link.symlink_to(values["output_dir"])  # another name of the same folder
    for more in ({"resume": "auto"}, {"overwrite_output_dir": True}, {"output_dir": str(link), "resume": "auto"}):
        with pytest.raises(ValueError, match=r"in use by another run \(process \d+ on "):
            in_one_process({**values, **more})
    assert contents(Path(values["output_dir"])) == before
    lock.release()
    in_one_process({**values, "resume": "auto", "output_dir": str(link), "max_steps": 5})
    assert not (Path(values["output_dir"]) / "run.lock").exists()


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from synpo_fast.run_folder.lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment())
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on"):
            RunLock(tmp_path)
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "run.lock").exists()
    RunLock(tmp_path).release()
    assert not (tmp_path / "run.lock").exists()


def test_of_many_that_want_the_lock_one_at_a_time_has_it(tmp_path):
    """Taking and releasing removes the file: a lock on a removed file must not count."""
    inside, most, turns = [], [0], [0]

    def want():
        for _ in range(200):
            try:
                lock = RunLock(tmp_path)
            except ValueError:
                continue
            inside.append(1)
            most[0] = max(most[0], len(inside))
            turns[0] += 1
            inside.pop()
            lock.release()

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and turns[0] > 10


def test_two_runs_started_at_once(world, tmp_path):
    values = options(world, tmp_path / "run", max_steps=40, save_steps=0, report=False, gradient_accumulation_steps=1)
    runs = [
        subprocess.Popen(train_command(values), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]  # fmt: skip
    outputs = [each.communicate(timeout=200)[0] for each in runs]
    assert sorted(each.returncode for each in runs) == [0, 2], outputs
    assert sum("in use by another run" in text for text in outputs) == 1
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 41))


def test_a_relative_model_path_of_an_earlier_version_is_the_same_model(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    now = {"model_name_or_path": str(tmp_path / "base"), "seed": 1}
    check_same_run({"model_name_or_path": "base", "seed": 1}, now, tmp_path)
    with pytest.raises(ValueError, match="model_name_or_path was other"):
        check_same_run({"model_name_or_path": "other", "seed": 1}, now, tmp_path)


@pytest.mark.parametrize(
    ("saved", "now", "told"),
    [
        ({"loss options": {"nll_weight": 0.5}}, {"loss options": {"nll_weight": 0.7}}, "nll_weight was 0.5, now 0.7"),
        ({"loss options": {"beta": 0.1}}, {"loss options": {}}, "beta was 0.1, now not set"),
        ({"reference": "precomputed"}, {"reference": None}, "reference was precomputed, now auto"),
        ({"model_options": None}, {"model_options": {"num_heads": 2}}, "num_heads was not set, now 2"),
        (
            {"adapter": [4, 8, 0.0, ["q_proj"]]}, {"adapter": [4, 8, 0.1, ["q_proj", "v_proj"]]},
            "lora_dropout was 0.0, now 0.1; lora_target_modules was q_proj, now q_proj,v_proj",
        ),
        (
            {"frames": "FrameSampling(num_frames=None, fps=1.0)"}, {"frames": "FrameSampling(num_frames=8, fps=None)"},
            "num_frames was not set, now 8; fps was 1.0, now not set",
        ),
    ],
)  # fmt: skip
def test_what_differs_is_told_option_by_option(tmp_path, saved, now, told):
    with pytest.raises(UserError) as error:
        check_same_run(saved, now, tmp_path)
    assert str(error.value) == (
        f"cannot resume from {tmp_path}: {told}. Set it back, or start anew in another output_dir"
    )


def test_a_state_without_the_facts_of_its_run_is_no_start(values, in_one_process):
    write(Path(values["output_dir"]), 6)
    with pytest.raises(CheckpointError, match="no facts of the run"):
        in_one_process({**values, "resume": "auto"})
