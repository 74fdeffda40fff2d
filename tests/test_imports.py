"""Importing the package loads nothing heavy but torch, and imports inside it go only from higher to lower layers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "synpo_fast"
HEAVY = (
    "triton", "deepspeed", "nvidia.dali", "transformers", "matplotlib", "peft", "trl", "liger_kernel", "numpy.testing",
    "av", "datasets", "tensorboard",
)  # fmt: skip
# The folders and modules of synpo_fast/, from the lowest layer to the highest. A module imports only its own folder and lower
# layers, nothing else of its own layer: data and models do not import each other, nor do report and profiling.
LAYERS: list[set[str]] = [
    {"errors"},
    {"terminal", "testing"},
    {"ops"},
    {"losses"},
    {"fused", "config"},
    {"data", "models"},
    {"references", "scoring", "pair_logprobs", "pair_sums", "run_folder", "integrations", "pairs"},
    {"training"},
    {"report", "profiling"},
    {"train", "demo"},
    {"cli", "__init__"},
]
# Further imports that DESIGN.md forbids: pairs does not need the trainer's options, for one.
FORBIDDEN = {
    "losses": {"terminal"},
    "fused": {"terminal", "errors"},
    "integrations": {"config", "terminal", "data"},
    "references": {"config", "data"},
    "scoring": {"config", "terminal"},
    "pair_logprobs": {"config", "terminal"},
    "pair_sums": {"config", "terminal"},
    "data": {"config", "losses", "fused"},
    "models": {"config", "losses", "fused", "terminal"},
    "pairs": {"config", "losses", "fused"},
}
# Each of these is slow to load or needs an extra, so only one file imports it.
OWNERS = {
    "deepspeed": {"training/engine.py"},
    "peft": {"models/lora.py"},
    "nvidia": {"data/video/decode_dali.py"},
    "matplotlib": set(),  # the report draws its own charts
}
MOST_FILES = 20


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import synpo_fast;"
        "print([m for m in sorted(set(sys.modules) - before)])"
    )
    loaded = ast.literal_eval(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT))
    assert "synpo_fast" in loaded
    assert not [name for name in loaded if name.split(".")[0] in HEAVY or name in HEAVY]


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: relative import; write the whole name")
    return names


def layer_of(name: str) -> int:
    found = [index for index, layer in enumerate(LAYERS) if name in layer]
    assert len(found) == 1, f"synpo_fast/{name} is in {len(found)} layers of LAYERS: put it in one"
    return found[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_import_runs_upward(path):
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    imported = imported_modules(path)
    for name in imported:
        if not name.startswith("synpo_fast."):
            continue
        other = name.split(".")[1]
        if other != own:
            assert layer_of(other) < layer_of(own), f"{relative} imports {name}, which is in a higher layer or its own"
            assert other not in FORBIDDEN.get(own, ()), f"{relative} imports {name}"
    for package, owners in OWNERS.items():
        if any(name.split(".")[0] == package for name in imported):
            assert str(relative) in owners, f"{relative} imports {package}, which only {owners} may import"


@pytest.mark.parametrize("place", ["synpo_fast", "benchmarks", "tests", "examples", "docs"])
def test_no_folder_holds_too_many_files(place):
    for folder in [ROOT / place, *(ROOT / place).rglob("*/")]:
        count = len(list(folder.glob("*.py")))
        assert count <= MOST_FILES, f"{folder.relative_to(ROOT)} holds {count} Python files"


def test_the_training_folder_stays_one_story():
    num_lines = sum(len(path.read_text().splitlines()) for path in (PACKAGE / "training").glob("*.py"))
    assert num_lines < 3000


def test_no_module_shadows_the_standard_library():
    """`deepspeed synpo_fast/train.py` puts synpo_fast/ first on sys.path, so a module there would hide one of the library."""
    shadows = [p.name for p in PACKAGE.iterdir() if p.name.removesuffix(".py") in sys.stdlib_module_names]
    assert not shadows
