"""Resolves a recipe, a YAML file and a command line into a TrainConfig, and writes a TrainConfig as YAML.

Relative paths are relative to the working directory, even those inside a file. They are made absolute here, so that the
config.yaml kept with a run starts the same run from any folder.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from synpo_fast.config.option import facts_of
from synpo_fast.config.options import LOSS_OPTIONS
from synpo_fast.config.other_names import ALIASES, HINTS
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.errors import UserError
from synpo_fast.losses.weighted_sum import canonical_name
from synpo_fast.terminal.console import say

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
OPTIONS = {item.name: item for item in fields(TrainConfig)}
TYPES: dict[str, Any] = typing.get_type_hints(TrainConfig)
LOSS_SPECIFIC = (*LOSS_OPTIONS, "auxiliary_nll", "auxiliary_target", "reference")
IN_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list",
    tuple: "a list, or words separated by commas", dict: "a mapping, or key=value,key=value",
}  # fmt: skip
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def resolve_config(arguments: Sequence[str]) -> TrainConfig:
    """Returns the config for a command line (without the program's name): `--name value`, `--name=value`, or `--flag` for true.

    Raises UserError for an unknown option (naming the nearest one), a value of a wrong type, an option given twice, and
    whatever TrainConfig refuses.
    """
    given: dict[str, Any] = _command_line(arguments)
    recipes: list[str] = []
    sources: list[tuple[str, dict[str, Any]]] = []
    if "recipe" in given:
        recipes.append(given.pop("recipe"))
    if "config" in given:
        file = given.pop("config")
        content = read_yaml(Path(file))
        if "recipe" in content:  # a file may name the recipe it starts from
            recipes.append(str(content.pop("recipe")))
        sources.append((file, _with_our_names(file, content)))
    sources.append(("the command line", _with_our_names("the command line", given)))
    losses = [read_recipe(name)["loss_type"] for name in recipes]
    losses += [
        converted_option("loss_type", values["loss_type"], source)
        for source, values in sources
        if "loss_type" in values
    ]
    chosen = canonical_name(losses[-1]) if losses else None
    merged: dict[str, Any] = {}
    for source, values in [*((f"recipe {name}", _recipe_options(name, chosen)) for name in recipes), *sources]:
        for name, value in values.items():
            merged[name] = converted_option(name, value, source)
    return TrainConfig(**_with_absolute_paths(merged))


def file_of_config(arguments: Sequence[str]) -> str | None:
    """Returns the YAML file that a command line names with --config."""
    return _command_line(arguments).get("config")


def _recipe_options(name: str, chosen: str | None) -> dict[str, Any]:
    """Returns a recipe's options. If the user chose another loss, options of the recipe's own loss are left out, with a note:
    `beta` of one loss is not `beta` of another."""
    values = read_recipe(name)
    own = values["loss_type"]
    left_out = [option for option in values if option in LOSS_SPECIFIC] if chosen not in (None, own) else []
    if left_out:
        say(
            f"note: {', '.join(left_out)} of recipe {name} belong to its loss {own} and are left out: loss_type={chosen}"
        )
    return {option: value for option, value in values.items() if option not in left_out}


def _with_our_names(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the option names of other trainers by ours."""
    given_as: dict[str, str] = {}
    for name in values:
        ours = _our_name(name)
        if ours in given_as:
            others = [each for each in (given_as[ours], name) if each != ours]
            raise UserError(f"{source}: {ours} is given twice, once as {' and once as '.join(others)}")
        given_as[ours] = name
    return {ours: values[name] for ours, name in given_as.items()}


def _our_name(name: str) -> str:
    return name if name in OPTIONS else ALIASES.get(name, name)


def _with_absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Makes relative paths absolute. A model name without a folder of that name is a hub name and stays as it is."""
    absolute = dict(values)
    for name, value in values.items():
        if not value or not facts_of(OPTIONS[name]).is_path or (name == "resume" and value == "auto"):
            continue
        path = os.path.expanduser(value)
        if name != "model_name_or_path" or os.path.isdir(path):
            absolute[name] = str(Path(path).absolute())
    return absolute


def read_recipe(name: str) -> dict[str, Any]:
    """Returns the options of a packaged recipe. Raises UserError for an unknown name."""
    file = RECIPES / f"{name}.yaml"
    if not file.exists():
        raise UserError(f"unknown recipe {name!r}, expected one of {', '.join(recipe_names())}")
    return read_yaml(file)


def recipe_names() -> list[str]:
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def read_yaml(file: Path) -> dict[str, Any]:
    """Returns the options in a YAML file. Raises UserError if it cannot be read, is not a mapping, or gives an option twice."""
    import yaml

    if not file.is_file():
        raise UserError(f"config {str(file)!r} is not a file")
    try:
        text = file.read_text(encoding="utf-8")
        _refuse_duplicates(file, yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"config {str(file)!r} is not YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {str(file)!r} cannot be read: {error}") from error
    if content is None:
        raise UserError(f"config {str(file)!r} is empty: give options as `name: value`")
    if not isinstance(content, dict):
        found = IN_WORDS.get(type(content), type(content).__name__)
        raise UserError(f"config {str(file)!r} must map options to values (`name: value`), but holds {found}")
    return content


def _refuse_duplicates(file: Path, node: Any) -> None:
    """Raises UserError for a key that is given twice: YAML itself silently keeps the last one."""
    if not hasattr(node, "value") or isinstance(node.value, str):
        return
    lines: dict[str, int] = {}
    for item in node.value:
        key, value = item if isinstance(item, tuple) else (None, item)
        if key is not None:
            line = key.start_mark.line + 1
            if str(key.value) in lines:
                raise UserError(
                    f"config {str(file)!r}: {key.value} is given twice, in line {lines[str(key.value)]} and in line {line}"
                )
            lines[str(key.value)] = line
        _refuse_duplicates(file, value)


def dump_config(config: TrainConfig) -> str:
    """Returns YAML that resolves to the same config."""
    import yaml

    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    del values["local_rank"]  # set by the launcher, different in every process
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def converted_option(name: str, value: Any, source: str) -> Any:
    """Converts a value, from YAML or as text from the command line, to the type of its option.

    source: the place it came from, for the error message. Raises UserError for an unknown option or a wrong type.
    """
    if name not in OPTIONS:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the options"
        raise UserError(f"{source}: there is no option {name!r}{f': {HINTS[name]}' if name in HINTS else hint}")
    kinds = typing.get_args(TYPES[name]) if isinstance(TYPES[name], types.UnionType) else (TYPES[name],)
    if value is None or value in ("none", "null", ["none"]):
        if type(None) in kinds:
            return None
        if any(typing.get_origin(kind) is tuple for kind in kinds):
            return ()
        raise UserError(f"{source}: {name} needs a value")
    kind = next(kind for kind in kinds if kind is not type(None))
    of_numbers = kind == tuple[float, ...]
    try:
        if of_numbers:
            return tuple(_converted(float, each) for each in _converted(tuple, value))
        return _converted(typing.get_origin(kind) or kind, value, several=facts_of(OPTIONS[name]).several)
    except (TypeError, ValueError) as error:
        expected = "numbers separated by commas" if of_numbers else IN_WORDS[typing.get_origin(kind) or kind]
        raise UserError(f"{source}: {name} must be {expected}, got {value!r}") from error


def _converted(kind: type, value: Any, *, several: bool = False) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        return BOOLEANS[value.lower()] if isinstance(value, str) and value.lower() in BOOLEANS else _refuse()
    if isinstance(value, bool):
        return _refuse()
    if kind is int:
        return int(value) if isinstance(value, (int, str)) else _refuse()
    if kind is float:
        return float(value) if isinstance(value, (int, float, str)) else _refuse()  # YAML reads 5e-6 as text
    if kind is str:
        if isinstance(value, list) and several:
            value = ",".join(map(str, value))
        return str(value) if isinstance(value, (str, int, float)) else _refuse()
    if kind is tuple:
        if isinstance(value, str):
            value = [word.strip() for word in value.split(",") if word.strip()]
        return tuple(str(word) for word in value) if isinstance(value, (list, tuple)) else _refuse()
    assert kind is dict, kind
    if isinstance(value, str):
        value = _key_values(value)
    return dict(value) if isinstance(value, Mapping) else _refuse()


def _key_values(text: str) -> dict[str, Any]:
    import yaml

    pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
    if any(len(pair) != 2 for pair in pairs):
        _refuse()
    return {key.strip(): yaml.safe_load(value) for key, value in pairs}


def _refuse() -> Any:
    raise ValueError


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
            # A word with a dash in front is the next option, unless it is a negative number.
            flag = not rest or (rest[0].startswith("-") and not _is_number(rest[0]))
            if flag and not _takes_no_value(name):
                raise UserError(f"--{name} needs a value")
            value = "true" if flag else rest.pop(0)
        if name in given:
            raise UserError(f"--{name} is given twice")
        given[name] = value
    return given


def _takes_no_value(name: str) -> bool:
    """True for an option that is true or false, and for an unknown one, which is refused later with a hint."""
    ours = _our_name(name)
    if ours not in OPTIONS:
        return ours not in ("recipe", "config")
    return TYPES[ours] is bool or bool in typing.get_args(TYPES[ours])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
