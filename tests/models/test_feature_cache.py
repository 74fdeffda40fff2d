"""Videos known by their file: found in the cache without decoding, by any process, and never where the file was replaced."""

import dataclasses
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from synpo_fast.data import encoding
from synpo_fast.data.encoding import BadPair, PairReader
from synpo_fast.data.loader import PairLoader
from synpo_fast.data.pair import Clip, Pair
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.data.video_key import reading_facts, video_key
from synpo_fast.errors import UserError
from synpo_fast.models import load_policy
from synpo_fast.models.digest import tower_key
from synpo_fast.models.families.registry import VideoFeatures
from synpo_fast.models.feature_cache import FeatureCache, StoredVideos
from synpo_fast.scoring import PairEncoder
from synpo_fast.testing.clips import write_clip
from tests.models.tiny_families import VIDEO_FAMILIES

SAMPLING = FrameSampling(num_frames=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny:qwen2_5_vl")


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for k in range(3):
        write_clip(folder / f"{k}.mp4", codec="h264", num_frames=6 + k, width=64, height=48)
    return folder


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Pairs whose frames were decoded in this process."""
    names: list[str] = []
    real = encoding.pair_frames
    monkeypatch.setattr(encoding, "pair_frames", lambda pair, *a, **k: (names.append(pair.id), real(pair, *a, **k))[1])
    return names


def pair_of(video=None, **fields) -> Pair:
    return Pair("q", "good", "bad", video=video, **{"id": "p", **fields})


def reader_of(policy, root, stored=None, **settings) -> PairReader:
    encoder = PairEncoder.of(policy)
    chosen = {"sampling": SAMPLING, "backend": "auto", **settings}
    facts = reading_facts(encoder, chosen["sampling"], chosen["backend"], CPU)
    return PairReader(encoder, chosen["sampling"], root, chosen["backend"], CPU, 30.0, facts, stored)


def cache_of(policy, folder) -> FeatureCache:
    policy.feature_store = FeatureCache(folder, tower=tower_key(policy))
    return policy.feature_store


def key_of(policy, root, pair, **settings) -> str | None:
    return video_key(pair, reader_of(policy, root, **settings).facts, root)


def test_a_key_follows_from_the_file_and_what_is_made_of_it(policy, root):
    pair = pair_of("0.mp4")
    key = key_of(policy, root, pair)
    same = [
        key_of(policy, root, pair_of("0.mp4", id="another")),
        key_of(policy, root, pair_of("./0.mp4")),
        key_of(policy, root, pair_of(clips=(Clip("0.mp4"),))),
        key_of(pickle.loads(pickle.dumps(policy)), root, pair),
    ]
    assert same == [key] * len(same)
    moved = root.parent / "moved"
    shutil.copytree(root, moved)  # with the times of change
    assert key_of(policy, moved, pair) == key
    smaller = load_policy("tiny:qwen2_5_vl", max_pixels=2 * 28 * 28)
    others = [
        key_of(policy, root, pair_of("1.mp4")),
        key_of(policy, root, pair_of(clips=(Clip("0.mp4", 0.0, 0.1),))),
        key_of(policy, root, pair_of(clips=(Clip("0.mp4", 0.1, None),))),
        key_of(policy, root, pair_of(clips=(Clip("0.mp4"), Clip("1.mp4")))),
        key_of(policy, root, pair_of(clips=(Clip("1.mp4"), Clip("0.mp4")))),
        key_of(policy, root, pair, sampling=FrameSampling(num_frames=4)),
        key_of(policy, root, pair, backend="pyav"),
        key_of(smaller, root, pair),
        *(key_of(load_policy(f"tiny:{name}"), root, pair) for name in VIDEO_FAMILIES[1:]),
    ]
    os.utime(root / "0.mp4", (1, 1))
    others.append(key_of(policy, root, pair))
    (root / "0.mp4").write_bytes((root / "0.mp4").read_bytes() + b"0")
    os.utime(root / "0.mp4", (1, 1))
    others.append(key_of(policy, root, pair))
    assert len({key, *others}) == 1 + len(others)
    assert key_of(policy, root, pair_of()) is None


def test_frames_that_a_pair_brings_are_known_by_their_bytes(policy, root):
    frames = torch.randint(0, 256, (2, 20, 30, 3), dtype=torch.uint8)
    key = key_of(policy, root, pair_of(frames))
    assert key_of(policy, root, pair_of(frames.clone())) == key
    other = frames.clone()
    other[1, 3, 4, 1] += 1
    assert (
        len({key, key_of(policy, root, pair_of(other)), key_of(policy, root, pair_of(frames.view(2, 30, 20, 3)))}) == 3
    )


def test_a_folder_of_images_is_known_by_each_of_them(policy, root):
    import av

    folder = root / "images"
    folder.mkdir()
    for k in range(3):
        av.VideoFrame.from_ndarray(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy(), "rgb24").save(
            str(folder / f"{k}.png")
        )
    pair = pair_of("images")
    key = key_of(policy, root, pair)
    os.utime(folder / "1.png", (5, 5))
    changed = key_of(policy, root, pair)
    (folder / "2.png").unlink()
    assert len({key, changed, key_of(policy, root, pair)}) == 3


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_what_is_stored_comes_without_pixels_and_gives_the_same_log_probs(name, root, tmp_path, decoded):
    policy = load_policy(f"tiny:{name}")
    cache = cache_of(policy, tmp_path / "features")
    reader = reader_of(policy, root, StoredVideos(cache.folder).find)
    pairs = [pair_of("0.mp4"), pair_of("1.mp4", id="p1")]
    first = [reader(pair).sample for pair in pairs]
    assert decoded == ["p", "p1"] and all(sample.video.features is None for sample in first)
    expected = policy(first)
    again = [pickle.loads(pickle.dumps(reader))(pair).sample for pair in pairs]
    assert decoded == ["p", "p1"], "not decoded once more"
    for one, other in zip(first, again, strict=True):
        assert one.prompt == other.prompt and other.video.frames is None
        assert other.video.features is not None and other.video.num_bytes > 0
        for key, tensor in one.video.tensors.items():
            assert torch.equal(tensor, other.video.tensors[key]) and tensor.dtype == other.video.tensors[key].dtype
    found = policy(again)
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert (cache.hits, cache.misses) == (2, 2)
    policy.feature_store = None
    with pytest.raises(ValueError, match="came from a feature cache, with features and without pixels"):
        policy(again)


def test_a_file_holds_the_features_of_its_video_alone(policy, root, tmp_path):
    """Videos encoded in one call are slices of one tensor, whose storage was once written for each of them."""
    cache = cache_of(policy, tmp_path / "features")
    reader = reader_of(policy, root)
    policy([reader(pair_of(f"{k}.mp4")).sample for k in range(3)])
    for file in cache.folder.glob("*.pt"):
        stored = torch.load(file, weights_only=True)
        assert stored["features"].untyped_storage().nbytes() == stored["features"].nbytes


def test_a_replaced_video_is_not_found(policy, root, tmp_path, decoded):
    cache = cache_of(policy, tmp_path / "features")
    reader = reader_of(policy, root, StoredVideos(cache.folder).find)
    policy([reader(pair_of("0.mp4")).sample])
    assert reader(pair_of("0.mp4")).sample.video.features is not None
    shutil.copyfile(root / "2.mp4", root / "0.mp4")
    encoded = reader(pair_of("0.mp4"))
    assert decoded == ["p", "p"] and encoded.sample.video.features is None
    assert torch.equal(encoded.sample.video.frames, reader_of(policy, root)(pair_of("2.mp4")).sample.video.frames)


def test_a_video_that_changes_while_it_is_read_gets_no_key_of_the_old_one(policy, root, monkeypatch):
    real, changes = encoding.pair_frames, []

    def changing(pair, *args, **more):
        frames = real(pair, *args, **more)
        changes.append(os.utime(root / "0.mp4", (7, 100 + len(changes))))
        return frames

    reader = reader_of(policy, root)
    monkeypatch.setattr(encoding, "pair_frames", changing)
    result = reader(pair_of("0.mp4"))
    assert isinstance(result, BadPair) and "was changed while it was read" in result.reason and len(changes) == 2


def test_features_that_vanish_or_are_damaged_are_made_again(policy, root, tmp_path, decoded, caplog):
    cache = cache_of(policy, tmp_path / "features")
    reader = reader_of(policy, root, StoredVideos(cache.folder).find)
    expected = policy([reader(pair_of("0.mp4")).sample])
    in_hand = reader(pair_of("0.mp4"))
    (file,) = cache.folder.glob("*.pt")
    content = file.read_bytes()
    file.unlink()
    found = policy([in_hand.sample])  # the file went after the worker had read it
    assert torch.equal(found[0][0], expected[0][0]) and decoded == ["p"]
    for damage in (content[: len(content) // 2], b"", b"no archive"):
        file.write_bytes(damage)
        sample = reader(pair_of("0.mp4")).sample
        assert sample.video.features is None and f"{file} is damaged" in caplog.text
        assert torch.equal(policy([sample])[0][0], expected[0][0])
        assert reader(pair_of("0.mp4")).sample.video.features is not None, "it was written anew"
    assert decoded == ["p"] * 4
    assert [each.name for each in sorted(cache.folder.iterdir())] == sorted([file.name, "tower.json"])


def test_workers_find_what_is_there(policy, root, tmp_path):
    """Worker processes send features of stored videos, and frames of the others."""
    cache = cache_of(policy, tmp_path / "features")
    policy([reader_of(policy, root)(pair_of("1.mp4")).sample])
    with PairLoader(
        [pair_of(f"{k}.mp4", id=f"p{k}") for k in range(3)], PairEncoder.of(policy), sampling=SAMPLING, video_root=root,
        pairs_per_step=3, num_workers=1, shuffle=False, find_stored=StoredVideos(cache.folder).find,
    ) as loader:  # fmt: skip
        (batch,) = loader.steps(0)
    assert [pair.sample.video.features is not None for pair in batch.pairs] == [False, True, False]
    assert all(pair.sample.video.key is not None for pair in batch.pairs)
    policy([pair.sample for pair in batch.pairs])
    assert len(list(cache.folder.glob("*.pt"))) == 3


def test_a_folder_of_an_earlier_format_is_refused(policy, tmp_path):
    (tmp_path / "tower.json").write_text('{"format": 1, "tower": "x"}')
    with pytest.raises(ValueError, match="another version's format"):
        FeatureCache(tmp_path, tower=tower_key(policy))


def test_without_a_key_the_content_decides(policy, root):
    """Readers of a library user who asks for no keys."""
    sample = dataclasses.replace(reader_of(policy, root), facts=None)(pair_of("0.mp4")).sample
    assert sample.video.key is None


def test_frames_that_a_pair_brings_are_stored_and_found(policy, root, tmp_path):
    cache = cache_of(policy, tmp_path / "features")
    reader = reader_of(policy, root, StoredVideos(cache.folder).find)
    frames = torch.randint(0, 256, (2, 40, 30, 3), dtype=torch.uint8)
    expected = policy([reader(pair_of(frames)).sample])
    sample = reader(pair_of(frames.clone())).sample
    assert sample.video.features is not None and torch.equal(policy([sample])[0][1], expected[0][1])


def test_many_may_write_and_read_one_folder(policy, root, tmp_path):
    """Several ranks and their worker processes do this. A process that finds a file finds it complete."""
    cache = cache_of(policy, tmp_path / "features")
    video = reader_of(policy, root)(pair_of("0.mp4")).sample.video
    (features,) = policy.family.encode_videos(policy.base, [video])

    def write(_):
        FeatureCache(cache.folder, tower=cache.tower).put(video, features)

    def read(_):
        found = StoredVideos(cache.folder).find(video.key)
        return found is None or torch.equal(found.features.features, features.features)

    with ThreadPoolExecutor(8) as threads:
        writes = [threads.submit(write, k) for k in range(60)]
        assert all(threads.map(read, range(120)))
        assert all(each.result() is None for each in writes)
    assert sorted(file.name for file in cache.folder.iterdir()) == sorted([f"{video.key}.pt", "tower.json"])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_is_said_once_and_leaves_nothing_behind(policy, tmp_path, monkeypatch, caplog, error):
    def full(content, file):
        Path(file).write_bytes(b"half")
        raise error

    frames = torch.zeros(3, 56, 56, 3, dtype=torch.uint8)
    video = PairEncoder.of(policy).video_inputs(pair_of(), frames, 1.0)
    features = VideoFeatures(torch.zeros(4, 8), ())
    cache = FeatureCache(tmp_path, tower="t")
    monkeypatch.setattr(torch, "save", full)
    cache.put(video, features)
    cache.put(video, features)
    assert caplog.text.count("cannot be written") == 1 and not list(tmp_path.glob("*.partial"))
    assert cache.get(video) is None


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "features").write_text("")
    with pytest.raises(UserError, match=r"feature_cache='.*features' cannot be used as a folder: File exists"):
        FeatureCache(tmp_path / "features", tower="t")
