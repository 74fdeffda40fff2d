"""The command `synpo-fast`. Each subcommand is a function in a module that is imported only when the subcommand is used."""

import importlib
import sys
from collections.abc import Sequence

# name -> (description, module, function); the function takes the arguments after the name and returns the exit status
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("train a tiny model with SynPO and with DPO, in a few minutes", "synpo_fast.demo.run", "main"),
    "train": (
        "train on preference pairs in one process (for several: `deepspeed synpo_fast/train.py`)",
        "synpo_fast.train",
        "main",
    ),
    "merge": (
        "add a trained adapter to its base model and save the merged model",
        "synpo_fast.run_folder.merge",
        "main",
    ),
    "report": (
        "write one page with charts, captions and numbers of one or several runs",
        "synpo_fast.report.write",
        "main",
    ),
    "pairs": ("import preference pairs into a manifest, and check a manifest", "synpo_fast.pairs.cli", "main"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (what, _, _) in COMMANDS.items()]
    return "\n".join(
        ["usage: synpo-fast COMMAND ...", "", *lines, "", "synpo-fast COMMAND --help shows the options of a command."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status: 2 for an unknown command, otherwise the subcommand's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        problem = f"unknown command {arguments[0]!r}" if arguments else "no command given"
        print(f"{usage()}\n\nsynpo-fast: error: {problem}", file=sys.stderr)
        return 2
    _, module, function = COMMANDS[arguments[0]]
    status: int = getattr(importlib.import_module(module), function)(arguments[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
