"""The training options as text, for --help and for the tables of docs/training.md, which a test compares with it."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, Field, fields
from typing import Any

from synpo_fast.config.option import facts_of
from synpo_fast.config.sources import recipe_names
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.losses import LOSSES

USAGE = """\
usage: deepspeed [--num_gpus N] synpo_fast/train.py [--recipe NAME] [--config FILE] [--name value ...]
       synpo-fast train ...                          the same in one process

  --recipe NAME    start from a packaged recipe: {recipes}
  --config FILE    YAML file of options; they replace the recipe's, and the command line replaces both
  --print_config   print the resolved options and exit
"""


def help_text() -> str:
    lines = [USAGE.format(recipes=", ".join(recipe_names()))]
    for title, options in groups():
        lines.append(f"{title}:")
        for name, default, text in options:
            first = f"  --{name} ({f'default: {default}' if default else 'not set'})"
            lines += [first, textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]
        lines.append("")
    return "\n".join(lines)


def markdown() -> str:
    parts = []
    for title, options in groups():
        rows = [f"| `{name}` | {f'`{default}`' if default else ''} | {text} |" for name, default, text in options]
        parts.append("\n".join([f"### {title}", "", "| option | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def groups() -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Returns (title, [(name, default, text)]) for each section, in the order of options.py."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for item in fields(TrainConfig):
        found.setdefault(facts_of(item).group, []).append((item.name, _default(item), _text(item)))
    return list(found.items())


def _default(item: Field[Any]) -> str:
    value = item.default if item.default is not MISSING else None
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _text(item: Field[Any]) -> str:
    facts = facts_of(item)
    if facts.of_loss:
        return _loss_option_text(item.name, facts.text)
    return facts.text + (f". One of: {', '.join(facts.choices)}" if facts.choices else "")


def _loss_option_text(name: str, text: str) -> str:
    """Returns the help text of an option of losses: the losses that have it, the words they accept, and its own text."""
    choices = {loss: spec.choices.get(name, ()) for loss, spec in LOSSES.items() if name in spec.options}
    losses = "all but sft" if len(choices) == len(LOSSES) else ", ".join(choices)
    parts = []
    if not choices:
        return f"option of several losses: {text}"
    if len(set(choices.values())) > 1:
        losses = "; ".join(f"{loss}: {', '.join(words)}" for loss, words in choices.items())
    elif words := next(iter(choices.values())):
        parts.append(f"{', '.join(words[:-1])} or {words[-1]}")
    parts += [text] if text else []
    return f"option of the loss ({losses}){': ' if parts else ''}{'; '.join(parts)}"
