"""Which attention runs: by device, type of the weights and compute capability, said in the policy's notes."""

import pytest
import torch

from synpo_fast.models import attention, load_policy
from synpo_fast.models.attention import SEGMENTS, VARLEN, choose

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of the given compute capability, as far as torch is asked for it."""

    def of(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return of


@pytest.mark.parametrize(
    ("capability", "dtype", "expected", "reason"),
    [
        ((9, 0), torch.bfloat16, VARLEN, "the fastest here"),
        ((8, 0), torch.float16, VARLEN, "the fastest here"),
        ((9, 0), torch.float32, SEGMENTS, "because synpo_fast_varlen supports bfloat16 and float16 only, got float32"),
        ((7, 5), torch.float16, SEGMENTS, "needs a GPU of compute capability 8.0 or above, got 7.5"),
    ],
)
def test_auto_on_a_gpu(gpu, capability, dtype, expected, reason):
    gpu(capability)
    found, why = choose("auto", GPU, dtype)
    assert found == expected and why.startswith(f"{expected}, ") and reason in why


def test_auto_on_a_cpu_asks_no_gpu(monkeypatch):
    monkeypatch.delattr(torch.cuda, "get_device_capability")
    assert choose("auto", CPU, torch.bfloat16)[0] == SEGMENTS


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "message"),
    [
        (GPU, (9, 0), torch.float32, r"supports bfloat16 and float16 only, got float32 \(bf16=true .*take auto, or"),
        (GPU, (7, 0), torch.float16, r"compute capability 8\.0 or above, got 7\.0; take auto"),
        (CPU, (0, 0), torch.bfloat16, "needs a CUDA device, got cpu; take auto"),
    ],
)
def test_varlen_where_it_cannot_run_is_refused_with_the_way_out(gpu, device, capability, dtype, message):
    gpu(capability)
    with pytest.raises(ValueError, match=message):
        choose(VARLEN, device, dtype)


@pytest.mark.parametrize("wanted", ["sdpa", "eager", SEGMENTS])
def test_what_is_asked_for_is_taken_for_any_type(gpu, wanted):
    gpu((7, 0))
    for device, dtype in ((GPU, torch.float32), (GPU, torch.bfloat16), (CPU, torch.float32)):
        assert choose(wanted, device, dtype)[0] == wanted


def test_the_package_is_named(gpu, monkeypatch):
    gpu((9, 0))
    for spec, package in ((None, "by torch"), (object(), "by flash-attn")):
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert package in choose("auto", GPU, torch.bfloat16)[1]


def test_a_policy_says_what_it_runs():
    policy = load_policy("tiny:text", device="cpu")
    assert policy.attn_implementation == policy.base.config._attn_implementation == SEGMENTS
    assert policy.notes == [f"attention: {SEGMENTS}, because {VARLEN} needs a CUDA device, got cpu"]
