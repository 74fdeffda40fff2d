"""The demo's videos show what their scenes say: read off the frames again, before and after the codecs."""

from random import Random

import numpy as np
import pytest

from synpo_fast.data import decode_frames
from synpo_fast.demo.world import (
    BACKGROUND,
    CODECS,
    COLOURS,
    COUNTS,
    FRAMES_PER_EVENT,
    MOTIONS,
    SHAPES,
    SIDE,
    SIZES,
    WORDS,
    Event,
    draw_scene,
    random_scene,
    write_video,
)


def things(frame):
    """(colour, pixels) of each connected blob, by flood fill."""
    bright = np.abs(frame.astype(int) - frame[0, 0].astype(int)).max(-1) > 60
    left = {tuple(at) for at in np.argwhere(bright)}
    found = []
    while left:
        blob, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            blob.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        mean = np.mean([frame[at] for at in blob], 0)
        nearest = min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())
        found.append((nearest, np.array(sorted(blob))))
    return found


def seen_event(frames):
    """The event of four frames, from pixels alone."""
    blobs = things(frames[0])
    (colour,) = {name for name, _ in blobs}
    spans = [pixels.max(0) - pixels.min(0) + 1 for _, pixels in blobs]
    size = min(SIZES, key=lambda name: abs(2 * SIZES[name] + 1 - max(map(max, spans))))
    height, width = spans[0]
    full = len(blobs[0][1]) / (height * width)
    middle = tuple(((blobs[0][1].max(0) + blobs[0][1].min(0)) // 2).tolist())
    hollow = middle not in {tuple(at) for at in blobs[0][1].tolist()}
    shape = "bar" if height < 0.8 * width else "ring" if hollow else "square" if full > 0.9 else "cross"
    centres = [np.mean([pixels.mean(0) for _, pixels in things(frame)], 0) for frame in (frames[0], frames[-1])]
    down, right = centres[1] - centres[0]
    motion = max(MOTIONS, key=lambda name: MOTIONS[name][0] * right + MOTIONS[name][1] * down)
    return Event(COUNTS[len(blobs) - 1], size, colour, shape, motion)


@pytest.mark.parametrize("seed", range(12))
def test_frames_show_the_scene(seed):
    random = Random(seed)
    scene = random_scene(random)
    frames = draw_scene(scene, random)
    assert frames.shape == (FRAMES_PER_EVENT * len(scene), SIDE, SIDE, 3) and frames.dtype == np.uint8
    parts = frames.reshape(len(scene), FRAMES_PER_EVENT, SIDE, SIDE, 3)
    assert tuple(seen_event(part) for part in parts) == scene


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_each_shape_and_size_can_be_told(shape, size):
    scene = (Event("three", size, "yellow", shape, "up"),)
    assert seen_event(draw_scene(scene, Random(3))) == scene[0]


@pytest.mark.parametrize("motion", MOTIONS)
def test_shapes_stay_in_the_picture(motion):
    for seed in range(20):
        frames = draw_scene((Event("three", "large", "red", "square", motion),), Random(seed)).astype(int)
        areas = (np.abs(frames - BACKGROUND).max(-1) > 60).sum((1, 2))
        assert set(areas.tolist()) == {3 * 15 * 15}


@pytest.mark.parametrize(("codec", "suffix"), CODECS)
def test_codecs_keep_every_frame_and_what_it_shows(codec, suffix, tmp_path):
    random = Random(7)
    scene = tuple(Event("two", "small", colour, "bar", "left") for colour in ("green", "purple", "white"))
    frames = draw_scene(scene, random)
    write_video(tmp_path / f"v{suffix}", frames, codec)
    decoded, info = decode_frames(f"v{suffix}", indices=range(12), root=tmp_path)
    assert info.num_frames == 12
    assert np.abs(decoded.numpy().astype(int) - frames).mean() < 6
    seen = [seen_event(part).colour for part in decoded.numpy().reshape(3, 4, SIDE, SIDE, 3)]
    assert seen == ["green", "purple", "white"]


def test_scenes_have_one_to_three_events_that_differ_in_colour_and_shape():
    scenes = [random_scene(Random(seed)) for seed in range(300)]
    assert {len(scene) for scene in scenes} == {1, 2, 3}
    for scene in scenes:
        assert len({event.colour for event in scene}) == len({event.shape for event in scene}) == len(scene)
    for name, words in WORDS.items():
        assert {getattr(event, name) for scene in scenes for event in scene} == set(words)


def test_a_seed_gives_the_same_video():
    one, two = (draw_scene(random_scene(random), random) for random in (Random("a 1"), Random("a 1")))
    assert np.array_equal(one, two)
