"""The folders of benchmarks/ know nothing of each other, and every script in them starts by path from any folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FOLDERS = ("head", "steps", "decoding")
SCRIPTS = sorted(
    str(path.relative_to(BENCHMARKS)) for path in BENCHMARKS.rglob("*.py") if "__main__" in path.read_text()
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_none_of_its_neighbours(folder):
    for path in (BENCHMARKS / folder).rglob("*.py"):
        imported = set(re.findall(r"benchmarks\.(\w+)", path.read_text()))
        assert not imported & (set(FOLDERS) - {folder}), path


def test_what_the_folders_share_imports_none_of_them():
    scripts = {path for path in SCRIPTS if "/" not in path}
    for path in BENCHMARKS.glob("*.py"):
        if path.name not in scripts:
            assert not set(re.findall(r"benchmarks\.(\w+)", path.read_text())) & set(FOLDERS), path


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_starts_by_path_from_any_folder(script, tmp_path):
    if script.endswith("compiled_code.py"):
        pytest.importorskip("triton", reason="it compiles with triton")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--help"], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
