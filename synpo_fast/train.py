"""Preference training: `deepspeed synpo_fast/train.py --config FILE [--name value ...]`.

`python -m synpo_fast.train` and `synpo-fast train` do the same in one process. --help lists every option, --print_config prints
the resolved options.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    # Started by path: Python has put this folder first on sys.path, so our modules would be imported as top-level modules.
    # The folder above belongs there.
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
UNEXPECTED_ERROR = (
    "synpo-fast train: unexpected error; the traceback above shows where it arose. The run's last checkpoint is unchanged: "
    "--resume auto resumes from it."
)

LOST_PROCESS = (
    "synpo-fast train: another process of this launch has ended, so this one cannot continue; the output of that process or of "
    "the launcher gives the reason. The last checkpoint is unchanged: --resume auto resumes from it."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0: done, or stopped by SIGTERM with a checkpoint. 1: the run could not continue. 2: a mistake in options, data or files.
    130: stopped by Ctrl-C. 143: stopped when there was nothing to save.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    asks_for_help, only_print = bool({"-h", "--help"} & set(arguments)), "--print_config" in arguments
    if not asks_for_help and not only_print:
        say("synpo-fast train: loading libraries")  # importing torch takes seconds
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
    from synpo_fast.terminal.report_once import ReportedByAnotherProcess, lost_another_process
    from synpo_fast.training.start import EXPECTED_ERRORS

    try:
        check_inputs_stay(config, config_file=file_of_config(arguments))
    except UserError as error:
        say_mistake(f"synpo-fast train: error: {printable(error)}")
        return MISTAKE
    try:
        state = run_training(config, stopper)
    except ReportedByAnotherProcess as said:
        return _status(said.error)
    except EXPECTED_ERRORS as error:
        told = "synpo-fast train: error:" if _status(error) == MISTAKE else "synpo-fast train:"
        print(f"{told} {printable(error)}", file=sys.stderr)
        return _status(error)
    except Exception as error:  # unexpected: the traceback is printed
        if lost_another_process(error):
            if config.verbose:
                traceback.print_exc()
            print(LOST_PROCESS, file=sys.stderr)
            return FAILED
        traceback.print_exc()
        print(UNEXPECTED_ERROR, file=sys.stderr)
        return FAILED
    return stopper.status if state.stopped_early else 0


def run_training(config: TrainConfig, stopper: Stopper | None = None) -> RunState:
    """Trains, writes the report, and returns the run's final state; with config.profile it measures steps instead.

    Every process of a launch calls it, once: DeepSpeed cannot start again in a process in which it has ended. Raises UserError,
    MissingPackage, TrainingStopped or CheckpointError with a message of one line, or ReportedByAnotherProcess in place of an
    error that another process of the launch also raises.
    """
    import torch

    deepspeed = sys.modules.get("deepspeed.comm.comm")
    if getattr(deepspeed, "cdb", None) is not None and not torch.distributed.is_initialized():
        raise UserError(
            "run_training was called before in this process, and DeepSpeed cannot start again in it: train the next run in a new "
            "process"
        )
    from synpo_fast.training.start import process_group

    with process_group(config) as device:
        return run_in_group(config, device, stopper)


def run_in_group(config: TrainConfig, device: torch.device, stopper: Stopper | None = None) -> RunState:
    """Does the same as run_training, in a process group that exists already."""
    if config.profile:
        # Imported only here, because torch's FLOP counter imports triton, which training on a CPU does not need.
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
