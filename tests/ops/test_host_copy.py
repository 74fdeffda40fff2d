"""Several tensors packed into one buffer and unpacked again are unchanged, for any dtypes, shapes and sizes."""

import pytest
import torch

from synpo_fast.ops.host_copy import ALIGNMENT, packed, to_device, unpacked


def mixed():
    """Tensors with every remainder modulo the alignment, including empty ones and one that is not contiguous."""
    return {
        "flags": torch.tensor([True, False, True]),
        "ends": torch.arange(5, dtype=torch.int32),
        "none": torch.empty(0, dtype=torch.int64),
        ("row", 1): torch.arange(12).view(3, 4).t(),
        "weights": torch.randn(7, 3),
        "bytes": torch.arange(17, dtype=torch.uint8),
        "single": torch.tensor(3.5, dtype=torch.float64),
    }


def test_a_round_trip():
    tensors = mixed()
    buffer = packed(tensors)
    assert buffer.dtype == torch.uint8 and len(buffer) % ALIGNMENT == 0
    found = unpacked(buffer, tensors)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert found[name].untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr(), name


def test_one_copy_takes_them_over():
    """The meta device stands for any that is not the CPU."""
    copies = []

    class Copies(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                copies.append(kwargs)
            return func(*args, **(kwargs or {}))

    tensors = mixed()
    with Copies():
        found = to_device(tensors, torch.device("meta"))
    assert len(copies) == 1 and copies[0]["non_blocking"]
    for name, tensor in tensors.items():
        assert found[name].is_meta and (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)


def test_on_a_cpu_nothing_is_copied():
    tensors = mixed()
    found = to_device(tensors, torch.device("cpu"))
    assert all(found[name] is tensor for name, tensor in tensors.items())


def test_only_from_the_host():
    with pytest.raises(ValueError, match="b is on meta; only tensors on the host are sent"):
        to_device({"a": torch.ones(1), "b": torch.ones(1, device="meta")}, torch.device("cpu"))
    assert to_device({}, torch.device("meta")) == {}


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait():
    tensors = mixed()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = to_device(tensors, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for name, tensor in tensors.items():
        assert torch.equal(found[name].cpu(), tensor), name
