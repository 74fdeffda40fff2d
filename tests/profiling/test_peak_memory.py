"""Peak extra memory of a call, against sizes that are known."""

import torch

from synpo_fast.profiling.peak_memory import peak_extra_memory

CPU = torch.device("cpu")


def test_peak_memory_sees_what_is_freed_inside():
    num_bytes = 32 * 2**20

    def call():
        first = torch.ones(num_bytes // 4)
        second = first + 1
        return second.sum()

    call()
    memory = peak_extra_memory(call, CPU)
    assert 2 * num_bytes <= memory["allocator"] < 2.1 * num_bytes
    assert memory["peak"] == max(count for view, count in memory.items() if view != "peak")
    assert memory["peak"] < 3 * num_bytes
