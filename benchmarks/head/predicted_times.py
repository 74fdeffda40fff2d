"""Writes the table of predicted times of the Triton head. Nothing in it was measured.

    python benchmarks/head/predicted_times.py [--out FILE]

synpo_fast/ops/linear_logprobs/triton_time_model.py holds the model, its constants and their sources; tests/benchmarks checks
that the table is up to date.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

if __package__ in (None, ""):  # started by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.head.shapes import Shape, find_shapes
from synpo_fast.ops.linear_logprobs.triton_config import cut_forward, cut_weight_grad, kernel_config
from synpo_fast.ops.linear_logprobs.triton_time_model import (
    backward_products,
    backward_time,
    ceil_div,
    forward_products,
    forward_time,
    kept_time,
    occupancy,
)

TABLE = Path(__file__).resolve().parents[1] / "results/predicted/triton_head.md"
CHIPS = {"H200": 90, "B200": 100}
KEPT_BYTES = 2 * 2**30  # the default of keep_bytes on a GPU
ROWS = (512, 1024, 2048, 4096, 8192, 16384)
INTRODUCTION = """\
# Predicted times of the Triton head

**Predictions, not measurements.** Made by `python benchmarks/head/predicted_times.py` from the model in
`synpo_fast/ops/linear_logprobs/triton_time_model.py`, which names the source of every constant. bf16, all rows valid, no softcap.

- forward: log-probs and direction, 4NDV; all there is with a frozen head. rows x sums: rows of a block, and partial sums;
  strip: vocabulary columns at a time; filled: tile slots of both products that hold a tile.
- head: the weight's gradient with recomputed logits, 4NDV.
- kept: forward and the weight's gradient where the exponentials of all rows fit 2 GiB, 6NDV; a block has all columns.
- x bare: predicted time over that of the two products alone at the model's rate ({rates}).
"""
HEADER = (
    "| GPU | D x V | N | rows x sums | strip | forward ms | TFLOP/s | x bare | filled | head strip | ms | x bare | filled "
    "| kept ms | x bare |\n" + "|---" * 15 + "|\n"
)


def row(name: str, shape: Shape, num_rows: int) -> str:
    config = kernel_config(torch.bfloat16, CHIPS[name])
    programs, rate = config.chip.multiprocessors, config.chip.operations * config.chip.multiprocessors
    problem = (num_rows, shape.D, shape.V, 2, config)
    operations = 4 * num_rows * shape.D * shape.V
    cut, columns = cut_forward(*problem, programs), cut_weight_grad(*problem, programs)
    forward, backward = forward_time(*problem, cut, programs), backward_time(*problem, columns, programs)
    filled = occupancy(list(forward_products(*problem, cut, programs)), programs)
    filled_backward = occupancy(list(backward_products(*problem, columns)), programs)
    cells: list[object] = [
        name, f"{shape.D} x {shape.V}", num_rows, f"{cut.rows} x {cut.splits}", cut.columns, f"{1e3 * forward:.2f}",
        f"{operations / forward / 1e12:.0f}", f"{forward * rate / operations:.2f}", f"{filled:.1%}",
        columns, f"{1e3 * backward:.2f}", f"{backward * rate / operations:.2f}", f"{filled_backward:.1%}",
    ]  # fmt: skip
    if 2 * num_rows * shape.V <= KEPT_BYTES:
        whole = ceil_div(shape.V, config.logits.columns) * config.logits.columns
        seconds = kept_time(*problem, replace(cut, columns=whole), programs)
        cells += [f"{1e3 * seconds:.2f}", f"{seconds * rate / (1.5 * operations):.2f}"]
    else:
        cells += ["", ""]
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def table() -> str:
    chips = {name: kernel_config(torch.bfloat16, arch).chip for name, arch in CHIPS.items()}
    rates = ", ".join(
        f"{name} {chip.operations * chip.multiprocessors / 1e12:.0f} TFLOP/s" for name, chip in chips.items()
    )
    rows = [row(name, shape, n) for name in CHIPS for shape in find_shapes(["headline"]) for n in ROWS]
    return INTRODUCTION.format(rates=rates) + "\n" + HEADER + "".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE, help="file to write; default: the published table")
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table())
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
