"""The fake GPU raises where a real one would, and counts the waits that a real one would cause."""

import pytest
import torch

from tests.rehearsal.fake_gpu import fake_gpu

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/rehearsal runs on it"),
]


@pytest.fixture
def gpu():
    with fake_gpu() as machine:
        yield machine


def test_a_tensor_left_on_the_host_raises(gpu):
    on_device = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="on the same device"):
        on_device + torch.ones(3)
    with pytest.raises(RuntimeError):
        torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3, device="cuda"))


def test_the_host_keeps_its_values(gpu):
    assert torch.arange(5).cumsum(0).tolist() == [0, 1, 3, 6, 10]
    assert gpu.waits == []


WAITS = {
    "reads a value": lambda values: values.sum().item(),
    "fetches a tensor": lambda values: values.cpu(),
    "indexes by a mask": lambda values: values[values > 1],
    "indexes by a tensor of the host": lambda values: values[torch.tensor([0, 1])],
    "waits for a shape": lambda values: values.nonzero(),
    "waits for a copy": lambda values: torch.ones(3).to("cuda"),
    "copies from ordinary memory": lambda values: torch.ones(3).to("cuda", non_blocking=True),
}


@pytest.mark.parametrize("what", WAITS)
def test_waits_are_counted(gpu, what):
    values = torch.full((4,), 2.0, device="cuda")
    assert gpu.waits == []
    try:
        WAITS[what](values)
    except RuntimeError as error:  # a shape that depends on values is unknown here
        assert what in ("waits for a shape", "indexes by a mask"), error
    assert [wait.rpartition(": ")[2] for wait in gpu.waits] == [what]


def test_a_pinned_copy_that_is_not_waited_for_counts_nothing(gpu):
    pinned = torch.ones(3).pin_memory()
    pinned.to("cuda", non_blocking=True)
    buffer = torch.empty(8, dtype=torch.uint8, pin_memory=True)
    torch.zeros(8, dtype=torch.uint8, device="cuda").copy_(buffer, non_blocking=True)
    torch.full((), 3.0, device="cuda")
    assert gpu.waits == []
    pinned.to("cuda")
    assert len(gpu.waits) == 1


def kernel_of_nothing(pointer):
    pass


def test_a_kernel_given_a_tensor_of_the_host_raises(gpu):
    from triton.runtime.jit import JITFunction

    kernel = JITFunction(kernel_of_nothing)  # not by triton.jit, which without a GPU would have it interpreted
    kernel[(1,)](torch.ones(3, device="cuda"))
    with pytest.raises(
        ValueError, match=r"a tensor of the host, \(3,\), was given to the Triton kernel kernel_of_nothing"
    ):
        kernel[(1,)](torch.ones(3))
