"""The command `synpo-fast`: each subcommand is a function in a module that is imported when it is called for."""

import importlib
import sys
from collections.abc import Sequence

# name -> (what it does, module, function); the function takes the arguments after the name and returns the exit status
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("train a tiny model with SynPO, beside DPO, in a few minutes", "synpo_fast.demo.run", "main"),
    "train": (
        "train on preference pairs, in one process (`deepspeed synpo_fast/train.py` for more)",
        "synpo_fast.train",
        "main",
    ),
    "merge": ("add a trained adapter to its model, and save the sum", "synpo_fast.run_folder.merge", "main"),
    "report": (
        "one page of charts, captions and numbers of a run, or of several",
        "synpo_fast.report.write",
        "main",
    ),
    "pairs": ("bring preference pairs into a manifest, and check one", "synpo_fast.pairs.cli", "main"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (what, _, _) in COMMANDS.items()]
    return "\n".join(["usage: synpo-fast COMMAND ...", "", *lines, "", "synpo-fast COMMAND --help tells more."])


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 for success, 2 for a mistake in the call, otherwise as the subcommand says."""
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
