"""`synpo-fast merge ADAPTER OUT`: adds an adapter to its base model and saves the result as one model folder."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from synpo_fast.errors import MissingPackage, UserError
from synpo_fast.terminal.console import hide_bars_of_libraries, hide_notes_to_developers
from synpo_fast.terminal.printable import printable


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0 if OUT was written, 1 if it could not be written, 2 for a mistake in the call."""
    parser = argparse.ArgumentParser(prog="synpo-fast merge", description=__doc__)
    parser.add_argument("adapter", type=Path, help="a checkpoint folder of a run with use_peft=true")
    parser.add_argument("out", type=Path, help="folder for the merged model: a new or an empty one")
    parser.add_argument("--model_name_or_path", help="the base model; default: the one that the adapter names")
    parser.add_argument(
        "--dtype", help="type of the saved weights: float32 (default), bfloat16 or float16; merging is done in float32"
    )
    arguments = parser.parse_args(argv)
    try:
        if not (arguments.adapter / "adapter_config.json").is_file():
            raise UserError(_why_no_adapter(arguments.adapter))
        with _new_folder(arguments.out) as partial:
            hide_notes_to_developers()
            hide_bars_of_libraries()
            from synpo_fast.run_folder.model_files import merge_adapter

            merge_adapter(
                arguments.adapter,
                partial,
                model_name_or_path=arguments.model_name_or_path,
                dtype=arguments.dtype or "float32",
            )
    except (UserError, MissingPackage) as error:
        print(f"synpo-fast merge: error: {printable(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"synpo-fast merge: {arguments.out} could not be written: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.out}")
    return 0


def _why_no_adapter(folder: Path) -> str:
    from synpo_fast.run_folder.checkpoint import list_checkpoints, why_no_folder

    if (instead := why_no_folder(folder)) is not None:
        return f"{folder} {instead}: give a checkpoint-N folder with an adapter"
    inside = [each for each in list_checkpoints(folder) if (each / "adapter_config.json").is_file()]
    if inside:
        return f"{folder} is the folder of a run: give one of its checkpoints, {inside[-1]} is the newest"
    return f"{folder} holds no adapter_config.json: give a checkpoint-N folder with an adapter"


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out`, which is renamed to `out` at the end, so a merge that fails leaves nothing.

    Raises UserError, before a model is loaded, if `out` is not new or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty: give a new folder")
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True)
        (partial / ".writable").touch()
        (partial / ".writable").unlink()
    except FileExistsError as error:
        raise UserError(
            f"{partial} belongs to a merge that was interrupted or is still running: delete it once no merge is running"
        ) from error
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another place") from error
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
