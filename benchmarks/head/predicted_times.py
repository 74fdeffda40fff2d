"""Writes the table of predicted times of the Triton head. Nothing in it was measured.

    python benchmarks/head/predicted_times.py [--out FILE]

synpo_fast/ops/linear_logprobs/triton_time_model.py holds the model, its constants and their sources; tests/benchmarks checks
that the table is up to date.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

if __package__ in (None, ""):  # started by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.head.shapes import Shape, find_shapes
from synpo_fast.ops.linear_logprobs.triton_config import cut_forward, cut_weight_grad, kernel_config
from synpo_fast.ops.linear_logprobs.triton_time_model import (
    backward_products,
    backward_time,
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

- forward: log-probs and direction, 4NDV; all there is with a frozen head. blocks: number * rows x partial sums;
  strip: vocabulary columns at a time in these blocks; filled: tile slots of both products that hold a tile.
- head: the weight's gradient with recomputed logits, 4NDV.
- kept: forward and the weight's gradient where the exponentials of all rows fit 2 GiB, 6NDV; a block has all columns.
- x bare: predicted time over that of the two products alone at the model's rate ({rates}).
"""
HEADER = (
    "| GPU | D x V | N | blocks | strip | forward ms | TFLOP/s | x bare | filled "
    "| head strip | ms | x bare | filled | kept ms | x bare |\n" + "|---" * 15 + "|\n"
)


def row(name: str, shape: Shape, num_rows: int) -> str:
    config = kernel_config(torch.bfloat16, CHIPS[name])
    programs, rate = config.chip.multiprocessors, config.chip.operations * config.chip.multiprocessors
    head = (shape.D, shape.V, 2, config)
    operations = 4 * num_rows * shape.D * shape.V
    cuts, columns = cut_forward(num_rows, *head, programs), cut_weight_grad(num_rows, *head, programs)
    forward, backward = forward_time(cuts, *head, programs), backward_time(num_rows, *head, columns, programs)
    filled = occupancy(list(forward_products(cuts, *head, programs)), programs)
    filled_backward = occupancy(list(backward_products(num_rows, *head, columns)), programs)
    blocks = ", ".join(f"{count} * {cut.rows} x {cut.splits}" for cut, count in Counter(cuts).items())
    strips = ", ".join(str(cut.columns) for cut in Counter(cuts))
    cells: list[object] = [
        name, f"{shape.D} x {shape.V}", num_rows, blocks, strips, f"{1e3 * forward:.2f}",
        f"{operations / forward / 1e12:.0f}", f"{forward * rate / operations:.2f}", f"{filled:.1%}",
        columns, f"{1e3 * backward:.2f}", f"{backward * rate / operations:.2f}", f"{filled_backward:.1%}",
    ]  # fmt: skip
    if 2 * num_rows * shape.V <= KEPT_BYTES:
        kept = cut_forward(num_rows, *head, programs, num_rows)
        seconds = kept_time(kept, *head, programs)
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
