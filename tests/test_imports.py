"""Importing the package needs torch alone, and imports inside it go one way."""

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
# What a layer may import of the others. Modules in no layer (cli, train, demo) may import anything.
EVERYWHERE = {"errors"}  # a class or two, in reach of every layer
MAY_IMPORT = {
    "ops": {"ops"},
    "losses": {"losses", "ops"},
    "fused": {"ops", "losses"},
    "models": {"models", "ops", "data"},  # of data only what a pair is
    "data": {"data", "ops", "models", "printable"},
    "references": {"references", "models", "ops"},
    "training": {"training", "references", "losses", "data", "models", "ops", "printable"},
    "integrations": {"integrations", "fused", "losses", "ops", "models"},
}
OWNERS = {
    "deepspeed": {"training/engine.py"},
    "peft": {"models/lora.py"},
    "nvidia": {"data/video/decode_dali.py"},
    "matplotlib": set(),  # the report draws its own charts
}


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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    relative = path.relative_to(PACKAGE)
    layer = relative.parts[0].removesuffix(".py")
    imported = imported_modules(path)
    if layer in MAY_IMPORT:
        for name in imported:
            if name.startswith("synpo_fast."):
                assert name.split(".")[1] in MAY_IMPORT[layer] | EVERYWHERE, f"{relative} imports {name}"
    for package, owners in OWNERS.items():
        if any(name.split(".")[0] == package for name in imported):
            assert str(relative) in owners, f"{relative} imports {package}, which belongs to {owners}"


def test_no_module_shadows_the_standard_library():
    """`deepspeed synpo_fast/train.py` puts this folder first on sys.path."""
    shadows = [p.name for p in PACKAGE.iterdir() if p.name.removesuffix(".py") in sys.stdlib_module_names]
    assert not shadows
