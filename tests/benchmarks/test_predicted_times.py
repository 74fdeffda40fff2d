"""The published predictions are those of the model as it stands, and say that they are predictions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.head.check_predictions import KERNELS, comparison, predicted_times
from benchmarks.head.predicted_times import TABLE, table
from benchmarks.head.shapes import Shape
from synpo_fast.ops.linear_logprobs.triton_config import cut_forward, cut_weight_grad, kernel_config
from synpo_fast.ops.linear_logprobs.triton_time_model import backward_time, forward_time

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape("small", 2048, 32000)


def test_the_table_is_up_to_date():
    assert TABLE.read_text() == table(), "run python benchmarks/head/predicted_times.py"


def test_the_table_says_that_nothing_was_measured():
    assert "**Predictions, not measurements.**" in TABLE.read_text()


def test_predictions_of_single_kernels_add_up_to_almost_the_whole_prediction():
    """The forward also launches kernels that handle single rows, which take little."""
    config = kernel_config(torch.bfloat16, 90)
    times = predicted_times(SHAPE, 4096, config, 132)
    head = (SHAPE.D, SHAPE.V, 2, config)
    forward = forward_time(cut_forward(4096, *head, 132), *head, 132)
    assert 0.95 * forward < times[KERNELS["exponentials"]] + times[KERNELS["weighted"]] < forward
    backward = backward_time(4096, *head, cut_weight_grad(4096, *head, 132), 132)
    assert times[KERNELS["logit_grads"]] + times[KERNELS["weight_grad"]] == pytest.approx(backward)


def test_the_kernels_compared_with_a_gpu_exist_and_each_needs_a_measured_time():
    folder = ROOT / "synpo_fast/ops/linear_logprobs"
    source = "".join(path.read_text() for path in folder.glob("triton_*kernels.py"))
    assert set(KERNELS.values()) <= set(re.findall(r"def (\w+)", source))
    predicted = dict.fromkeys(KERNELS.values(), 0.002)
    lines = comparison(SHAPE, 1000, predicted, dict.fromkeys(KERNELS.values(), 0.001))
    assert len(lines) == 4 and lines[0].split()[-4:] == ["2.000", "1.000", "0.50", "131"]
    with pytest.raises(ValueError, match="has no measured time; measured were: gemm"):
        comparison(SHAPE, 1000, predicted, {"gemm": 0.001})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_comparison_says_where_the_predictions_are():
    script = ROOT / "benchmarks/head/check_predictions.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 2 and "this needs a GPU; the predictions alone are in" in done.stderr.splitlines()[-1]
