"""The demo's files: videos, the warm-up's captions, preference pairs, and scenes that no training sees.

The warm-up learns from the careless captioner. A pair holds the careful captioner's caption and the careless one's with up to
two slips more; its scores are what the errors weigh. Every video is drawn from a generator of its own, named by seed, part and
number, so a part can be made again, or made longer, and stay the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from synpo_fast.data.manifest import write_manifest
from synpo_fast.data.pair import Pair
from synpo_fast.demo.captions import PROMPT, Caption, caption_text, careful_caption, careless_caption
from synpo_fast.demo.world import CODECS, Event, Scene, draw_scene, random_scene, write_video

DONE = "done"  # written last


@dataclass(frozen=True)
class Clip:
    """A video of the demo, by its path inside the data folder, and what it shows."""

    video: str
    scene: Scene

    @property
    def truth(self) -> str:
        return caption_text(self.scene)


def make_dataset(folder: Path, *, seed: int, num_train: int, num_unseen: int, say: Callable[[int, int], None]) -> None:
    """Writes warm_up.jsonl, pairs.jsonl, held_out.jsonl and unseen.json with their videos. `say` is told (videos done, of all)
    now and then. Does nothing in a folder that is complete."""
    if (folder / DONE).exists():
        return
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    every = num_train + num_unseen

    def said(done: int) -> None:
        if done % 100 == 0 or done == every:
            say(done, every)

    train = []
    for number in range(num_train):
        train.append(_make_clip(folder, f"{seed} train", number, avoid=frozenset()))
        said(number + 1)
    seen = frozenset(clip.scene for clip in train)
    unseen = []
    for number in range(num_unseen):
        unseen.append(_make_clip(folder, f"{seed} unseen", number, avoid=seen))
        said(num_train + number + 1)
    random = Random(f"{seed} captions")
    write_manifest(folder / "warm_up.jsonl", [_warm_up_row(clip, random) for clip in train])
    write_manifest(folder / "pairs.jsonl", [preference_pair(clip, random) for clip in train])
    write_manifest(folder / "held_out.jsonl", [preference_pair(clip, random) for clip in unseen])
    scenes = [{"video": clip.video, "scene": [vars(event) for event in clip.scene]} for clip in unseen]
    (folder / "unseen.json").write_text(json.dumps(scenes, indent=1), encoding="utf-8")
    (folder / DONE).touch()


def read_unseen(folder: Path) -> list[Clip]:
    rows = json.loads((folder / "unseen.json").read_text(encoding="utf-8"))
    return [Clip(row["video"], tuple(Event(**event) for event in row["scene"])) for row in rows]


def preference_pair(clip: Clip, random: Random) -> Pair:
    """Rejected has the lower score; it is drawn again until it has."""
    chosen = careful_caption(clip.scene, random)
    rejected = chosen
    while rejected.score >= chosen.score:
        rejected = careless_caption(clip.scene, random, num_slips=random.randint(0, 2))
    return _pair(clip, chosen, rejected)


def _make_clip(folder: Path, part: str, number: int, *, avoid: frozenset[Scene]) -> Clip:
    random = Random(f"{part} {number}")
    scene = random_scene(random)
    while scene in avoid:
        scene = random_scene(random)
    codec, suffix = CODECS[number % len(CODECS)]
    video = f"videos/{part.split()[-1]}-{number:04}{suffix}"
    write_video(folder / video, draw_scene(scene, random), codec)
    return Clip(video, scene)


def _warm_up_row(clip: Clip, random: Random) -> Pair:
    caption = careless_caption(clip.scene, random).text
    return Pair(PROMPT, caption, "", video=clip.video, id=Path(clip.video).stem, loss="sft")


def _pair(clip: Clip, chosen: Caption, rejected: Caption) -> Pair:
    return Pair(
        PROMPT,
        chosen.text,
        rejected.text,
        video=clip.video,
        id=Path(clip.video).stem,
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        ground_truth=clip.truth,
    )
