"""Runs the trainer from Python: writes a manifest, trains an adapter, reads the metrics, scores a pair before and after.

    python examples/train_from_python.py                                clips and a small random model, on a CPU
    python examples/train_from_python.py --model Qwen/Qwen2.5-VL-7B-Instruct --manifest pairs.jsonl --video_root videos

TrainConfig has the options of docs/training.md, with the same names. run_training needs no launcher: it makes a process group of
this process alone. It runs once per process: start a new one for the next run. In a program that torchrun starts, every process
calls it with the same config, and they train together. To adapt it, change the model, the manifest and the learning rate
(5e-6), and remove lora_r and dataloader_num_workers: their defaults fit real models and videos.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import PeftModel

from synpo_fast import score_pairs
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data import Pair, read_manifest, write_manifest
from synpo_fast.models import load_policy
from synpo_fast.run_folder.checkpoint import newest_checkpoint
from synpo_fast.testing.clips import write_clip
from synpo_fast.train import run_training
from synpo_fast.training.metrics import read_metrics


def make_data(folder: Path) -> Path:
    """Writes four clips with two pairs each, and a manifest that lists them. Its video paths are relative to its folder."""
    folder.mkdir(parents=True)
    pairs = []
    for index, (size, other) in enumerate([("small", "large"), ("large", "small")] * 2):
        side = 64 if size == "small" else 112
        write_clip(folder / f"{index}.mp4", codec="h264", num_frames=8, width=side, height=side, fps=4)
        for prompt in ("What is shown?", "Describe the clip."):
            pairs.append(Pair(prompt, f"A {size} texture drifts.", f"A {other} man.", video=f"{index}.mp4"))
    write_manifest(folder / "pairs.jsonl", pairs)
    return folder / "pairs.jsonl"


def score(policy, pair: Pair, video_root: Path) -> str:
    with torch.no_grad():
        ((chosen, rejected),) = score_pairs(policy.eval(), [pair], video_root=video_root)
    return f"chosen {chosen.mean():.4f}, rejected {rejected.mean():.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny:qwen2_5_vl", help="hub name, folder, or tiny:<family>")
    parser.add_argument("--manifest", type=Path, help="default: eight pairs of four clips, written to output_dir/data")
    parser.add_argument("--video_root", type=Path, help="default: the manifest's folder")
    parser.add_argument("--output_dir", type=Path, help="default: a new temporary folder, printed at the end")
    parser.add_argument("--max_steps", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    options = parser.parse_args()
    if options.output_dir is not None and options.manifest is None and (options.output_dir / "data").exists():
        parser.error(f"{options.output_dir} holds the data of an earlier run: give another --output_dir")

    output_dir = options.output_dir or Path(tempfile.mkdtemp(prefix="synpo_fast-"))
    manifest = options.manifest or make_data(output_dir / "data")
    run = output_dir / "run"
    config = TrainConfig(
        model_name_or_path=options.model,
        train_file=str(manifest),
        video_root=str(options.video_root or manifest.parent),
        output_dir=str(run),
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        gradient_accumulation_steps=8,
        lora_r=8,
        dataloader_num_workers=0,
    )
    run_training(config)

    for row in read_metrics(run / "metrics.jsonl"):
        print(f"step {row['step']}: loss {row['loss']:.6f}, margin {row['rewards/margins']:.6f}")

    pair = read_manifest(manifest)[0]
    policy = load_policy(options.model, seed=config.seed)  # a tiny: model's weights follow from the seed
    print(f"before: {score(policy, pair, Path(config.video_root))}")
    policy.model = PeftModel.from_pretrained(policy.model, str(newest_checkpoint(run)))
    print(f"after: {score(policy, pair, Path(config.video_root))}")
    print(f"the run: {run} (`synpo-fast report {run}` makes a page of it)")


if __name__ == "__main__":
    main()
