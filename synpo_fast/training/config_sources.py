"""From a recipe, a YAML file and a command line to a TrainConfig; and back to YAML, as it is kept with the run."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from synpo_fast.errors import UserError
from synpo_fast.training.config import TrainConfig

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
OPTIONS = {item.name: item for item in fields(TrainConfig)}
TYPES: dict[str, Any] = typing.get_type_hints(TrainConfig)
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def resolve_config(arguments: Sequence[str]) -> TrainConfig:
    """A command line (without the program's name) -> its config. `--name value`, `--name=value`; a bare `--flag` is true.

    Raises ValueError for an unknown option (naming the nearest one), a value of another type, an option given twice, and
    whatever TrainConfig refuses.
    """
    given = _command_line(arguments)
    sources = []
    if "recipe" in given:
        sources.append((f"recipe {given['recipe']}", read_recipe(given.pop("recipe"))))
    if "config" in given:
        file = given.pop("config")
        sources.append((file, _with_recipe(file, read_yaml(Path(file)))))
    sources.append(("the command line", given))
    merged: dict[str, Any] = {}
    for source, values in sources:
        for name, value in values.items():
            merged[name] = typed(name, value, source)
    return TrainConfig(**merged)


def read_recipe(name: str) -> dict[str, Any]:
    file = RECIPES / f"{name}.yaml"
    if not file.exists():
        raise UserError(f"unknown recipe {name!r}, expected one of {', '.join(recipe_names())}")
    return read_yaml(file)


def recipe_names() -> list[str]:
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    if not file.is_file():
        raise UserError(f"config {str(file)!r} is not a file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"config {str(file)!r} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"config {str(file)!r} must map options to values, it holds {type(content).__name__}")
    return content


def dump_config(config: TrainConfig) -> str:
    """YAML that resolves to the same config."""
    import yaml

    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    del values["local_rank"]  # the launcher's, different on every process
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def typed(name: str, value: Any, source: str) -> Any:
    """A value from YAML or, as text, from the command line, in the type of its option."""
    if name not in OPTIONS:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the options"
        raise UserError(f"{source}: there is no option {name!r}{hint}")
    kinds = typing.get_args(TYPES[name]) if isinstance(TYPES[name], types.UnionType) else (TYPES[name],)
    if value is None or value in ("none", "null"):
        if type(None) in kinds:
            return None
        raise UserError(f"{source}: {name} needs a value")
    kind = next(kind for kind in kinds if kind is not type(None))
    try:
        return _as(typing.get_origin(kind) or kind, value)
    except (TypeError, ValueError) as error:
        expected = {tuple: "a list, or words with commas between", dict: "a mapping, or key=value,key=value"}
        wanted = expected.get(typing.get_origin(kind) or kind, f"{getattr(kind, '__name__', kind)}")
        raise UserError(f"{source}: {name} must be {wanted}, got {value!r}") from error


def _as(kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        return WORDS[value.lower()] if isinstance(value, str) and value.lower() in WORDS else _refuse()
    if isinstance(value, bool):
        return _refuse()
    if kind is int:
        return int(value) if isinstance(value, (int, str)) else _refuse()
    if kind is float:
        return float(value) if isinstance(value, (int, float, str)) else _refuse()  # YAML reads 5e-6 as a text
    if kind is str:
        return str(value) if isinstance(value, (str, int, float)) else _refuse()
    if kind is tuple:
        if isinstance(value, str):
            value = [word.strip() for word in value.split(",") if word.strip()]
        return tuple(str(word) for word in value) if isinstance(value, (list, tuple)) else _refuse()
    assert kind is dict, kind
    if isinstance(value, str):
        value = _pairs(value)
    return dict(value) if isinstance(value, Mapping) else _refuse()


def _pairs(text: str) -> dict[str, Any]:
    import yaml

    pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
    if any(len(pair) != 2 for pair in pairs):
        _refuse()
    return {key.strip(): yaml.safe_load(value) for key, value in pairs}


def _refuse() -> Any:
    raise ValueError


def _with_recipe(file: str, content: dict[str, Any]) -> dict[str, Any]:
    """A config file may name the recipe it starts from."""
    if "recipe" not in content:
        return content
    rest = {name: value for name, value in content.items() if name != "recipe"}
    return {**read_recipe(str(content["recipe"])), **rest}


def _command_line(arguments: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"expected an option (--name value), got {word!r}")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            # A value may begin with a dash if it is a number.
            flag = not rest or (rest[0].startswith("-") and not _is_number(rest[0]))
            value = "true" if flag else rest.pop(0)
        if name in given:
            raise UserError(f"--{name} is given twice")
        given[name] = value
    return given


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
