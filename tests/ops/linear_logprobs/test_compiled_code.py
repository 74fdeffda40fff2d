"""The Triton kernels as a GPU would get them, compiled here for each generation and read back."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from synpo_fast.ops.linear_logprobs import triton_time_model

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[3]
INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
PRODUCTS = {
    "_exp_logits_forward_kernel",
    "_weighted_rows_kernel",
    "_logit_grads_backward_kernel",
    "_weight_grad_backward_kernel",
}


def compile_ahead(out: Path, *options: str) -> list[dict]:
    """Its own process: the one that runs the tests may have Triton in interpreter mode."""
    command = [sys.executable, str(ROOT / "benchmarks/head/compiled_code.py"), "--json", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module", params=sorted(INSTRUCTION))
def reports(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("compiled") / f"sm_{request.param}.json"
    return request.param, compile_ahead(out, "--arch", str(request.param))


def test_every_model_shape_is_there(reports):
    _, found = reports
    shapes = {shape for report in found for shape in report["shapes"]}
    assert shapes == {"3584x152064", "4096x128256", "2048x151936", "4096x32000"}
    assert {report["kernel"] for report in found} >= PRODUCTS


def test_products_use_the_generations_matrix_instructions(reports):
    arch, found = reports
    for report in found:
        if report["kernel"] in PRODUCTS:
            assert list(report["matrix_instructions"]) == [INSTRUCTION[arch]], report


def test_operands_come_by_the_copy_engine_from_hopper_on(reports):
    arch, found = reports
    for report in found:
        if report["kernel"] in PRODUCTS:
            assert report["copy_engine"] == (arch >= 90), report


def test_nothing_spills_and_shared_memory_fits(reports):
    _, found = reports
    for report in found:
        few_rows = (
            report["kernel"] == "_weighted_rows_kernel" and report["arch"] == 90 and report["spilled_bytes"] <= 24
        )
        assert report["spilled_bytes"] == 0 or few_rows, report  # 6 registers outside the loop, where sums are split
        assert report["registers"] > 0
        assert report["shared_bytes"] <= report["shared_limit"], report


EPILOGUES = {
    "_exp_logits_forward_kernel": triton_time_model.EXPONENTIALS,
    "_weighted_rows_kernel": triton_time_model.WEIGHTED,
    "_logit_grads_backward_kernel": triton_time_model.LOGIT_GRADS,
    "_weight_grad_backward_kernel": triton_time_model.WEIGHT_GRAD,
}


def test_epilogues_cost_what_the_model_of_time_assumes(reports):
    """Cycles per element of a wide tile at one instruction per cycle on each of four schedulers, in a kernel's plainest form."""
    arch, found = reports
    cycles: dict[str, float] = {}
    for report in found:
        if arch == 90 and report["kernel"] in PRODUCTS:
            rows, columns = (int(size) for size in re.findall(r"\d+", report["tile"])[:2])
            if rows * columns == 128 * 256:  # not the smaller tiles of softcap
                one = report["tile_instructions"] * report["num_warps"] / (4 * rows * columns)
                cycles[report["kernel"]] = min(one, cycles.get(report["kernel"], one))
    if arch == 90:
        assert cycles == pytest.approx(EPILOGUES, rel=0.3)


def test_tf32_uses_matrix_instructions_and_nothing_spills(tmp_path):
    """Full fp32 has no such instructions and its tiles spill, so cuBLAS gets it; test_dispatch.py checks that."""
    options = ["--arch", *map(str, INSTRUCTION), "--shapes", "3584x152064", "--dtype", "tf32", "--kernels", *PRODUCTS]
    products = compile_ahead(tmp_path / "tf32.json", *options)
    assert {(report["kernel"], report["arch"]) for report in products} == {
        (k, a) for k in PRODUCTS for a in INSTRUCTION
    }
    for report in products:
        assert list(report["matrix_instructions"]) == [INSTRUCTION[report["arch"]]], report
        assert report["spilled_bytes"] == 0, report
