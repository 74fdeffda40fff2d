"""Writes the tables of options at the end of docs/training.md, from the options' own help texts: `make docs`."""

import sys
from pathlib import Path

from synpo_fast.config.option_help import markdown

PAGE = Path(__file__).with_name("training.md")
HEADING = "## Every option\n\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, heading, _ = text.partition(HEADING)
    if not heading:
        sys.exit(f"{PAGE} has no heading {HEADING.strip()!r}")
    PAGE.write_text(before + heading + markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
