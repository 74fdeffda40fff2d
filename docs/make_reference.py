"""Writes docs/reference.md: every public name with its signature and docstring.

    python docs/make_reference.py            writes the page
    python docs/make_reference.py --check    exit status 1 if the page is not what this would write

Sources are parsed, not imported, so the page does not depend on the Python version or on installed packages. PUBLIC lists what is
on the page.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference.md"
WIDTH = 100  # longer signatures get one line per parameter
Definition = ast.ClassDef | ast.FunctionDef | ast.AnnAssign
HEAD = """\
# Reference

Every public name: where to import it from, its signature, and what it does. Other names may change without notice.
[index.md](index.md) leads through the other pages. `make docs` writes this page from the docstrings in the sources.
"""


class Section(NamedTuple):
    """A section of the page. names are in the page's order; "Class.method" adds a method to the class before it."""

    module: str
    intro: str
    names: tuple[str, ...]


PUBLIC = (
    Section(
        "synpo_fast",
        "The fused losses, the op below them, and the scores of pairs. Importing `synpo_fast` loads nothing: a name is loaded "
        "when it is first asked for. [using_the_loss.md](using_the_loss.md) shows the losses at work.",
        (
            "FusedLinearSynPOLoss", "FusedLinearDPOLoss", "FusedLinearSimPOLoss", "FusedLinearPreferenceLoss",
            "FusedLinearKTOLoss", "FusedLinearCrossEntropyLoss",
            "fused_linear_logprobs", "fused_linear_outputs", "score_pairs", "LOSSES",
        ),
    ),
    Section("synpo_fast.fused", "The result of the cross entropy.", ("CrossEntropyOutput",)),
    Section("synpo_fast.ops.linear_logprobs", "The results of the op.", ("TokenOutputs",)),
    Section(
        "synpo_fast.data",
        "Pairs, manifests and frames. [manifest.md](manifest.md) describes the files.",
        ("Pair", "Response", "Clip", "read_manifest", "read_manifest_rows", "write_manifest", "ManifestError", "decode_frames"),
    ),
    Section("synpo_fast.data.manifest", "The errors of a manifest's rows.", ("BadRow",)),
    Section("synpo_fast.data.video.video_info", "Facts about a video file, and its errors.", ("VideoInfo", "VideoError")),
    Section("synpo_fast.data.video.decode", "Reading a video's facts without its frames.", ("probe_video",)),
    Section("synpo_fast.data.video.sampling", "The choice of a video's frames.", ("FrameSampling",)),
    Section(
        "synpo_fast.models",
        "Models for training and scoring. [synpo_fast/models](../synpo_fast/models/README.md) lists the families.",
        ("load_policy", "Policy", "Policy.forward", "Sample"),
    ),
    Section("synpo_fast.models.lora", "LoRA adapters.", ("add_lora",)),
    Section(
        "synpo_fast.models.head",
        "The LM head of a causal language model of transformers, and the hidden states that go into it.",
        ("head_of", "Head", "hidden_states", "check_head"),
    ),
    Section("synpo_fast.models.tiny", "Small random models, for tests and first steps.", ("tiny_model",)),
    Section(
        "synpo_fast.scoring",
        "From pairs to tokens, and to the log-probs of their responses.",
        ("score_pairs", "encode_pairs", "encode_pair", "EncodedPairs", "PairTooLong"),
    ),
    Section(
        "synpo_fast.losses",
        "Losses as functions of token log-probs. [synpo_fast/losses](../synpo_fast/losses/README.md) has formulas and options.",
        (
            "preference_loss", "PairLogprobs", "PairLogprobs.from_pairs", "PairLogprobs.from_padded", "PairLogprobs.from_sums",
            "PairLogprobs.from_unpaired",
            "LossOutput", "AuxiliaryNLL", "LOSSES", "LossSpec", "spec_of", "check_options", "wpo_weights",
            "synpo", "synpo_token_coefficients", "synpo_ref", "dpo", "simpo", "orpo", "cpo", "cpo_simpo",
            "kto", "apo_zero_unpaired", "kl_reference_point", "nll",
        ),
    ),
    Section(
        "synpo_fast.references",
        "Sources of reference log-probs, for losses that compare with a reference.",
        ("FrozenCopy", "AdapterOff", "PreviousRound", "Precomputed", "precompute", "AnchorClip"),
    ),
    Section(
        "synpo_fast.integrations.trl",
        "SynPO in TRL. It needs `pip install 'synpo-fast[trl]'`.",
        ("SynPOTrainer", "SynPOConfig"),
    ),
    Section("synpo_fast.integrations.hf_trainer", "SynPO in `transformers.Trainer`.", ("synpo_loss_func", "PairCollator")),
    Section("synpo_fast.integrations.pair_forward", "A loss inside a model's own forward.", ("add_pair_loss",)),
    Section(
        "synpo_fast.config.train_config",
        "The options of a training run. [training.md](training.md#every-option) lists them.",
        ("TrainConfig",),
    ),
    Section("synpo_fast.config.sources", "Recipes, YAML files and command lines.", ("resolve_config",)),
    Section("synpo_fast.train", "The trainer.", ("run_training",)),
    Section("synpo_fast.training.metrics", "The numbers a run wrote.", ("read_metrics",)),
    Section("synpo_fast.run_folder.checkpoint", "The checkpoints of a run.", ("newest_checkpoint",)),
    Section("synpo_fast.errors", "Errors that commands print without a traceback.", ("UserError", "MissingPackage")),
    Section(
        "synpo_fast.testing.clips",
        "Test videos in which every frame carries its number.",
        ("write_clip", "draw_frame", "read_barcode"),
    ),
)  # fmt: skip


def page() -> str:
    parts = [HEAD, contents()]
    for section in PUBLIC:
        parts.append(f"## {section.module}\n\n{section.intro}\n")
        seen = {name for before in PUBLIC[: PUBLIC.index(section)] for name in definitions(before)}
        for name in section.names:
            parts.append(entry(section.module, name, seen))
    return "\n".join(parts)


def contents() -> str:
    lines = []
    for section in PUBLIC:
        names = ", ".join(f"[{name}](#{anchor(name)})" for name in section.names if "." not in name)
        lines.append(f"- **[{section.module}](#{anchor(section.module)})**: {names}")
    return "\n".join([*lines, ""])


def anchor(heading: str) -> str:
    return re.sub(r"[^\w-]", "", heading.lower())


def definitions(section: Section) -> set[tuple[Path, str]]:
    return {(found[0], name) for name in section.names if "." not in name and (found := find(section.module, name))}


def entry(module: str, name: str, seen: set[tuple[Path, str]]) -> str:
    """Returns the entry of a name in its module's section. A name that an earlier section has gets a link to it."""
    owner, _, method = name.partition(".")
    file, node = find(module, owner)
    if method:
        assert isinstance(node, ast.ClassDef)
        function = next(part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == method)
        return f"#### {name}\n\n{code(signature(file, function, called=name))}\n{markdown(ast.get_docstring(function) or '')}"
    if (file, owner) in seen:
        other = next(section.module for section in PUBLIC if (file, owner) in definitions(section))
        return f"### {owner}\n\nThe same as `{other}.{owner}`, [above](#{anchor(owner)}).\n"
    if isinstance(node, ast.AnnAssign):
        assert isinstance(node.value, ast.Dict), f"{module}.{owner} is neither class, function nor literal dict"
        keys = ", ".join(f"`{ast.literal_eval(key)}`" for key in node.value.keys if key is not None)
        return f"### {owner}\n\n{code(f'{owner}: {ast.unparse(node.annotation)}')}\nA mapping with the keys {keys}.\n"
    text = ast.get_docstring(node)
    assert text and isinstance(node, (ast.FunctionDef, ast.ClassDef)), f"{module}.{owner} has no docstring"
    return f"### {owner}\n\n{code(signature(file, node, called=owner))}\n{markdown(text)}"


def find(module: str, name: str) -> tuple[Path, Definition]:
    """Finds the file and node that define a name, following imports. Raises LookupError if there are none."""
    base = ROOT / Path(*module.split("."))
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    tree = ast.parse(file.read_text())
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return file, node
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return file, node
    for place in ast.walk(tree):
        if isinstance(place, ast.ImportFrom) and place.module and any(alias.name == name for alias in place.names):
            return find(place.module, name)
    raise LookupError(f"{module} has no {name}")


def code(text: str) -> str:
    return "```python\n" + re.sub(r"'([^'\"\\]*)'", r'"\1"', text) + "\n```\n"


def signature(file: Path, node: ast.ClassDef | ast.FunctionDef, *, called: str) -> str:
    """Returns a signature in one line, or with one line per parameter if it is too long. Constants are shown as values."""
    node = WithValues(file).visit(node)
    returns = ""
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        words = list(parameters(init.args)) if init is not None else list(field_parameters(node))
        if init is None and not words:
            return f"class {called}({', '.join(ast.unparse(base) for base in node.bases)})"
    else:
        words = list(parameters(node.args))
        returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    line = f"{called}({', '.join(words)}){returns}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{called}(", *(f"    {word}," for word in words), f"){returns}"])


class WithValues(ast.NodeTransformer):
    """Replaces defaults that name a constant of the file (DEADLINE_S = 30.0) by its value."""

    def __init__(self, file: Path) -> None:
        assigned = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Assign)]
        self.values = {ast.unparse(node.targets[0]): node.value for node in assigned if len(node.targets) == 1}

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        node.defaults = [self._value(default) for default in node.defaults]
        node.kw_defaults = [None if default is None else self._value(default) for default in node.kw_defaults]
        return node

    def _value(self, default: ast.expr) -> ast.expr:
        return self.values.get(default.id, default) if isinstance(default, ast.Name) else default


def parameters(args: ast.arguments) -> Iterator[str]:
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    for arg, default in zip(positional, defaults, strict=True):
        if arg.arg not in ("self", "cls"):
            yield parameter(arg, default)
    if args.vararg is not None:
        yield f"*{args.vararg.arg}"
    elif args.kwonlyargs:
        yield "*"
    for arg, keyword_default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield parameter(arg, keyword_default)
    if args.kwarg is not None:
        yield f"**{args.kwarg.arg}"


def parameter(arg: ast.arg, default: ast.expr | None) -> str:
    kind = "" if arg.annotation is None else f": {ast.unparse(arg.annotation)}"
    equals = " = " if kind else "="
    return f"{arg.arg}{kind}" + ("" if default is None else f"{equals}{ast.unparse(default)}")


def field_parameters(node: ast.ClassDef) -> Iterator[str]:
    """Yields the fields of a dataclass as parameters. "..." is for those of its base, and for options that another page lists."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return
    shown = []
    for item in node.body:
        if not isinstance(item, ast.AnnAssign):
            continue
        default = item.value
        if isinstance(default, ast.Call) and ast.unparse(default.func) == "option":
            continue
        if isinstance(default, ast.Call) and ast.unparse(default.func) == "field":
            words = {word.arg: ast.unparse(word.value) for word in default.keywords}
            if words.get("init") == "False":
                continue
            default = ast.parse(words.get("default", "..."), mode="eval").body
        equals = "" if default is None else f" = {ast.unparse(default)}"
        shown.append(f"{ast.unparse(item.target)}: {ast.unparse(item.annotation)}{equals}")
    if node.bases or not shown:
        yield "..."
    yield from shown


ITEM = re.compile(r"(?P<names>\w+(?: \[[^\]]*\]| bool)*(?:, \w+(?: \[[^\]]*\]| bool)*)*): (?P<text>.*)")

NAME = re.compile(r"(\w+)((?: \[[^\]]*\]| bool)*)")  # a name, and its shape or type


def markdown(docstring: str) -> str:
    """Returns a docstring as Markdown: lines `name: text` become a list, indented blocks are unchanged."""
    lines: list[str] = []
    in_item = False
    for line in docstring.splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        item = ITEM.match(text)
        if not text or text == "Args:":
            in_item = False
            lines.append("")
        elif item and indent <= 4:
            names = NAME.sub(r"`\1`\2", item["names"])
            lines += [*([] if in_item else [""]), f"- {names}: {escaped(item['text'])}"]
            in_item = True
        elif in_item and indent:
            lines.append(f"  {escaped(text)}")
        elif indent:
            lines.append(line if lines[-1] == "" or lines[-1].startswith("    ") else escaped(text))
        else:
            starts = text.startswith(("Raises", "Returns"))
            lines += [*([""] if in_item or starts else []), escaped(text)]
            in_item = False
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def escaped(text: str) -> str:
    """Escapes characters that Markdown would read as emphasis or a tag, except between backticks."""
    parts = text.split("`")
    return "`".join(part if place % 2 else re.sub(r"([*<])", r"\\\1", part) for place, part in enumerate(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is stale")
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.relative_to(ROOT)} is stale: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
