"""Preference training: `deepspeed synpo_fast/train.py --config FILE [--name value ...]`.

Also `python -m synpo_fast.train` and `synpo-fast train`, which run one process. --help lists every option, --print_config shows
what a run would use.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    # Started by its path: Python has put this folder first on sys.path, where our own modules would be found as top-level
    # ones. What is wanted there is the folder above it.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    sys.path.insert(0, str(here.parent))

from synpo_fast.errors import MissingPackage, UserError
from synpo_fast.terminal.console import hide_notes_to_developers, print_to_a_pipe, say, say_mistake
from synpo_fast.terminal.printable import PrintableFormatter, printable
from synpo_fast.terminal.stopping import Interrupted, Stopper

if TYPE_CHECKING:
    import torch

    from synpo_fast.config.train_config import TrainConfig
    from synpo_fast.training.run_state import RunState

FAILED, MISTAKE = 1, 2
UNEXPECTED = (
    "synpo-fast train: an error that is none of the mistakes this program knows; the lines above say where it arose. A run's "
    "last checkpoint is as it was: --resume auto goes on from it."
)

LOST = (
    "synpo-fast train: another process of this launch has ended, so this one cannot go on; what that one said, or the launcher, "
    "tells why. The last checkpoint is as it was: --resume auto goes on from it."
)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done, or stopped by SIGTERM with a checkpoint. 1: the run could not go on. 2: a mistake in options, data or files.
    130: stopped by Ctrl-C. 143: stopped when there was nothing to save."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    asks_for_help, only_print = bool({"-h", "--help"} & set(arguments)), "--print_config" in arguments
    if not asks_for_help and not only_print:
        say("synpo-fast train: loading libraries")  # which takes seconds: torch first
    stopper = Stopper()
    try:
        with stopper.installed():
            return _main(arguments, stopper, asks_for_help, only_print)
    except Interrupted as error:
        print(f"synpo-fast train: {error} outside of training: there was nothing to save", file=sys.stderr)
        return stopper.status or 143


def _main(arguments: list[str], stopper: Stopper, asks_for_help: bool, only_print: bool) -> int:
    from synpo_fast.config.option_help import help_text
    from synpo_fast.config.sources import dump_config, file_of_config, resolve_config

    if asks_for_help:
        print_to_a_pipe(f"{help_text()}\n")
        return 0
    try:
        config = resolve_config([word for word in arguments if word != "--print_config"])
        if only_print:
            print_to_a_pipe(dump_config(config))
            return 0
        from synpo_fast.training.start_checks import check_start

        check_start(config)
    except (UserError, MissingPackage) as error:
        say_mistake(f"synpo-fast train: error: {printable(error)}")
        return MISTAKE
    terminal = logging.StreamHandler()
    terminal.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if config.verbose else logging.WARNING, handlers=[terminal])
    if not config.verbose:
        hide_notes_to_developers()
    from synpo_fast.run_folder.overwriting import check_inputs_stay
    from synpo_fast.terminal.said_once import SaidByAnotherProcess, lost_another_process
    from synpo_fast.training.start import FORESEEN

    try:
        check_inputs_stay(config, config_file=file_of_config(arguments))
    except UserError as error:
        say_mistake(f"synpo-fast train: error: {printable(error)}")
        return MISTAKE
    try:
        state = run_training(config, stopper)
    except SaidByAnotherProcess as said:
        return _status(said.error)
    except FORESEEN as error:
        told = "synpo-fast train: error:" if _status(error) == MISTAKE else "synpo-fast train:"
        print(f"{told} {printable(error)}", file=sys.stderr)
        return _status(error)
    except Exception as error:  # shown whole: nothing is known of it
        if lost_another_process(error):
            if config.verbose:
                traceback.print_exc()
            print(LOST, file=sys.stderr)
            return FAILED
        traceback.print_exc()
        print(UNEXPECTED, file=sys.stderr)
        return FAILED
    return stopper.status if state.stopped_early else 0


def run_training(config: TrainConfig, stopper: Stopper | None = None) -> RunState:
    """Trains, writes the report, and returns where the run stands at its end; with config.profile it measures instead.

    Every process of a launch calls it. Raises UserError, MissingPackage, TrainingStopped or CheckpointError with one line that
    says all, or SaidByAnotherProcess in place of an error that another process of the launch raises, too.
    """
    from synpo_fast.training.start import process_group

    with process_group(config) as device:
        return run_in_group(config, device, stopper)


def run_in_group(config: TrainConfig, device: torch.device, stopper: Stopper | None = None) -> RunState:
    """run_training in a process group that is there already."""
    if config.profile:
        # Imported only here, because torch's FLOP counter imports triton, which training on a CPU does without.
        from synpo_fast.profiling.profile import profile_in_group
        from synpo_fast.training.run_state import RunState

        profile_in_group(config, device)
        return RunState()
    from synpo_fast.report.write import write_report
    from synpo_fast.training.start import train_in_group

    return train_in_group(config, device, stopper, write_report=write_report)


def _status(error: Exception) -> int:
    return MISTAKE if isinstance(error, (UserError, MissingPackage)) else FAILED


if __name__ == "__main__":
    sys.exit(main())
