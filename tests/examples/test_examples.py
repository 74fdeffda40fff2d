"""examples/: each file runs as a user runs it, and what it prints is what eager torch on whole logits says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from synpo_fast.data import Pair, decode_frames, read_manifest
from synpo_fast.models import load_policy
from synpo_fast.models.tiny import tiny_model
from synpo_fast.scoring import encode_pairs
from synpo_fast.testing.clips import write_clip
from tests.models.alone import alone

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ALPHA, BETA = 30.0, 0.2


def run(name: str, *arguments: object) -> str:
    """The example in a process of its own; what it printed."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def steps(printed: str) -> list[tuple[float, float]]:
    """(loss, margin) of each line `step N: loss X, margin Y`."""
    found = re.findall(r"^step \d+: loss (\S+), margin (\S+)$", printed, re.MULTILINE)
    return [(float(loss), float(margin)) for loss, margin in found]


def synpo(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """(loss, margin): SynPO's formula on token log-probs, in fp64."""
    losses, margins = [], []
    for chosen, rejected in pairs:
        chosen, rejected = chosen.double(), rejected.double()
        margin = chosen.mean().exp() - rejected.mean().exp()
        losses.append(-torch.sigmoid(ALPHA * margin) - BETA * chosen.exp().mean())
        margins.append(margin)
    return float(torch.stack(losses).mean()), float(torch.stack(margins).mean())


@torch.no_grad()
def text_truth(pairs: list[dict[str, str]]) -> tuple[float, float]:
    """Loss and margin of the tiny text model, each sequence alone, with all its logits."""
    model, tokenizer = tiny_model("text", seed=0)

    def logps(prompt: str, response: str) -> torch.Tensor:
        start, answer = tokenizer(prompt)["input_ids"], [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([start + answer])).logits[0, len(start) - 1 : -1].double()
        return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]

    return synpo([tuple(logps(pair["prompt"], pair[name]) for name in ("chosen", "rejected")) for pair in pairs])


@torch.no_grad()
def video_truth(policy, pair: Pair, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of both responses, each run alone through plain attention and whole logits."""
    (sample,) = encode_pairs(policy, [pair], **how).samples
    return alone(policy, sample, 0), alone(policy, sample, 1)


def loaded(name: str):
    """An example as a module, to read its data."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bare_loop():
    printed = steps(run("bare_loop.py", "--steps", 6))
    losses = [loss for loss, _ in printed]
    assert len(losses) == 6 and losses == sorted(losses, reverse=True), losses
    assert printed[0] == pytest.approx(text_truth(loaded("bare_loop").PAIRS), abs=2e-6)


def test_trl_trainer(tmp_path):
    pytest.importorskip("trl", minversion="1.16", reason="the example trains with it")
    printed = steps(run("trl_trainer.py", "--max_steps", 3, "--output_dir", tmp_path / "run"))
    assert printed[0] == pytest.approx(text_truth(loaded("trl_trainer").PAIRS), abs=2e-6)
    assert printed[2][0] < printed[1][0] < printed[0][0]
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_train_from_python_and_score_with_its_adapter(tmp_path):
    """The first loss, and the last scores, against each pair run alone; then the other example with the adapter of this one."""
    pytest.importorskip("deepspeed", reason="the trainer needs it")
    peft = pytest.importorskip("peft", reason="the trainer makes an adapter")
    printed = run("train_from_python.py", "--output_dir", tmp_path, "--max_steps", 4)
    policy = load_policy("tiny:qwen2_5_vl", seed=42).eval()
    pairs = read_manifest(tmp_path / "data" / "pairs.jsonl")
    data = {"video_root": tmp_path / "data"}
    assert steps(printed)[0] == pytest.approx(synpo([video_truth(policy, pair, **data) for pair in pairs]), abs=2e-6)
    assert steps(printed)[-1][0] < steps(printed)[0][0]
    assert scores(printed, "before") == pytest.approx(means(policy, pairs[0], **data), abs=1e-4)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    policy.model = peft.PeftModel.from_pretrained(policy.model, str(checkpoint))
    assert scores(printed, "after") == pytest.approx(means(policy, pairs[0], **data), abs=1e-4)
    assert scores(printed, "after") != pytest.approx(scores(printed, "before"), abs=1e-2)


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        (
            "train_from_python",
            ["--output_dir", "made"],
            "made holds the data of an earlier run: give another --output_dir",
        ),
        ("score_video_pairs", ["--video", "nope.mp4"], "nope.mp4: there is no such file"),
        ("score_video_pairs", ["--video", "text.mp4"], "text.mp4: cannot be decoded"),
        ("score_video_pairs", ["--worse", ""], "--worse is empty: give a text"),
        ("score_video_pairs", ["--better", "A man cooks."], "are the same text"),
        ("score_video_pairs", ["--adapter", "nope"], "--adapter nope holds no adapter_config.json"),
        ("score_video_pairs", ["--adapter", "made"], "--adapter made holds no adapter_config.json"),
        ("score_video_pairs", ["--model", "./nope"], "model_name_or_path='./nope': there is no such folder"),
    ],
)
def test_a_mistake_in_a_call_is_one_line(name, arguments, said, tmp_path, monkeypatch, capsys):
    if name == "train_from_python":
        pytest.importorskip("deepspeed", reason="the trainer needs it")
        pytest.importorskip("peft", reason="the trainer makes an adapter")
    (tmp_path / "made" / "data").mkdir(parents=True)
    (tmp_path / "text.mp4").write_text("not a video")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit, match=r"^2$"):
        loaded(name).main()
    assert said in capsys.readouterr().err.splitlines()[-1]


def scores(printed: str, when: str) -> tuple[float, float]:
    found = re.search(rf"^{when}: chosen (\S+), rejected (\S+)$", printed, re.MULTILINE)
    assert found, printed
    return float(found[1]), float(found[2])


def means(policy, pair: Pair, **how) -> tuple[float, float]:
    chosen, rejected = video_truth(policy, pair, **how)
    return float(chosen.mean()), float(rejected.mean())


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
def test_score_video_pairs(tmp_path, with_adapter):
    video = write_clip(tmp_path / "clip.mp4", codec="h264", num_frames=10, width=80, height=64, fps=5)
    policy = load_policy("tiny:qwen2_5_vl").eval()
    more: list[object] = []
    if with_adapter:
        more = ["--adapter", made_adapter(tmp_path / "adapter")]
        peft = pytest.importorskip("peft")
        policy.model = peft.PeftModel.from_pretrained(policy.model, str(tmp_path / "adapter"))
    printed = run("score_video_pairs.py", "--video", video, "--better", "It drifts.", "--worse", "Nobody.", *more)
    frames, _ = decode_frames(video, indices=[0, 5, 9])
    for name, shown in (("path", video), ("frames", frames)):
        better, worse = video_truth(policy, Pair("What happens?", "It drifts.", "Nobody.", video=shown))
        number = r"(-?[\d.]+)"
        scored = (
            rf"better {number} over (\d+) tokens, reward {number}; worse {number} over (\d+) tokens, reward {number}"
        )
        found = re.search(rf"^{name}: {scored}$", printed, re.MULTILINE)
        assert found, printed
        expected = [(logps.sum(), len(logps), logps.mean().exp()) for logps in (better, worse)]
        got = [float(text) for text in found.groups()]
        assert got == pytest.approx([float(value) for each in expected for value in each], abs=2e-4)


def made_adapter(folder: Path) -> Path:
    """An adapter that changes something: trained for no step, its second factor is drawn anew."""
    pytest.importorskip("peft", reason="it makes and reads the adapter")
    from synpo_fast.models.lora import add_lora

    policy = add_lora(load_policy("tiny:qwen2_5_vl"), r=4, alpha=8)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    policy.model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_each_example_explains_itself(file, monkeypatch, capsys):
    """It is short, its options have help, it is tested here, and docs/index.md leads to it."""
    text = file.read_text()
    assert len(text.splitlines()) <= 90
    assert f'run("{file.name}"' in Path(__file__).read_text()
    assert f"examples/{file.name}" in (ROOT / "docs" / "index.md").read_text()
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        loaded(file.stem).main()
    shown = capsys.readouterr().out
    assert f"python examples/{file.name}" in shown and "To adapt it, change" in " ".join(shown.split())
    for option in re.findall(r'add_argument\("(--\w+)"', text):
        assert option in shown
    for option in re.findall(r"(?<=\s)--\w+", re.match(r'"""(.*?)"""', text, re.DOTALL)[1]):
        assert f'add_argument("{option}"' in text, f"{file.name} names {option}, which it does not have"
