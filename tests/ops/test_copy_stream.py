"""CopyStream: copies start from pinned memory on another stream, and only the compute stream waits for them."""

import copy
from contextlib import contextmanager

import pytest
import torch

from synpo_fast.data.pair import Pair
from synpo_fast.models import load_policy
from synpo_fast.ops.copy_stream import CopyStream
from synpo_fast.scoring import encode_pairs


class FakeStream:
    def __init__(self, streams, name):
        self.streams, self.name = streams, name

    def record_event(self):
        self.streams.calls.append(("event on", self.name))
        return f"event {len(self.streams.calls)}"

    def wait_event(self, event):
        self.streams.calls.append((self.name, "waits for", event))


class FakeStreams:
    """Records the calls. The device is the meta device, where a copy has no values to check."""

    def __init__(self):
        self.calls, self.current = [], FakeStream(self, "computing")

    def new_stream(self, device):
        return FakeStream(self, "copying")

    def current_stream(self, device):
        return self.current

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def pinned(self, tensor):
        self.calls.append(("pinned", tensor.numel()))
        return Pinned(self, tensor)

    def record_stream(self, tensor, stream):
        self.calls.append(("memory used by", stream.name, tensor.numel()))


class Pinned:
    def __init__(self, streams, tensor):
        self.streams, self.tensor = streams, tensor

    def to(self, device, *, non_blocking):
        self.streams.calls.append(("copy on", self.streams.current.name, non_blocking))
        return self.tensor.to(device)


def frames(size):
    return torch.zeros(size, dtype=torch.uint8)


def test_a_copy_is_begun_beside_and_waited_for_on_the_device():
    streams = FakeStreams()
    copies = CopyStream(torch.device("meta"), streams)
    tensor = frames(5)
    copies.begin([tensor])
    assert streams.calls == [("pinned", 5), ("copy on", "copying", True), ("event on", "copying")]
    taken = copies.take(tensor)
    assert taken.device.type == "meta" and taken.shape == tensor.shape
    assert streams.calls[3:] == [("computing", "waits for", "event 3"), ("memory used by", "computing", 5)]


def test_what_was_not_begun_is_copied_when_it_is_taken():
    streams = FakeStreams()
    copies = CopyStream(torch.device("meta"), streams)
    copies.take(frames(4))
    assert [call[0] for call in streams.calls] == ["pinned", "copy on", "event on", "computing", "memory used by"]


def test_each_tensor_is_copied_once_and_what_nobody_takes_is_let_go():
    streams = FakeStreams()
    copies = CopyStream(torch.device("meta"), streams)
    first, second, third = frames(1), frames(2), frames(3)
    copies.begin([first, second, second])
    copies.begin([second, third])
    assert [call[1] for call in streams.calls if call[0] == "pinned"] == [1, 2, 3]
    assert len(copies._begun) == 2
    copies.take(second), copies.take(third), copies.take(first)
    assert [call[1] for call in streams.calls if call[0] == "pinned"] == [1, 2, 3, 1] and not copies._begun


def test_what_is_on_a_device_stays_there():
    streams = FakeStreams()
    copies = CopyStream(torch.device("meta"), streams)
    there = torch.zeros(3, device="meta")
    copies.begin([there])
    assert copies.take(there) is there and not streams.calls


def test_a_copied_policy_has_a_stream_of_its_own():
    copies = CopyStream(torch.device("meta"), FakeStreams())
    copies.begin([frames(2)])
    other = copy.deepcopy(copies)
    assert other._stream is not copies._stream and not other._begun


def samples_of(policy, count):
    pairs = [
        Pair("q", "a", "b", video=torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8), id=str(k))
        for k in range(count)
    ]
    return encode_pairs(policy, pairs).samples


def test_a_policy_takes_its_frames_through_the_stream():
    """The device is the CPU here: the vision tower must get the tensor that the stream returns."""
    policy = load_policy("tiny:qwen2_5_vl")
    samples = samples_of(policy, 2)
    expected = [features.features for features in policy.encode_videos(samples)]
    streams = FakeStreams()
    policy._copies = CopyStream(torch.device("cpu"), streams)
    policy.begin_copies(samples)
    begun = len(streams.calls)
    found = policy.encode_videos(samples)
    assert [call[0] for call in streams.calls[:begun]].count("pinned") == 2
    assert [call[0] for call in streams.calls[begun:]] == ["computing", "memory used by"] * 2
    for features, wanted in zip(found, expected, strict=True):
        assert torch.equal(features.features, wanted)
    policy.begin_copies([])
    assert not policy.copies._begun


@pytest.mark.gpu
def test_copies_hold_the_bytes_while_the_gpu_computes():
    copies = CopyStream(torch.device("cuda"))
    tensors = [torch.randint(0, 256, (8_000_000,), dtype=torch.uint8) for _ in range(8)]
    weight = torch.randn(4096, 4096, device="cuda")
    copies.begin(tensors)
    for tensor in tensors:
        weight = weight @ weight / 64
        taken = copies.take(tensor)
        total = taken.long().sum()
        del taken  # its memory may be given away only after the sum
        other = torch.full((8_000_000,), 7, dtype=torch.uint8, device="cuda")
        assert total.item() == tensor.long().sum().item() and other[0] == 7
