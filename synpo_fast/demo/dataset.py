"""Makes the demo's files: videos, captions for the warm-up, preference pairs, and unseen videos, which no training uses.

The warm-up learns from the careless captioner. A preference pair has a caption of the careful captioner and one of the careless
captioner with up to two more slips; their scores follow from their errors. Every fourth row has NUM_RESPONSES scored captions,
one careful and the others careless. Each video has a random generator of its own, seeded
by seed, part and number, so a part that is made again, or made longer, has the same videos.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from synpo_fast.data.manifest import write_manifest
from synpo_fast.data.pair import Pair, Response
from synpo_fast.demo.captions import PROMPT, Caption, caption_text, careful_caption, careless_caption
from synpo_fast.demo.world import CODECS, Event, Scene, draw_scene, random_scene, write_video

DONE = "done"  # this file is written last
EVERY = 4  # one row in EVERY has several responses
NUM_RESPONSES = 4


@dataclass(frozen=True)
class Clip:
    """A video of the demo: its path inside the data folder, and the scene it shows."""

    video: str
    scene: Scene

    @property
    def truth(self) -> str:
        return caption_text(self.scene)


def make_dataset(
    folder: Path, *, seed: int, num_train: int, num_unseen: int, on_progress: Callable[[int, int], None]
) -> None:
    """Writes warm_up.jsonl, pairs.jsonl, held_out.jsonl and unseen.json with their videos. Does nothing in a complete folder.

    on_progress is called with (videos written, videos in total) after every 100 videos and after the last.
    """
    if (folder / DONE).exists():
        return
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    total = num_train + num_unseen

    def report_progress(done: int) -> None:
        if done % 100 == 0 or done == total:
            on_progress(done, total)

    train = []
    for number in range(num_train):
        train.append(_make_clip(folder, f"{seed} train", number, avoid=frozenset()))
        report_progress(number + 1)
    seen = frozenset(clip.scene for clip in train)
    unseen = []
    for number in range(num_unseen):
        unseen.append(_make_clip(folder, f"{seed} unseen", number, avoid=seen))
        report_progress(num_train + number + 1)
    random = Random(f"{seed} captions")
    write_manifest(folder / "warm_up.jsonl", [_warm_up_row(clip, random) for clip in train])
    pairs = [preference_pair(clip, random) for clip in train]
    for number in range(0, num_train, EVERY):
        pairs[number] = with_more_responses(pairs[number], train[number], Random(f"{seed} responses {number}"))
    write_manifest(folder / "pairs.jsonl", pairs)
    write_manifest(folder / "held_out.jsonl", [preference_pair(clip, random) for clip in unseen])
    scenes = [{"video": clip.video, "scene": [vars(event) for event in clip.scene]} for clip in unseen]
    (folder / "unseen.json").write_text(json.dumps(scenes, indent=1), encoding="utf-8")
    (folder / DONE).touch()


def read_unseen(folder: Path) -> list[Clip]:
    """The unseen videos and their scenes, which make_dataset wrote."""
    rows = json.loads((folder / "unseen.json").read_text(encoding="utf-8"))
    return [Clip(row["video"], tuple(Event(**event) for event in row["scene"])) for row in rows]


def preference_pair(clip: Clip, random: Random) -> Pair:
    """A pair of captions of the clip. The rejected caption is drawn again until it has the lower score."""
    chosen = careful_caption(clip.scene, random)
    rejected = chosen
    while rejected.score >= chosen.score:
        rejected = careless_caption(clip.scene, random, num_slips=random.randint(0, 2))
    return _pair(clip, chosen, rejected)


def with_more_responses(pair: Pair, clip: Clip, random: Random) -> Pair:
    """The pair as a row of NUM_RESPONSES different captions. Each new caption has a lower score than the chosen one."""
    assert pair.chosen_score is not None and pair.rejected_score is not None
    found = {pair.chosen: pair.chosen_score, pair.rejected: pair.rejected_score}
    while len(found) < NUM_RESPONSES:
        caption = careless_caption(clip.scene, random, num_slips=random.randint(0, 2))
        if caption.score < pair.chosen_score:
            found.setdefault(caption.text, caption.score)
    responses = tuple(Response(text, score) for text, score in found.items())
    return Pair(pair.prompt, video=pair.video, id=pair.id, ground_truth=pair.ground_truth, responses=responses)


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
