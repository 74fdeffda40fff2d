"""Links in the pages lead somewhere, and docs/index.md leads to every page and example."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
INDEX = (DOCS / "index.md").read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Those of GitHub: a heading in lower case, spaces as dashes, without the rest; a repeated one gets a number."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    found: set[str] = set()
    for heading in headings:
        base = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = next(n for n in range(len(headings)) if (f"{base}-{n}" if n else base) not in found)
        found.add(f"{base}-{number}" if number else base)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"


def test_the_index_leads_to_every_page_and_example():
    for file in (*DOCS.glob("*.md"), *(ROOT / "examples").glob("*.py"), *(ROOT / "synpo_fast").rglob("README.md")):
        relative = file.relative_to(ROOT)
        link = file.name if file.parent == DOCS else f"../{relative}"
        assert f"]({link}" in INDEX or file.name == "index.md", f"docs/index.md does not lead to {relative}: add a line"
