"""Batches of every length share their compiled kernels: Triton would compile again for a length of 1 or a multiple of 16."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[3]
# On the host: tensors without values have no address, and Triton compiles again for pointers off a 16-byte boundary.
COUNT = """
import collections, json, torch
from benchmarks.head import compiled_code

found = collections.defaultdict(set)
for softcap in (None, 30.0):
    for length in (1, 2, 3, 15, 16, 17, 48, 100, 257, 480, 511, 512, 1000, 1024, 2047, 2048, 2049, 4095, 4096, 4111, 5000, 8192):
        with compiled_code.recording(90) as launches:
            compiled_code.launch_linear_logprobs(64, 9000, length, torch.bfloat16, softcap, "cpu")
        for launch in launches:
            found[launch.kernel.__name__, softcap].add(compiled_code.specialisation(launch))
print(json.dumps([[name, softcap, sorted(keys)] for (name, softcap), keys in found.items()]))
"""
# Without and with: exponentials stored, statistics, a direction (in fp32), a target's entry, earlier sums, split sums, kept rows.
VARIANTS = {
    "_exp_logits_forward_kernel": 3, "_settle_rows_kernel": 3, "_weighted_rows_kernel": 4, "_finish_rows_kernel": 5,
    "_weight_grad_backward_kernel": 3, "_scale_rows_backward_kernel": 2,
}  # fmt: skip


def test_lengths_share_their_compiled_kernels():
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert {name for name, _, _ in counts} >= set(VARIANTS)
    for name, softcap, keys in counts:
        assert len(keys) <= VARIANTS.get(name, 1), (
            f"{name} with softcap {softcap} is compiled {len(keys)} times: {keys}"
        )
