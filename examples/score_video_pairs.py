"""Scores two captions of a video by their log-probs. The video is given by its path, then by its frames.

    python examples/score_video_pairs.py                                a small random model and a clip made here
    python examples/score_video_pairs.py --model Qwen/Qwen2.5-VL-7B-Instruct --adapter runs/first/checkpoint-000100 \\
        --video clip.mp4 --prompt "Describe the video." --better "A dog runs." --worse "A cat sleeps."

The prompt and the video run through the model once for both captions. To adapt it, change the model, the video and the captions.
For many pairs, read a manifest (synpo_fast.data.read_manifest) and give score_pairs a few pairs at a time.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from synpo_fast import score_pairs
from synpo_fast.data import Pair, decode_frames
from synpo_fast.models import load_policy
from synpo_fast.testing.clips import write_clip


def load(model: str, adapter: str | None):
    """Loads the model, with a trained LoRA adapter if one is given."""
    policy = load_policy(model)
    if adapter is not None:
        from peft import PeftModel

        policy.model = PeftModel.from_pretrained(policy.model, adapter)
    return policy.eval()


def describe(name: str, logps: torch.Tensor) -> str:
    """Describes a response. logps: one log-prob per token, EOS included. SynPO's reward is the geometric mean of the probs."""
    return f"{name} {logps.sum():.4f} over {len(logps)} tokens, reward {logps.mean().exp():.6f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny:qwen2_5_vl", help="hub name, folder, or tiny:<family>")
    parser.add_argument("--adapter", help="folder of a trained LoRA adapter, such as a run's checkpoint-000100")
    parser.add_argument("--video", help="a video file; default: a generated clip of two seconds")
    parser.add_argument("--prompt", default="What happens?")
    parser.add_argument("--better", default="A texture drifts to the right.")
    parser.add_argument("--worse", default="A man cooks.")
    options = parser.parse_args()

    for name in ("prompt", "better", "worse"):
        if not getattr(options, name).strip():
            parser.error(f"--{name} is empty: give a text")
    if options.adapter is not None and not Path(options.adapter, "adapter_config.json").is_file():
        parser.error(f"--adapter {options.adapter} holds no adapter_config.json: give the folder of a saved adapter")
    try:
        print_scores(options)
    except (ValueError, OSError) as error:  # such as a video that cannot be read, or an unknown model
        parser.error(str(error))


def print_scores(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        video = options.video or write_clip(
            Path(folder) / "clip.mp4", codec="h264", num_frames=16, width=64, height=64, fps=8
        )
        # Given a path, score_pairs decodes the video and chooses the frames, by default 8 to 16.
        from_path = Pair(options.prompt, options.better, options.worse, video=video, id="path")
        # Given frames (uint8 [T, H, W, 3]), it uses those. Here they are the first, the middle and the last.
        _, info = decode_frames(video, indices=[0])
        frames, _ = decode_frames(video, indices=[0, info.num_frames // 2, info.num_frames - 1])
        from_frames = Pair(options.prompt, options.better, options.worse, video=frames, id="frames")
        policy = load(options.model, options.adapter)
        with torch.no_grad():  # without this line the log-probs have gradients, for training
            scored = score_pairs(policy, [from_path, from_frames])
    for pair, (better, worse) in zip((from_path, from_frames), scored, strict=True):
        print(f"{pair.id}: {describe('better', better)}; {describe('worse', worse)}")


if __name__ == "__main__":
    main()
