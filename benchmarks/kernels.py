"""Measures token log-probs from hidden states and an LM head, forward and backward: every fused head beside the bare GEMMs.

    python benchmarks/kernels.py                                     a small case on a CPU, model shapes on a GPU
    python benchmarks/kernels.py --shapes qwen2.5-7b 1024x50000 --valid_rows 4096 --valid 0.25 1 --head frozen trainable
    python benchmarks/kernels.py --head trainable --mode no_grad --shapes 576x49152 --valid_rows 256 --dtype bf16
    python benchmarks/kernels.py --pairs                             whole SimPO losses on pairs: Liger's and ours

All contestants compute the same: log-probs of the labels that are not ignored, then (mode train) the gradients for one
fixed upstream gradient. README.md beside this file describes each of them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # started by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import (
    environment,
    format_bytes,
    format_error,
    format_seconds,
    format_table,
    gpu_state,
    write_json,
)
from benchmarks.contest import Options, run_contest
from benchmarks.head.problem import DTYPES, Inputs, errors, fp64_truth, make_inputs, why_wrong
from benchmarks.head.providers import DEFAULT, FLOOR, OURS, PROVIDERS, Provider, computes
from benchmarks.head.providers.torch_only import eager_valid_rows
from benchmarks.head.shapes import GROUPS, SHAPES, Shape, find_shapes

# fp64 is slow on a CPU; a GPU can check more rows.
TRUTH_ROWS = {"cpu": 512, "cuda": 2048}


@dataclass(frozen=True)
class Problem:
    shape: Shape
    num_rows: int
    valid: float
    dtype: str


def run_problem(
    problem: Problem, heads: Sequence[str], modes: Sequence[str], providers: dict[str, Provider], options: Options
) -> Iterator[dict[str, Any]]:
    """Yields the cases of one problem as JSON records. Tensors and truth are made once for all of them."""
    inputs = make_inputs(
        problem.shape,
        num_rows=problem.num_rows,
        valid=problem.valid,
        dtype=DTYPES[problem.dtype],
        device=options.device,
        seed=options.seed,
    )
    with_weight = "trainable" in heads and "train" in modes
    truth = fp64_truth(inputs, num_rows=TRUTH_ROWS[options.device.type], with_weight=with_weight)
    for mode in modes:
        # Without gradients a frozen and a trainable head are the same case.
        for head in heads if mode == "train" else heads[:1]:
            case = inputs.case(head=head, mode=mode)
            baseline = eager_valid_rows(case).run()
            eager = errors(baseline, truth, case)
            del baseline

            def judge(
                result: Any, case: Inputs = case, eager: dict[str, float] = eager
            ) -> tuple[dict[str, float], str | None]:
                found = errors(result, truth, case)
                return found, why_wrong(found, eager, case.hidden.dtype)

            rows = run_contest(
                {name: partial(make, case) for name, make in providers.items()}, judge, floor=FLOOR, options=options
            )
            for row in rows:
                if row["name"] in PROVIDERS:
                    row["computes"] = asdict(computes(row["name"], options.device.type))
            torch.compiler.reset()  # otherwise later cases reach the recompile limit
            yield {
                "shape": problem.shape.name,
                "D": problem.shape.D,
                "V": problem.shape.V,
                "N": problem.num_rows,
                "valid": problem.valid,
                "valid_rows": len(case.valid),
                "head": head,
                "mode": mode,
                "dtype": problem.dtype,
                "cold_l2": options.cold_l2,
                "rows": rows,
            }


def case_title(case: dict[str, Any]) -> str:
    work = "forward only" if case["mode"] == "no_grad" else f"forward + backward, {case['head']} head"
    return (
        f"{case['shape']} (D={case['D']}, V={case['V']}), {case['valid_rows']} of {case['N']} rows valid, "
        f"{work}, {case['dtype']}{', cold L2' if case['cold_l2'] else ''}"
    )


def case_table(case: dict[str, Any]) -> str:
    errors_shown = [name for name in ("log_probs", "grad_hidden", "grad_weight") if _any_error(case, name)]
    header = ["provider", "median", "(low - high)", "x floor", "peak extra"]
    header += [f"err {name}" for name in errors_shown] + ["setting"]
    lines = []
    for row in case["rows"]:
        cells = [row["name"], "-", "", "-", "-"]
        note = row["setting"]
        if row["skipped"] is not None:
            note = row["skipped"]
        else:
            seconds = row["seconds"]
            cells[1] = format_seconds(seconds["median"])
            cells[2] = f"({format_seconds(seconds['low'])} - {format_seconds(seconds['high'])})"
            cells[3] = f"{row['ratio_to_floor']:.2f}" if row["ratio_to_floor"] is not None else "-"
            if row["peak_extra_bytes"] is not None:
                cells[4] = format_bytes(row["peak_extra_bytes"])
        lines.append([*cells, *(format_error(row["error"].get(name)) for name in errors_shown), note])
    return f"{case_title(case)}\n{format_table(header, lines)}\n"


def _any_error(case: dict[str, Any], name: str) -> bool:
    return any(name in row["error"] for row in case["rows"])


def faulty_of_ours(cases: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each of our own contestants that was wrong or crashed."""
    return [
        f"{row['name']} on {case_title(case)}: {row['skipped']}"
        for case in cases
        for row in case["rows"]
        if row["faulty"] and row["name"] in OURS
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"a name, a group or DxV; names: {', '.join(SHAPES)}; groups: {', '.join(GROUPS)}"
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help=names)
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--rows", nargs="+", type=int, metavar="N", help="total number of rows, ignored ones included")
    rows.add_argument(
        "--valid_rows", nargs="+", type=int, metavar="N", help="valid rows; the total follows from --valid"
    )
    parser.add_argument("--valid", nargs="+", type=float, metavar="SHARE", help="share of valid rows, in (0, 1]")
    parser.add_argument(
        "--head", nargs="+", choices=["frozen", "trainable"], help="trainable: gradients to the head, too"
    )
    parser.add_argument(
        "--mode", nargs="+", choices=["train", "no_grad"], default=["train"], help="no_grad: forward only"
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="dtype of hidden states and head")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), metavar="NAME", help=", ".join(PROVIDERS))
    parser.add_argument(
        "--without", nargs="*", choices=list(PROVIDERS), default=[], metavar="NAME", help="leave out these providers"
    )
    parser.add_argument("--rounds", type=int, metavar="K", help="timed rounds of a case (CPU: 5, GPU: 15)")
    parser.add_argument(
        "--budget", type=float, default=60.0, metavar="SECONDS", help="end the rounds after this, not before the third"
    )
    parser.add_argument(
        "--time_limit", type=float, default=float("inf"), metavar="SECONDS", help="measure no further inputs after this"
    )
    parser.add_argument("--cold_l2", action="store_true", help="write over the GPU's L2 cache before every call")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", metavar="DIR", help="write pictures of the cases (needs matplotlib)")
    parser.add_argument(
        "--plot_kind", choices=["cases", "overview"], default="cases", help="a picture per case, or per shape"
    )
    parser.add_argument(
        "--pairs", action="store_true", help="compare whole SimPO losses on pairs, in place of the head alone"
    )
    args = parser.parse_args(argv)

    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = args.device.type == "cuda"
    args.shapes = args.shapes or (["headline"] if gpu else ["cpu-small"])
    args.valid = args.valid or [0.25]
    args.head = args.head or ["frozen", "trainable"]
    args.dtype = args.dtype or (["bf16"] if gpu else ["bf16", "fp32"])
    args.rounds = args.rounds or (15 if gpu else 5)
    if args.rows is None and args.valid_rows is None:
        args.rows = [16384] if gpu else [2048]
    if gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.cold_l2 and not gpu:
        parser.error("--cold_l2 needs a GPU")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    for share in args.valid:
        if not 0 < share <= 1:
            parser.error(f"--valid takes shares in (0, 1], not {share}")
    for count in args.rows or args.valid_rows:
        if count < 1:
            parser.error(f"--rows and --valid_rows take counts of at least 1, not {count}")
    try:
        args.shapes = find_shapes(args.shapes)
    except ValueError as error:
        parser.error(str(error))
    return args


def problems(args: argparse.Namespace) -> list[Problem]:
    """All combinations of the options. Row counts vary slowest, so that a run that --time_limit ends has measured every shape."""
    return [
        Problem(shape, count if args.rows else round(count / share), share, dtype)
        for count in args.rows or args.valid_rows
        for share in args.valid
        for shape in args.shapes
        for dtype in args.dtype
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, writes JSON and pictures. Returns 1 if one of our own contestants was wrong or crashed."""
    args = parse(argv)
    options = Options(args.device, args.rounds, args.budget, args.cold_l2, args.seed)
    record: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/kernels.py", *(sys.argv[1:] if argv is None else argv)]),
        "environment": environment(args.device),
        "cases": [],
        "left_out": [],
    }
    load, cores = record["environment"].get("load_average", [0.0])[0], record["environment"]["cores"]
    if args.device.type == "cpu" and load > 0.5 * cores:
        print(f"the machine is busy (load {load:.1f} on {cores} cores): even the ratios may be off\n", file=sys.stderr)
    if args.pairs:
        from benchmarks.head.pairs import compare_pairs, pairs_table

        record["pairs"] = [compare_pairs(options, dtype=dtype) for dtype in args.dtype]
        for comparison in record["pairs"]:
            print(pairs_table(comparison), flush=True)
    else:
        names = args.providers or DEFAULT[args.device.type]
        providers = {name: PROVIDERS[name] for name in names if name not in args.without}
        start = time.perf_counter()
        for problem in problems(args):
            if time.perf_counter() - start > args.time_limit:
                record["left_out"].append(asdict(problem))
                print(f"left out by --time_limit: {problem}", flush=True)
                continue
            for case in run_problem(problem, args.head, args.mode, providers, options):
                print(case_table(case), flush=True)
                record["cases"].append(case)
                if args.json:  # after every case, so that an interrupted run keeps its results
                    write_json(args.json, record)
    if args.device.type == "cuda":
        record["environment"]["gpu"]["after"] = gpu_state()
    if args.json:
        write_json(args.json, record)
    if args.plot and record["cases"]:
        from benchmarks.head.plot import plot

        for path in plot(record, Path(args.plot), args.plot_kind):
            print(f"wrote {path}")
    faults = faulty_of_ours(record["cases"])
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
