"""Preference training: `deepspeed synpo_fast/train.py --config FILE [--name value ...]`.

Also `python -m synpo_fast.train` and `synpo-fast train`, which run one process. --help lists every option, --print_config shows
what a run would use.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Started by its path: Python has put this folder first on sys.path, where our own modules would be found as top-level
    # ones. What is wanted there is the folder above it.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    sys.path.insert(0, str(here.parent))

from synpo_fast.printable import PrintableFormatter, printable
from synpo_fast.training.config_sources import dump_config, resolve_config
from synpo_fast.training.option_help import help_text


def main(argv: Sequence[str] | None = None) -> int:
    """0: done, or stopped by SIGTERM with a checkpoint. 1: the run could not go on. 2: a mistake in the options."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    only_print = "--print_config" in arguments
    try:
        config = resolve_config([word for word in arguments if word != "--print_config"])
    except ValueError as error:
        return _mistake(error)
    if only_print:
        print(dump_config(config), end="")
        return 0
    terminal = logging.StreamHandler()
    terminal.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[terminal])
    from synpo_fast.training.checkpoint import CheckpointError
    from synpo_fast.training.loop import TrainingStopped
    from synpo_fast.training.start import run_training

    try:
        run_training(config)
    except ValueError as error:
        return _mistake(error)
    except (TrainingStopped, CheckpointError) as error:
        print(f"synpo-fast train: {printable(error)}", file=sys.stderr)
        return 1
    return 0


def _mistake(error: Exception) -> int:
    print(f"synpo-fast train: error: {printable(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
