"""The package installs with and without a compiler, and reports a missing one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from synpo_fast.ops import native_library

ROOT = Path(__file__).resolve().parent.parent


def test_the_native_library_is_there_where_there_is_a_compiler():
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    assert native_library.reason_unavailable() is None


def test_installs_without_a_compiler(tmp_path):
    """setup.py with a compiler that does not exist: it succeeds, says once what is missing, and the op still works."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("csrc", "synpo_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    target = tmp_path / "target"
    environment = {**os.environ, "CXX": "/nonexistent/g++", "CC": "/nonexistent/gcc", "SYNPO_FAST_NATIVE": "auto"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(target),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert said.count("the native CPU backend is not built") == 1
    assert not list(target.rglob("*.so"))

    code = (
        "import warnings, torch, synpo_fast\n"
        "h, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    synpo_fast.fused_linear_logprobs(h, w, y)\n"
        "print(said[0].message)\n"
        "try:\n"
        "    synpo_fast.fused_linear_logprobs(h, w, y, backend='native')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    environment["PYTHONPATH"] = str(target)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    warned, raised = out.stdout.strip().splitlines()
    assert "backend='chunked', not 'native': no compiled library" in warned
    assert "backend='native' cannot be used here: no compiled library" in raised
