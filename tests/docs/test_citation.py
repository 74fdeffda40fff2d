"""CITATION.cff: it parses, has what the format requires, and says the version that is installed."""

import datetime
import re
from pathlib import Path

import pytest

import synpo_fast

yaml = pytest.importorskip("yaml", reason="CITATION.cff is YAML")

ROOT = Path(__file__).resolve().parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def project(entry: str) -> str:
    """An entry of pyproject.toml's [project], by pattern: Python 3.10 has no TOML reader."""
    found = re.search(rf'^{entry} = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found, entry
    return found[1]


def test_what_the_format_requires():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["message"] and CITATION["title"] == "synpo_fast"
    assert isinstance(CITATION["date-released"], datetime.date)
    assert all(author.keys() & {"name", "family-names"} for author in CITATION["authors"])


def test_one_version_and_one_license():
    assert str(CITATION["version"]) == project("version") == synpo_fast.__version__
    assert CITATION["license"] == project("license")


def test_the_paper():
    (paper,) = CITATION["references"]
    assert paper["type"] == "article" and paper["authors"]
    assert "2506.00835" in paper["url"] and "2506.00835" in paper["identifiers"][0]["value"]
