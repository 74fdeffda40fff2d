"""docs/architecture.md names files, functions and classes: each exists, and each name is defined in a file the page links to."""

import ast
import re
from pathlib import Path

from tests.test_imports import LAYERS, layer_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
# Code in backticks that is no name of ours: placeholders, shapes, folders, and other packages' words.
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)[^)]*\)")
NAME = re.compile(r"`([A-Za-z_][A-Za-z_0-9]*)`")
FOLDER_WORDS = {"data", "models", "training", "report", "profiling"}


def paragraphs() -> list[str]:
    """Each numbered step is one."""
    return re.split(r"\n\n|\n(?=\d+\. )", PAGE.read_text())


def defined_in(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_every_link_leads_to_a_file():
    targets = LINK.findall(PAGE.read_text())
    assert len(targets) > 30
    for target in targets:
        assert (PAGE.parent / target).exists(), target


def test_every_name_is_defined_in_a_file_that_is_linked():
    text = PAGE.read_text()
    files = {PAGE.parent / target for target in LINK.findall(text) if target.endswith(".py")}
    known = set().union(*map(defined_in, files))
    names = set(NAME.findall(text)) - FOLDER_WORDS
    assert len(names) > 25
    assert not names - known


def test_the_ten_steps_are_ten():
    steps = [p for p in paragraphs() if re.match(r"\d+\. ", p)]
    assert [int(step.split(".")[0]) for step in steps] == list(range(1, 11))
    assert all(LINK.search(step) for step in steps)


def test_the_table_of_folders_is_whole_and_in_the_order_of_the_imports():
    rows = [row for row in PAGE.read_text().splitlines() if row.startswith("| `synpo_fast/")]
    names = [
        re.sub(r"\.py$|/$", "", name)
        for row in rows
        for name in re.findall(r"`synpo_fast/([\w./]+)`", row.split("|")[1])
    ]
    assert set(names) == set().union(*LAYERS) - {"__init__"}
    heights = [layer_of(name) for name in names]
    assert heights == sorted(heights)
