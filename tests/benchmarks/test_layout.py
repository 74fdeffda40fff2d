"""The folders of benchmarks/ do not import each other, scripts start by path from any folder, documents name what exists."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
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


@functools.cache
def help_of(script: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--help"], cwd="/", capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_starts_by_path_from_any_folder(script):
    if script.endswith("compiled_code.py"):
        pytest.importorskip("triton", reason="it compiles with triton")
    assert "--" in help_of(script)


MISTAKES = {
    "steps/plot.py nope.json": "nope.json cannot be read: No such file",
    "steps/plot.py kernels.json": "kernels.json holds nothing to draw: give a file that benchmarks/throughput.py wrote",
    "steps/plot.py prefix_sharing.json": "prefix_sharing.json holds nothing to draw",
    "steps/plot.py demo.json": "demo.json holds nothing to draw",
    "steps/plot.py decode.png": "decode.png is not JSON",
    "head/plot.py nope.json": "nope.json cannot be read: No such file",
    "head/plot.py decode.json": "decode.json holds nothing to draw: give a file that benchmarks/kernels.py wrote with --json",
    "head/plot.py throughput.json": "throughput.json holds nothing to draw",
    "head/plot.py pairs.json": "pairs.json holds nothing to draw",
    "head/readme_table.py decode.json": "decode.json holds nothing to draw: give a file that benchmarks/kernels.py wrote",
    "head/compiled_code.py --shapes foo": "unknown shape 'foo': give DxV",
    "head/compiled_code.py --rows 0": "--rows must be at least 1, not 0",
}


@pytest.mark.parametrize("call", MISTAKES)
def test_a_mistake_in_a_call_is_one_line(call, tmp_path):
    script, *arguments = call.split()
    if script.endswith("compiled_code.py"):
        pytest.importorskip("triton", reason="it compiles with triton")
    else:
        arguments += ["--page" if script.endswith("readme_table.py") else "--out", str(tmp_path / "pictures")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments], cwd=BENCHMARKS / "results" / "cpu",
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and MISTAKES[call] in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


DOCUMENTS = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", BENCHMARKS / "gpu_check.sh", BENCHMARKS / "README.md",
    *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "synpo_fast").rglob("*.md")),
]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_paths_and_options_that_exist(document):
    text = document.read_text()
    for path in re.findall(r"\b((?:benchmarks|tests)/[\w/.-]*\w)", text):
        if "benchmarks/results" not in path or "." in path:
            assert (ROOT / path).exists(), path
    commands = text.replace("\\\n", " ")  # joins continued lines
    for script, rest in re.findall(r"python3? benchmarks/([\w/]+\.py)([^`\n]*)", commands):
        options = set(re.findall(r"(?<!\S)--\w+", rest))
        assert not options - set(re.findall(r"--\w+", help_of(script))), script


def test_every_command_of_gpu_check_is_read():
    """Bash reads the script, and the test above reads its commands."""
    script = BENCHMARKS / "gpu_check.sh"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    named = set(re.findall(r"python3 benchmarks/([\w/]+\.py)", script.read_text()))
    assert named == {"kernels.py", "head/plot.py", "throughput.py", "decode.py"}
