"""Compiles every Triton kernel of the package ahead of time, without a GPU, and reports the resources it uses.

    python benchmarks/head/compiled_code.py [--arch 80 90 100] [--shapes 3584x152064 ...] [--dtype tf32] [--json FILE]

The launch code runs on tensors without storage, so the kernels are compiled exactly as for a GPU: with the same tiles,
strides, divisibility and options. The table shows each kernel's registers, spilled bytes, shared memory and matrix instructions.
"""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if __package__ in (None, ""):  # started by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.head.machine_code import matrix_instructions, registers_and_spills, tile_instructions
from benchmarks.head.shapes import find_shapes
from synpo_fast.ops.linear_logprobs import triton_backward, triton_backward_kernels, triton_kernels, triton_launch
from synpo_fast.ops.linear_logprobs.problem import Wanted, make_problem
from synpo_fast.ops.video_patches import Packing
from synpo_fast.ops.video_patches import triton_kernels as video_kernels
from synpo_fast.ops.video_patches.triton_launch import video_patches_forward

MODEL_SHAPES = ("3584x152064", "4096x128256", "2048x151936", "4096x32000")
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block at most
POINTERS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass
class Report:
    """The resources of one compiled kernel.

    copy_engine: it uses the tensor memory accelerator (TMA). tile_instructions: instructions of a warp for one tile, without the
    loop of the product.
    """

    kernel: str
    arch: int
    shapes: list[str]
    tile: str
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix_instructions: dict[str, int]
    copy_engine: bool
    tile_instructions: int


@dataclass(frozen=True)
class Launch:
    """One recorded launch of a kernel: its arguments and compiler options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class _Recorder:
    """Replaces a kernel and records its launches instead of running them."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            options: dict[str, int] = {
                str(name): kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs
            }
            bound = inspect.signature(self.kernel.fn).bind(*args, **kwargs)
            self.launches.append(Launch(self.kernel, dict(bound.arguments), options))

        return launch


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Within it, the package's Triton launchers record their launches, as for a GPU of this compute capability."""
    launches: list[Launch] = []
    kernels = {
        (module, name): kernel
        for module in (triton_kernels, triton_backward_kernels, video_kernels)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }
    capability, programs = triton_launch.capability, triton_launch.num_programs
    try:
        for (module, name), kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, launches))
        triton_launch.capability = lambda device: arch  # type: ignore[assignment]
        triton_launch.num_programs = lambda device: MULTIPROCESSORS[arch]  # type: ignore[assignment]
        yield launches
    finally:
        triton_launch.capability, triton_launch.num_programs = capability, programs
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)


def launch_linear_logprobs(
    dim: int, vocabulary: int, num_rows: int, dtype: torch.dtype, softcap: float | None, device: str
) -> None:
    """Launches scoring without gradients and training steps with frozen and trainable head, with and without statistics."""
    hidden = torch.empty(num_rows, dim, dtype=dtype, device=device)
    weight = torch.empty(vocabulary, dim, dtype=dtype, device=device)
    labels = torch.empty(num_rows, dtype=torch.int64, device=device)
    problem = make_problem(
        hidden,
        weight,
        labels,
        bias=weight.new_empty(vocabulary) if softcap else None,
        rows=None,
        logit_scale=1.0,
        softcap=softcap,
        ignore_index=-100,
    )
    triton_launch.linear_logprobs_forward(problem, Wanted(direction=False))
    half = num_rows // 2
    for keep_rows, stats in ((0, False), (num_rows, False), (half, True)):
        computed = triton_launch.linear_logprobs_forward(
            problem, Wanted(True, keep_rows, stats=stats, logsumexp_grad=stats)
        )
        triton_backward.linear_logprobs_backward(problem, computed.logps, computed, (True, True, softcap is not None))


def record_launches(
    dim: int, vocabulary: int, num_rows: int, dtype: torch.dtype, arch: int, softcap: float | None = None
) -> list[Launch]:
    """Records all launches: those of launch_linear_logprobs, and the preparation of a video for the tower."""
    with recording(arch) as launches:
        launch_linear_logprobs(dim, vocabulary, num_rows, dtype, softcap, "meta")
        frames = torch.empty(15, 1080, 1920, 3, dtype=torch.uint8, device="meta")
        for kind in {dtype, torch.float32}:  # the families' processors return fp32
            video_patches_forward(frames, (448, 784), (0.5,) * 3, (0.5,) * 3, Packing(14, 2, 2), kind)
    return launches


def specialisation(launch: Launch) -> str:
    """A name for what Triton compiles: launches that share it share their machine code."""
    source = source_of(launch)
    return f"{launch.kernel.__name__} {source.signature} {source.constants} {source.attrs} {launch.options}"


def source_of(launch: Launch) -> ASTSource:
    """The kernel with the signature that Triton's launcher would derive from the arguments of this launch."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    divisible = [["tt.divisibility", 16]]
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{POINTERS[value.dtype]}"
            if special and value.data_ptr() % 16 == 0:
                attributes[(index,)] = divisible
        elif hasattr(value, "block_shape"):
            signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(index,)] = divisible
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, arch: int, shape: str) -> Report:
    source = source_of(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    ptx = compiled.asm["ptx"]
    products = matrix_instructions(ptx)
    registers, spilled = registers_and_spills(compiled.asm["cubin"])
    blocks = [f"{name.removeprefix('BLOCK_')}{value}" for name, value in launch.arguments.items() if "BLOCK" in name]
    return Report(
        kernel=launch.kernel.__name__,
        arch=arch,
        shapes=[shape],
        tile=" ".join(blocks),
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        shared_limit=SHARED_MEMORY[arch],
        matrix_instructions=products,
        copy_engine="cp.async.bulk.tensor" in ptx,
        tile_instructions=tile_instructions(compiled.asm["cubin"]) if products else 0,
    )


def compile_all(
    arch: int, shapes: list[str], num_rows: int, dtype: torch.dtype = torch.bfloat16, kernels: list[str] | None = None
) -> list[Report]:
    """One report for each specialisation, over many rows and few, with and without bias and softcap.

    Shapes that share a specialisation are listed in its report. kernels: names of those to compile; None means all.
    """
    reports: dict[str, Report] = {}
    for shape in shapes:
        dim, vocabulary = (int(size) for size in shape.split("x"))
        launches = [
            launch
            for softcap in (None, 30.0)
            for rows in (num_rows, 256)
            for launch in record_launches(dim, vocabulary, rows, dtype, arch, softcap)
            if kernels is None or launch.kernel.__name__ in kernels
        ]
        for launch in launches:
            key = specialisation(launch)
            if key not in reports:
                reports[key] = compile_launch(launch, arch, shape)
            elif shape not in reports[key].shapes:
                reports[key].shapes.append(shape)
    return list(reports.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_MEMORY), help="compute capabilities"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=list(MODEL_SHAPES),
        metavar="DxV",
        help="shapes of the head, as kernels.py takes them",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32", "tf32"])
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="names of the kernels to compile; default: all")
    parser.add_argument("--rows", type=int, default=4096, help="rows of hidden states")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    options = parser.parse_args()
    try:
        shapes = [f"{shape.D}x{shape.V}" for shape in find_shapes(options.shapes)]
    except ValueError as error:
        parser.error(str(error))
    if options.rows < 1:
        parser.error(f"--rows must be at least 1, not {options.rows}")
    if options.dtype == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    dtype = torch.float32 if options.dtype == "tf32" else getattr(torch, options.dtype)
    reports = [
        report for arch in options.arch for report in compile_all(arch, shapes, options.rows, dtype, options.kernels)
    ]
    print(f"{'kernel':34} {'arch':>4} {'tile':24} {'warps':>5} {'regs':>4} {'spill':>6} {'shared':>7}  matrix")
    for r in reports:
        matrix = ", ".join(f"{count} {name}" for name, count in r.matrix_instructions.items())
        print(
            f"{r.kernel:34} {r.arch:>4} {r.tile:24} {r.num_warps:>5} {r.registers:>4} {r.spilled_bytes:>6} "
            f"{r.shared_bytes:>7}  {matrix}{', TMA' if r.copy_engine else ''}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))


if __name__ == "__main__":
    main()
