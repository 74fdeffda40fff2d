"""The kernel that settles a row's reference, as a GPU would get it: no warp may read what another has already replaced."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[3]
COMPILE = """
import json, torch, triton
from benchmarks.head import compiled_code
from triton.backends.compiler import GPUTarget

found = {}
for launch in compiled_code.record_launches(256, 1000, 64, torch.bfloat16, 90):
    if launch.kernel.__name__ == "_settle_rows_kernel":
        source = compiled_code.source_of(launch)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
        found[str(launch.arguments)] = compiled.asm["ptx"]
print(json.dumps(found))
"""


def test_a_barrier_stands_between_reading_and_replacing_a_rows_reference():
    """With few tiles, the sum over them is one warp's own and brings no barrier of its own."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    assert kernels
    for arguments, ptx in kernels.items():
        stores = list(re.finditer(r"st\.global\.b32 \[ (%\w+) \+ 0 \]", ptx))[:2]
        assert len(stores) == 2, f"the sum and the reference of a row are stored first: {arguments}\n{ptx}"
        for store in stores:
            load = re.search(rf"ld\.global\.b32 \{{ %\w+ \}}, \[ {store[1]} \+ 0 \]", ptx)
            assert load is not None, f"what is replaced was read before: {arguments}\n{ptx}"
            assert "bar.sync" in ptx[load.end() : store.start()], f"no barrier in {arguments}\n{ptx}"
