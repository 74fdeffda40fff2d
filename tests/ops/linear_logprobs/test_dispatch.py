"""The backend that a GPU gets by its dtype, torch's settings and its generation. No kernel runs here."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from synpo_fast.ops.linear_logprobs import backends, triton_support

pytest.importorskip("triton", reason="triton is not installed")
CUDA = torch.device("cuda", 0)


def on_gpu(dtype):
    """As much of a tensor on a GPU as dispatch looks at."""
    return SimpleNamespace(device=CUDA, dtype=dtype)


@pytest.fixture
def gpu_of(monkeypatch):
    """Gives this process a GPU of a compute capability."""

    def make(major, minor):
        monkeypatch.setattr(triton_support, "interpreting", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        triton_support.capability.cache_clear()
        backends._warn_once.cache_clear()

    yield make
    triton_support.capability.cache_clear()


SETTINGS = {
    "": False,
    "torch.backends.fp32_precision = 'tf32'": True,
    "torch.backends.fp32_precision = 'ieee'": False,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "torch.backends.cuda.matmul.allow_tf32 = False": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('highest')": False,
}
READ_SETTINGS = """
import torch
from synpo_fast.ops.linear_logprobs import triton_support
for setting in {settings!r}:
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
    exec(setting)
    print(triton_support.tf32_allowed())
"""


def test_every_setting_of_tf32_is_read():
    """In a process of its own: after the newer settings, torch refuses to read the older one."""
    code = READ_SETTINGS.format(settings=list(SETTINGS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(allowed) for allowed in SETTINGS.values()]


def test_fp32_on_a_gpu_goes_to_cublas_unless_tf32_is_allowed(gpu_of, monkeypatch):
    gpu_of(9, 0)
    for allowed, expected in ((False, "chunked"), (True, "triton")):
        monkeypatch.setattr(triton_support, "tf32_allowed", lambda allowed=allowed: allowed)
        assert backends.choose_backend(on_gpu(torch.float32), None) == expected
        assert backends.choose_backend(on_gpu(torch.float32), "triton") == "triton"
        for dtype in (torch.bfloat16, torch.float16):
            assert backends.choose_backend(on_gpu(dtype), None) == "triton"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_generations_before_ampere_fall_back_with_a_warning(gpu_of, dtype):
    gpu_of(7, 5)
    with pytest.warns(UserWarning, match=r"'chunked', not 'triton': .*capability 8\.0 or above, cuda:0 has 7\.5"):
        assert backends.choose_backend(on_gpu(dtype), None) == "chunked"
    with pytest.raises(ValueError, match=r"backend='triton' cannot be used here: .*8\.0 or above, cuda:0 has 7\.5"):
        backends.choose_backend(on_gpu(dtype), "triton")
    gpu_of(8, 0)
    assert backends.choose_backend(on_gpu(dtype), None) == "triton"
