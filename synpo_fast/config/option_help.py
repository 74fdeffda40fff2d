"""The options of training as text: for --help, and as the table of docs/training.md, which a test compares with this."""

from __future__ import annotations

import re
import textwrap
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from synpo_fast.config.sources import recipe_names
from synpo_fast.config.train_config import TrainConfig

USAGE = """\
usage: deepspeed [--num_gpus N] synpo_fast/train.py [--recipe NAME] [--config FILE] [--name value ...]
       synpo-fast train ...                          one process

  --recipe NAME    start from a packaged recipe: {recipes}
  --config FILE    YAML; its options replace the recipe's, those of the command line replace both
  --print_config   show the resolved options and end
"""


def help_text() -> str:
    lines = [USAGE.format(recipes=", ".join(recipe_names()))]
    for title, options in groups():
        lines.append(f"{title}:")
        for name, default, text in options:
            first = f"  --{name} ({default})"
            lines += [first, textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]
        lines.append("")
    return "\n".join(lines)


def markdown() -> str:
    parts = []
    for title, options in groups():
        rows = [f"| `{name}` | {f'`{default}`' if default else ''} | {text} |" for name, default, text in options]
        parts.append("\n".join([f"### {title}", "", "| option | default | what it is |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def groups() -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(title, [(name, default, text)]) in the order of config.py, whose comments are the titles."""
    source = Path(__file__).with_name("train_config.py").read_text(encoding="utf-8")
    body = source[source.index("class TrainConfig") : source.index("def __post_init__")]
    found: list[tuple[str, list[tuple[str, str, str]]]] = []
    by_name = {item.name: item for item in fields(TrainConfig)}
    for title, name in re.findall(r"^    # (.+)$|^    (\w+):", body, re.M):
        if title:
            found.append((title, []))
        else:
            found[-1][1].append((name, _default(by_name[name]), _text(by_name[name])))
    return found


def _default(item: Field[Any]) -> str:
    value = item.default if item.default is not MISSING else None
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _text(item: Field[Any]) -> str:
    choices = item.metadata["choices"]
    return item.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
