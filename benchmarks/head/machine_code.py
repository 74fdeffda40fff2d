"""Reads the machine code of a compiled Triton kernel: registers, spilled bytes, matrix instructions, instructions of a tile."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

MATRIX_OPERATIONS = (
    "HMMA",
    "HGMMA",
    "UTCHMMA",
)  # bf16 and fp16 on Ampere, Hopper and Blackwell; tf32 has the same names


def _tool(name: str, cubin: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), *options, file.name], capture_output=True, text=True, check=True).stdout


def registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, of one thread.

    Read from the code that Triton made, because Triton gives its assembler options under which other values spill
    (--regAllocOptLevel=2 in 3.7.1).
    """
    found = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", cubin, "--dump-resource-usage"))
    assert found is not None
    return int(found[1]), int(found[2])


def matrix_instructions(ptx: str) -> dict[str, int]:
    kinds = {"mma.sync": r"\bmma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma"}
    return {name: count for name, pattern in kinds.items() if (count := len(re.findall(pattern, ptx)))}


def tile_instructions(cubin: bytes) -> int:
    """Instructions of one warp in the loop over tiles, without those of the loops of products inside; 0 without such loops."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in _tool("nvdisasm", cubin, "-c").splitlines():
        if found := re.match(r"\s*(\.L_\w+):", line):
            labels[found[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*);", line):
            jump = re.search(r"BRA.*`\((\.L_\w+)\)", found[1])
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(lines)))
            lines.append(found[1])
    products = [n for n, line in enumerate(lines) if re.search(rf"\b({'|'.join(MATRIX_OPERATIONS)})[. ]", line)]
    length = inner = 0
    covered: set[int] = set()
    for length, first in sorted((last - first, first) for first, last in loops):
        inside = {n for n in products if first <= n <= first + length}
        if inside and not inside & covered:  # the shortest loop around these instructions is a product's
            inner, covered = inner + length, covered | inside
    return max(0, length - inner) if covered else 0
