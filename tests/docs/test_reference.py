"""docs/reference.md: what the sources say now, names that can be imported, and all that other pages and examples import."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from docs.make_reference import PAGE, PUBLIC, escaped, markdown, page

ROOT = Path(__file__).resolve().parents[2]
TEXT = PAGE.read_text(encoding="utf-8")
NAMES = [(section.module, name) for section in PUBLIC for name in section.names]
WRITTEN_ELSEWHERE = {"TrainConfig", "SynPOConfig"}  # "...": docs/training.md and TRL list what they take


def imported(module: str, name: str):
    if module.endswith(".trl"):
        pytest.importorskip("trl", minversion="1.16", reason="the module subclasses TRL's trainer")
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_the_page_is_what_the_sources_say():
    assert page() == TEXT, "docs/reference.md is stale: run `make docs`"


@pytest.mark.parametrize("module, name", NAMES, ids=lambda value: value)
def test_a_name_is_there_with_these_parameters(module, name):
    """The parameters in the page against those that the imported object takes."""
    value = imported(module, name)
    if not callable(value) or name in WRITTEN_ELSEWHERE or (inspect.isclass(value) and issubclass(value, Exception)):
        return
    heading = "####" if "." in name else "###"
    block = re.search(rf"^{heading} {re.escape(name)}\n\n```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert block, name
    shown = ast.parse(f"def f{block[1][block[1].index('(') :].rstrip()}: ...").body[0].args
    takes = [p for p in inspect.signature(value).parameters.values() if p.name != "self"]
    names = [argument.arg for argument in (*shown.args, shown.vararg, *shown.kwonlyargs, shown.kwarg) if argument]
    assert names == [p.name for p in takes]
    required = len(shown.args) - len(shown.defaults) + sum(default is None for default in shown.kw_defaults)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert required == sum(p.default is inspect.Parameter.empty and p.kind not in kinds for p in takes)


def imports_of(text: str) -> set[tuple[str, str]]:
    """(module, name) of each import from the package in code, whole or a block of a page."""
    found = re.findall(r"^\s*from (synpo_fast[\w.]*) import (\(.*?\)|[^\n]*)", text, re.MULTILINE | re.DOTALL)
    return {(module, name) for module, names in found for name in re.findall(r"\w+", names.partition("#")[0])}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_what_is_shown_to_users_is_on_the_page(file):
    missing = imports_of(file.read_text(encoding="utf-8")) - set(NAMES)
    assert not missing, f"{file.name} imports what PUBLIC in docs/make_reference.py does not list"


def test_exported_names_are_on_the_page():
    """The page lists every name in __all__ of synpo_fast, its data, models and losses."""
    for module in ("synpo_fast", "synpo_fast.data", "synpo_fast.models", "synpo_fast.losses"):
        exported = {name for name in importlib.import_module(module).__all__ if not name.startswith("__")}
        listed = {name for _, name in NAMES}
        assert exported <= listed, module


def test_a_docstring_as_markdown():
    docstring = """
        Adds things, as a*b*c.

        Args:
            first, second [N]: tensors,
                of one shape.
            third: a `plain*word`.
            fourth [B, 2], fifth bool: more.
        Raises ValueError for <2.

            a formula
        """
    assert markdown(inspect.cleandoc(docstring)) == textwrap.dedent(
        """\
        Adds things, as a\\*b\\*c.

        - `first`, `second` [N]: tensors,
          of one shape.
        - `third`: a `plain*word`.
        - `fourth` [B, 2], `fifth` bool: more.

        Raises ValueError for \\<2.

            a formula
        """
    )
    assert escaped("`a*b` <c>") == "`a*b` \\<c>"
