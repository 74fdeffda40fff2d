"""The bytes of results that are read ahead stay within the limit, for any sizes and any order of arrival."""

import random
import weakref
from concurrent.futures import Future

import pytest
import torch

from synpo_fast.data.encoded import EncodedPair
from synpo_fast.data.encoding import BadPair
from synpo_fast.data.loader import PairLoader
from synpo_fast.data.pair import Pair
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.models.families.registry import VideoInputs
from synpo_fast.models.policy import Sample
from tests.data.chores import LightEncoder


def result_of(pair: Pair) -> EncodedPair:
    """A result with as many bytes as the pair's id ends with."""
    frames = torch.zeros(int(pair.id.split()[1]), dtype=torch.uint8)
    return EncodedPair(Sample((1,), ((2,), (3,)), VideoInputs({"frames": frames}, (7,), 7), pair.id), pair.id)


class Readers:
    """A source whose results arrive when and in the order the test says; it counts the bytes of those that still live."""

    def __init__(self, loader: PairLoader, seed: int) -> None:
        self.open: list[tuple[Pair, Future]] = []
        self.alive: dict[int, int] = {}
        self.reads: list[str] = []
        self.random = random.Random(seed)
        self.loader = loader
        loader._ahead.source = self

    def submit(self, pair: Pair) -> Future:
        future = _Waited(self)
        self.open.append((pair, future))
        self.reads.append(pair.id)
        return future

    def arrive(self) -> None:
        """One result, any of those that are being read."""
        pair, future = self.open.pop(self.random.randrange(len(self.open)))
        if not future.set_running_or_notify_cancel():
            return
        if pair.chosen == "bad":
            future.set_result(BadPair(pair.id, "no"))
            return
        result = result_of(pair)
        key, size = id(result), result.num_bytes
        self.alive[key] = size
        weakref.finalize(result, self.alive.pop, key)
        future.set_result(result)

    def close(self) -> None:
        pass


class _Waited(Future):
    """Whoever waits for it lets results arrive until it is there."""

    def __init__(self, readers: Readers) -> None:
        super().__init__()
        self.readers = readers

    def result(self, timeout=None):
        while not self.done():
            self.readers.arrive()
        return super().result(0)


def loader_of(sizes, *, prefetch_bytes, pairs_per_step=4, prefetch_steps=5, seed=0, **options):
    pairs = [Pair("q", "a", "b", id=f"p{k} {size}") for k, size in enumerate(sizes)]
    loader = PairLoader(
        pairs, LightEncoder(), sampling=FrameSampling(num_frames=1), pairs_per_step=pairs_per_step, num_workers=0,
        prefetch_steps=prefetch_steps, prefetch_bytes=prefetch_bytes, seed=1, **options,
    )  # fmt: skip
    return loader, Readers(loader, seed)


def sizes_of(kind: str, count: int) -> list[int]:
    numbers = random.Random(kind)
    return {
        "alike": [100] * count,
        "one in ten is large": [1000 if k % 10 == 9 else 50 for k in range(count)],
        "any": [numbers.randrange(500) for _ in range(count)],
        "text and video": [0 if k % 2 else 300 for k in range(count)],
        "growing": [20 * k for k in range(count)],
    }[kind]


@pytest.mark.parametrize("kind", ["alike", "one in ten is large", "any", "text and video", "growing"])
@pytest.mark.parametrize("bound", [0, 450, 900, 3000, 10**9])
def test_the_bytes_held_are_within_the_bound(kind, bound):
    """Counted in results that live, not in what the loader says; results arrive in three random orders."""
    sizes = sizes_of(kind, 40)
    for seed in range(3):
        loader, readers = loader_of(sizes, prefetch_bytes=bound, seed=seed)
        order = []
        for epoch in (0, 1):
            for batch in loader.steps(epoch):
                order += [pair.id for pair in batch.pairs]
                given = sum(pair.num_bytes for pair in batch.pairs)
                following = loader._ahead.steps[0].slots
                next_step = sum(int(slot.pair.id.split()[1]) for slot in following)
                assert all(slot.future is not None for slot in following), "the next step is read in any case"
                for _ in range(readers.random.randrange(30)):
                    if readers.open:
                        readers.arrive()
                    assert sum(readers.alive.values()) - given <= max(bound, next_step)
        expected, _ = loader_of(sizes, prefetch_bytes=10**9)
        assert order == [expected.pairs[k].id for epoch in (0, 1) for k in expected._order(epoch)]
        if bound == 10**9:
            assert loader._ahead.num_reread == 0
        assert len(readers.reads) - loader._ahead.num_reread <= 80 + 5 * 4


def test_as_much_is_read_ahead_as_fits():
    loader, readers = loader_of([100] * 40, prefetch_bytes=1000)
    steps = loader.steps(0)
    next(steps)
    while readers.open:
        readers.arrive()
    assert loader._ahead.held_bytes == 1000, "two and a half steps of 400"
    assert loader._ahead.num_reread == 0 and len(readers.reads) == 14
    next(steps)
    assert len(readers.reads) == 18, "what was taken makes room"


def test_the_bound_follows_what_pairs_are_now():
    """One large pair at the start does not slow the whole run."""
    loader, readers = loader_of([10] * 400, prefetch_bytes=1000, prefetch_steps=20, shuffle=False)
    loader.pairs[2] = Pair("q", "a", "b", id="p2 900")
    for batch in loader.steps(0):
        if batch.step in (1, 60):
            while readers.open:
                readers.arrive()
            slots = [slot for step in loader._ahead.steps for slot in step.slots]
            read = sum(slot.num_bytes is not None for slot in slots)
            assert read == (11 if batch.step == 1 else 80), (
                "100 bytes leave room for one of 900, and 800 are all 20 steps"
            )


def test_a_reader_that_is_lost_and_a_bad_pair_take_no_room():
    loader, readers = loader_of([100] * 12, prefetch_bytes=1000, shuffle=False)
    loader.pairs[5] = Pair("q", "bad", "b", id="p5 100")
    batches = list(loader.steps(0))
    assert [bad.id for batch in batches for bad in batch.bad] == ["p5 100"]
    assert sum(len(batch.pairs) for batch in batches) == 11 and not readers.alive.keys() - {
        id(pair) for batch in batches for pair in batch.pairs
    }


def test_what_is_dropped_is_not_read_again_and_not_kept():
    loader, readers = loader_of([100] * 40, prefetch_bytes=10**6)
    for batch in loader.steps(0):
        if batch.step == 2:
            break
    del batch
    reads = len(readers.reads)
    while readers.open:
        readers.arrive()
    assert len(readers.reads) == reads and not readers.alive


def test_the_bound_is_a_number_of_bytes():
    with pytest.raises(ValueError, match="prefetch_bytes may not be negative, got -1"):
        loader_of([1], prefetch_bytes=-1)
