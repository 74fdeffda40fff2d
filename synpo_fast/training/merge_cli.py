"""`synpo-fast merge ADAPTER OUT`: base model + adapter -> one model folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from synpo_fast.printable import printable


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="synpo-fast merge", description=__doc__)
    parser.add_argument("adapter", type=Path, help="a checkpoint folder of a run with use_peft=true")
    parser.add_argument("out", type=Path, help="where the merged model goes; must not exist")
    parser.add_argument("--model_name_or_path", help="the base model; default: the one the adapter names")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 of the saved weights; the sum is done in float32")
    arguments = parser.parse_args(argv)
    if arguments.out.exists():
        print(f"synpo-fast merge: error: {arguments.out} exists", file=sys.stderr)
        return 2
    if not (arguments.adapter / "adapter_config.json").is_file():
        print(f"synpo-fast merge: error: {arguments.adapter} holds no adapter_config.json", file=sys.stderr)
        return 2
    from synpo_fast.training.model_files import merge_adapter

    try:
        merge_adapter(
            arguments.adapter,
            arguments.out,
            model_name_or_path=arguments.model_name_or_path,
            dtype=arguments.dtype or "float32",
        )
    except ValueError as error:
        print(f"synpo-fast merge: error: {printable(error)}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.out}")
    return 0
