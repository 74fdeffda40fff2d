"""A step holds the right pairs and frames, whichever process reads them. Bad pairs are counted and change nothing else."""

import os
import signal
from concurrent.futures import wait
from pathlib import Path
from threading import Event, Timer

import pytest
import torch

from synpo_fast.data.encoding import BadPair, PairReader, ReadInThread, ReadOnDemand
from synpo_fast.data.loader import PairLoader
from synpo_fast.data.order import epoch_order
from synpo_fast.data.pair import Clip, Pair
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.models import load_policy
from synpo_fast.scoring import PairEncoder
from synpo_fast.testing.clips import read_barcode, write_clip
from tests.data.chores import LightEncoder

SAMPLING = FrameSampling(num_frames=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """clip 0 has 5 frames, clip 1 has 6, ...; text.mp4 is no video."""
    root = tmp_path_factory.mktemp("videos")
    for k in range(4):
        write_clip(root / f"{k}.mp4", codec="h264", num_frames=5 + k, width=96, height=64)
    (root / "text.mp4").write_text("this is no video")
    return root


def some_pairs(count: int = 11, **changed: dict) -> list[Pair]:
    """Pair k shows clip k % 4; changed: {"p3": {...}} replaces fields of pair 3."""
    pairs = []
    for k in range(count):
        fields = {"prompt": "q", "chosen": "a", "rejected": "b", "video": f"{k % 4}.mp4", "id": f"p{k}"}
        pairs.append(Pair(**fields | changed.get(f"p{k}", {})))
    return pairs


def loader_of(root, pairs=None, encoder=None, **options) -> PairLoader:
    settings = {"sampling": SAMPLING, "video_root": root, "pairs_per_step": 3, "num_workers": 0, "seed": 5}
    return PairLoader(some_pairs() if pairs is None else pairs, encoder or LightEncoder(), **settings | options)


def facts(batch):
    """All of a step that may not depend on who read it."""
    return (
        batch.epoch,
        batch.step,
        batch.wanted,
        [(pair.id, pair.preference, shown(pair)) for pair in batch.pairs],
        batch.bad,
    )


def shown(pair) -> tuple:
    """The frame numbers a pair shows, and the time between them."""
    video = pair.sample.video
    if video is None:
        return ()
    return tuple(read_barcode(frame.numpy()) for frame in video.tensors["frames"]), video.seconds_per_grid


def test_steps_hold_the_epochs_order_and_the_right_frames(root):
    with loader_of(root) as loader:
        assert loader.steps_per_epoch == 4
        for epoch in (0, 3):
            batches = list(loader.steps(epoch))
            assert [(batch.epoch, batch.step, batch.wanted) for batch in batches] == [
                (epoch, step, wanted) for step, wanted in enumerate((3, 3, 3, 2))
            ]
            found = [pair for batch in batches for pair in batch.pairs]
            assert [pair.id for pair in found] == [f"p{k}" for k in epoch_order(11, seed=5, epoch=epoch)]
            for pair in found:
                last = 4 + int(pair.id[1:]) % 4
                frames, seconds = shown(pair)
                assert frames == (0, last // 2, last)
                assert seconds == pytest.approx(last / 2 / 25)


@pytest.mark.parametrize(
    "options",
    [{"num_workers": 1, "prefetch_steps": 1}, {"num_workers": 2, "prefetch_steps": 4, "prefetch_bytes": 200_000}],
)
def test_the_result_is_the_same_whoever_reads(root, options):
    pairs = some_pairs(11, p4={"video": "text.mp4"}, p9={"chosen": "too long"})
    with loader_of(root, pairs) as plain, loader_of(root, pairs, **options) as loader:
        for epoch, start in ((0, 0), (1, 0), (1, 2), (5, 3)):
            found = [facts(batch) for batch in loader.steps(epoch, start)]
            assert found == [facts(batch) for batch in plain.steps(epoch, start)]
            assert [step for _, step, *_ in found] == list(range(start, 4))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_an_epoch_without_overlap(root, world_size):
    pairs = some_pairs(7)
    per_rank = [
        list(loader_of(root, pairs, rank=rank, world_size=world_size, pairs_per_step=2).steps(2))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1, "ranks agree on the number of steps"
    ids = [pair.id for batches in per_rank for batch in batches for pair in batch.pairs]
    assert sorted(ids) == sorted(pair.id for pair in pairs)
    if world_size == 5:
        assert [batch.wanted for batch in per_rank[4]] == [1], "7 pairs for 5 x 2 places: the last ranks get fewer"


def test_a_rank_without_a_pair_has_an_empty_step(root):
    (batch,) = loader_of(root, some_pairs(2), rank=2, world_size=3, pairs_per_step=1).steps(0)
    assert (batch.wanted, batch.pairs, batch.bad) == (0, [], [])


def test_bad_pairs_are_counted_and_nothing_else_changes(root):
    changed = {
        "p1": {"video": "text.mp4"},
        "p2": {"video": "missing.mp4"},
        "p3": {"chosen": "too long"},
        "p7": {"video": None, "clips": tuple(Clip(f"{k}.mp4") for k in range(4))},  # 4 clips for 3 frames
        "p8": {"video": "../outside.mp4"},
    }
    good = [facts(batch) for batch in loader_of(root).steps(0)]
    mixed = list(loader_of(root, some_pairs(11, **changed)).steps(0))
    reasons = {bad.id: bad.reason for batch in mixed for bad in batch.bad}
    assert reasons.keys() == changed.keys()
    for name, reason in {"p1": "text.mp4", "p2": "missing.mp4", "p3": "100 tokens", "p7": "4 clips"}.items():
        assert reason in reasons[name]
    for batch, (_, _, wanted, pairs, _) in zip(mixed, good, strict=True):
        assert batch.wanted == wanted == len(batch.pairs) + len(batch.bad)
        assert facts(batch)[3] == [pair for pair in pairs if pair[0] not in changed]


def test_a_step_of_bad_pairs_only_is_a_step(root):
    pairs = some_pairs(3, **{f"p{k}": {"video": "text.mp4"} for k in range(3)})
    (batch,) = loader_of(root, pairs).steps(0)
    assert batch.pairs == [] and batch.wanted == len(batch.bad) == 3


def test_what_fails_once_is_tried_again(root, tmp_path):
    (batch,) = loader_of(root, some_pairs(2, p1={"chosen": f"fail once {tmp_path / 'flag'}"})).steps(0)
    assert len(batch.pairs) == 2 and not batch.bad


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.heavy)])
def test_a_mistake_in_the_code_is_no_bad_pair(root, num_workers):
    with (
        loader_of(root, some_pairs(2, p1={"chosen": "bug"}), num_workers=num_workers) as loader,
        pytest.raises((KeyError, RuntimeError), match="p1"),
    ):
        list(loader.steps(0))


def test_a_crash_costs_one_pair(root):
    good = [facts(batch) for batch in loader_of(root).steps(0)]
    with loader_of(root, some_pairs(11, p6={"chosen": "crash"}), num_workers=2) as loader:
        batches = list(loader.steps(0))
    bad = [bad for batch in batches for bad in batch.bad]
    assert [(pair.id, pair.reason) for pair in bad] == [("p6", "its worker process died of SIGSEGV (attempt 2)")]
    assert [pair for batch in batches for pair in facts(batch)[3]] == [
        pair for batch in good for pair in batch[3] if pair[0] != "p6"
    ]


@pytest.mark.heavy
def test_a_hang_and_a_killed_worker_cost_no_more(root):
    batches = []
    with loader_of(root, some_pairs(11, p6={"chosen": "hang"}), num_workers=2, deadline_s=5.0) as loader:
        for batch in loader.steps(0):
            batches.append(batch)
            if batch.step == 0:
                os.kill(loader.process_ids[0], signal.SIGKILL)
    bad = [bad for batch in batches for bad in batch.bad]
    assert [pair.id for pair in bad] == ["p6"] and "and was stopped (attempt 2)" in bad[0].reason
    assert sum(len(batch.pairs) for batch in batches) == 10


class Counting:
    """A source of results that counts what is asked of it and not yet fetched."""

    def __init__(self, source):
        self.source, self.submitted, self.open, self.most = source, [], 0, 0

    def submit(self, pair):
        future = self.source.submit(pair)
        self.submitted.append(pair.id)
        self.open += 1
        self.most = max(self.most, self.open)
        result = future.result

        def counted():
            self.open -= 1
            return result()

        future.result = counted
        return future

    def close(self):
        self.source.close()


def test_reading_ahead_is_bounded_and_crosses_the_end_of_an_epoch(root):
    loader = loader_of(root, some_pairs(8), pairs_per_step=2, prefetch_steps=3)
    loader._ahead.source = counting = Counting(loader._source)
    order = [f"p{k}" for epoch in (0, 1) for k in epoch_order(8, seed=5, epoch=epoch)]
    steps = iter(loader.steps(0))
    next(steps)
    assert counting.submitted == order[:8], "the step itself and three more"
    assert sum(batch.wanted for batch in steps) == 6
    assert counting.submitted == order[:14], "three steps of the next epoch"
    next(loader.steps(1))
    assert counting.submitted == order[:16], "which need not be read again"
    assert counting.most == 6


def test_an_evaluation_reads_in_order_and_not_beyond_its_end(root):
    loader = loader_of(root, some_pairs(5), pairs_per_step=2, shuffle=False)
    loader._ahead.source = counting = Counting(loader._source)
    for epoch in (0, 7):
        assert [pair.id for batch in loader.steps(epoch) for pair in batch.pairs] == [f"p{k}" for k in range(5)]
    assert len(counting.submitted) == 10


def test_an_iteration_that_is_left_can_be_taken_up_again(root):
    with loader_of(root) as loader:
        whole = [facts(batch) for batch in loader.steps(0)]
        for batch in loader.steps(0):
            if batch.step == 1:
                break
        assert [facts(batch) for batch in loader.steps(0, 2)] == whole[2:]
        stale = loader.steps(0)
        next(stale)
        list(loader.steps(1))
        with pytest.raises(RuntimeError, match="another iteration"):
            next(stale)
        assert list(loader.steps(0, 4)) == []


def test_text_pairs_and_ready_frames(root):
    frames = torch.arange(2 * 64 * 96 * 3, dtype=torch.uint8).view(2, 64, 96, 3)
    pairs = some_pairs(2, p0={"video": None}, p1={"video": frames})
    for num_workers in (0, 1):
        with loader_of(root, pairs, num_workers=num_workers, shuffle=False) as loader:
            ((text, ready),) = [batch.pairs for batch in loader.steps(0)]
        assert text.sample.video is None
        assert torch.equal(ready.sample.video.tensors["frames"], frames)
        assert ready.sample.video.seconds_per_grid is None


def test_a_real_encoder_in_a_worker(root):
    encoder = PairEncoder.of(load_policy("tiny:qwen2_5_vl"))
    batches = []
    for num_workers in (0, 1):
        with loader_of(root, some_pairs(2), encoder, num_workers=num_workers) as loader:
            batches += loader.steps(0)
    for here, there in zip(batches[0].pairs, batches[1].pairs, strict=True):
        assert here.sample.prompt == there.sample.prompt and here.sample.responses == there.sample.responses
        for name, tensor in here.sample.video.arguments().items():
            torch.testing.assert_close(there.sample.video.argument(name), tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": []}, "no pairs"),
        ({"num_workers": -1}, "got -1 and 2"),
        ({"prefetch_steps": 0}, "got 0 and 0"),
        ({"pairs_per_step": 0}, "pairs_per_rank >= 1"),
        ({"rank": 1}, "rank=1 and world_size=1"),
        ({"backend": "opencv"}, "got 'opencv'"),
        ({"device": "cuda", "num_workers": 2}, "device='cuda' needs num_workers=0, got 2"),
        ({"deadline_s": 0}, "deadline_s must be positive, got 0"),
    ],
)
def test_bad_options_are_named(root, options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(root, **options)


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (0, -1), (0, 5)])
def test_a_position_must_exist(root, epoch, step):
    with pytest.raises(ValueError, match=f"0 <= start_step <= 4, got epoch={epoch} and start_step={step}"):
        loader_of(root).steps(epoch, step)


def test_a_closed_loader_says_so(root):
    loader = loader_of(root)
    loader.close()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        loader.steps(0)


@pytest.mark.heavy
def test_a_workers_memory_follows_from_the_frames_asked_for(tmp_path):
    """2 minutes held as RGB would be 690 MB."""
    peaks = []
    for num_frames in (60, 3000):
        name = write_clip(tmp_path / f"{num_frames}.mp4", codec="h264", num_frames=num_frames, keyframe_every=50).name
        with loader_of(tmp_path, [Pair("q", "a", "b", video=name)] * 3, num_workers=1, pairs_per_step=1) as loader:
            assert [len(batch.pairs) for batch in loader.steps(0)] == [1, 1, 1]
            status = Path(f"/proc/{loader.process_ids[0]}/status").read_text()
        peaks.append(int(status.split("VmHWM:")[1].split()[0]) / 1024)
    assert peaks[1] - peaks[0] < 50, peaks


def reader_of(root) -> PairReader:
    return PairReader(LightEncoder(), SAMPLING, root, "auto", torch.device("cpu"), 30.0)


def test_a_thread_reads_ahead_and_gives_what_reading_on_demand_gives(root):
    pairs = some_pairs(5, p3={"video": "text.mp4"})
    thread = ReadInThread(reader_of(root))
    try:
        ahead = [thread.submit(pair) for pair in pairs]
        wait(ahead, timeout=30)
        assert all(future.done() for future in ahead), "nobody has asked for a result"
        on_demand = ReadOnDemand(reader_of(root))
        for pair, future in zip(pairs, ahead, strict=True):
            expected = on_demand.submit(pair).result()
            if isinstance(expected, BadPair):
                assert future.result() == expected and pair.id == "p3"
            else:
                assert future.result().id == pair.id and shown(future.result()) == shown(expected)
    finally:
        thread.close()


def test_a_closed_thread_reads_nothing_more(root):
    begun, go_on = Event(), Event()

    def slow(pair):
        begun.set()
        go_on.wait(30)
        return pair

    slow.device = torch.device("cpu")
    thread = ReadInThread(slow)
    first, second = thread.submit("a"), thread.submit("b")
    assert begun.wait(30)
    Timer(0.05, go_on.set).start()
    thread.close()
    assert first.result() == "a" and second.cancelled()


def test_decoding_on_a_gpu_reads_in_a_thread(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    with loader_of(root, device="cuda") as loader:
        loader._source.submit(some_pairs()[0]).exception()  # there is no such device here; the thread has taken it
    assert taken == [torch.device("cuda", 3)], "a thread begins on device 0"
