"""`synpo-fast pairs`: `import` converts rows of another format into a manifest, `check` finds problems in a manifest."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from synpo_fast.data.comparisons import filter_by_score_gap
from synpo_fast.data.manifest import write_manifest
from synpo_fast.data.row_files import files_with_rows
from synpo_fast.data.row_folders import named_split
from synpo_fast.errors import UserError
from synpo_fast.pairs.check import CheckReport, check_manifest, histogram
from synpo_fast.pairs.importers import IMPORTERS, ImportOptions, ImportResult, detect_format, import_pairs
from synpo_fast.terminal.printable import counted, printable, printable_line

SHOWN = 20
BAR_WIDTH = 40
CLEAN, PROBLEMS, USAGE = 0, 1, 2


def main(argv: list[str]) -> int:
    """Runs the command. Exit status: 0 clean, 1 rows refused or problems found, 2 a mistake in the call."""
    arguments = _parser().parse_args(argv)
    try:
        return _import(arguments) if arguments.command == "import" else _check(arguments)
    except (ValueError, ImportError, OSError) as error:
        print(f"synpo-fast pairs {arguments.command}: error: {printable(error)}", file=sys.stderr)
        return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="synpo-fast pairs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import", help="convert rows of another format into a manifest")
    bring.add_argument(
        "source",
        metavar="IN",
        type=Path,
        help="a .json, .jsonl, .csv, .parquet file, a folder of them, or FOLDER:SPLIT",
    )
    bring.add_argument("target", metavar="OUT", type=Path, help="the manifest to write, .jsonl")
    bring.add_argument(
        "--format",
        required=True,
        choices=["auto", *IMPORTERS],
        help="the format of IN; auto works only if exactly one fits",
    )
    bring.add_argument(
        "--video_root", type=Path, help="folder of the videos; needed for absolute paths and names without suffix"
    )
    bring.add_argument(
        "--min_score_gap", type=float, help="keep pairs whose scores differ by at least this much; SynPO used 4"
    )
    bring.add_argument(
        "--rejected", choices=["first", "all"], default="first", help="which of several rejected texts in a row to use"
    )
    bring.add_argument(
        "--responses",
        choices=["pair", "all"],
        default="pair",
        help="for several scored answers in a row (synpo): a pair of the best and the worst, or all as responses",
    )
    bring.add_argument(
        "--system", choices=["refuse", "fold", "drop"], default="refuse", help="what to do with a system message"
    )
    bring.add_argument("--allow_bad", action="store_true", help="write the good rows even if others were refused")
    bring.add_argument("--force", action="store_true", help="overwrite OUT; never an input")
    check = commands.add_parser("check", help="find problems in a manifest")
    check.add_argument("manifest", metavar="FILE", type=Path, help="a manifest, a folder, or FOLDER:SPLIT")
    check.add_argument("--video_root", type=Path, help="folder of the videos; without it they are not checked")
    check.add_argument("--decode", action="store_true", help="also decode the first and last frame of every video")
    check.add_argument(
        "--num_workers", type=int, default=_num_cores(), help="processes that check videos (%(default)s)"
    )
    check.add_argument("--model", help="hub name or folder: search the texts for its tokenizer's special tokens")
    check.add_argument("--json", action="store_true", help="print the report as JSON, with all examples")
    return parser


def _num_cores() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _import(arguments: argparse.Namespace) -> int:
    _check_target(arguments.source, arguments.target, force=arguments.force)
    options = ImportOptions(arguments.video_root, arguments.rejected, arguments.system, arguments.responses)
    name = arguments.format
    if name == "auto":
        name = detect_format(arguments.source, options)
    result = import_pairs(arguments.source, name, options)
    print(f"read {counted(result.num_rows, 'row')} as {name}: {counted(len(result.pairs), 'pair')}")
    _print_refusals(result)
    pairs = result.pairs
    if arguments.min_score_gap is not None:
        chosen = filter_by_score_gap(pairs, arguments.min_score_gap)
        pairs = chosen.kept
        print(f"dropped {counted(chosen.below, 'pair')} with a score gap below {arguments.min_score_gap:g}")
        if chosen.without_scores:
            print(f"dropped {counted(chosen.without_scores, 'pair')} without scores")
    if result.refused and not arguments.allow_bad:
        print("wrote nothing: rows were refused, and --allow_bad was not given")
        return PROBLEMS
    if not pairs:
        print("wrote nothing: no pairs are left")
        return PROBLEMS
    write_manifest(arguments.target, pairs)
    print(f"wrote {counted(len(pairs), 'pair')} to {printable(arguments.target)}")
    return CLEAN


def _check_target(source: Path, target: Path, *, force: bool) -> None:
    """Raises UserError for a target that must not be written. --force never allows that an input is overwritten."""
    if target.exists():
        for file in files_with_rows(source):
            if file.exists() and file.samefile(target):
                same = f"OUT {target} is the input" if file == target else f"OUT {target} is the input {file}"
                raise UserError(f"{same}: give another OUT, the input is never overwritten")
        if not force:
            raise UserError(f"{target} exists; pass --force to overwrite it")
    if target.suffix != ".jsonl":
        raise UserError(f"OUT must end in .jsonl, got {target}")


def _print_refusals(result: ImportResult) -> None:
    if result.refused:
        print(f"refused {counted(len(result.refused), 'row')}:")
        for reason, count in result.reasons.most_common():
            print(f"  {count:6d}  {printable_line(reason)}")
        print(f"the first {SHOWN} of them:" if len(result.refused) > SHOWN else "in full:")
        for row in result.refused[:SHOWN]:
            print(f"  {printable_line(row)}")
    if result.unused_keys:
        unused = ", ".join(f"{key} ({counted(count, 'row')})" for key, count in sorted(result.unused_keys.items()))
        print(f"not used: {printable_line(unused)}")


def _check(arguments: argparse.Namespace) -> int:
    if not named_split(arguments.manifest)[0].exists():
        raise FileNotFoundError(f"{arguments.manifest} does not exist")
    if arguments.video_root is not None and not arguments.video_root.is_dir():
        raise ValueError(f"video root {arguments.video_root} is not a folder")
    if arguments.num_workers < 1:
        raise ValueError(f"--num_workers must be positive, got {arguments.num_workers}")
    if arguments.decode and arguments.video_root is None:
        raise ValueError("--decode needs --video_root")
    report = check_manifest(
        arguments.manifest,
        video_root=arguments.video_root,
        decode=arguments.decode,
        num_workers=arguments.num_workers,
        model=arguments.model,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    print(json.dumps({**asdict(report), "clean": report.clean}, indent=2) if arguments.json else report_text(report))
    return CLEAN if report.clean else PROBLEMS


def _show_progress(done: int, total: int) -> None:
    print(
        f"\rchecked {done} of {counted(total, 'video')}",
        end="\n" if done == total else "",
        file=sys.stderr,
        flush=True,
    )


def report_text(report: CheckReport) -> str:
    rows, pairs = counted(report.num_rows, "row"), counted(report.num_pairs, "pair")
    lines = [f"{printable_line(report.file)}: {rows}, {pairs}"]
    train = "trains" if report.num_sft == 1 else "train"
    text_pairs = "is a text pair" if report.num_text_pairs == 1 else "are text pairs"
    lines.append(f"  {report.num_sft} {train} on chosen alone, {report.num_text_pairs} {text_pairs}")
    if report.num_desirable or report.num_undesirable:
        lines.append(
            f"  {counted(report.num_desirable, 'desirable response')}, {counted(report.num_undesirable, 'undesirable response')}"
        )
    seen = "all checked" if report.videos_checked else "not checked: give --video_root"
    if report.num_with_responses:
        rows = counted(report.num_with_responses, "row")
        lines.append(f"  {rows} with several responses, {report.num_responses} responses in all")
    lines.append(f"  {counted(report.num_videos, 'different video')}, {seen}")
    if report.words:
        lines.append("words" + "".join(f"{name:>8}" for name in next(iter(report.words.values()))))
        for name, quantiles in report.words.items():
            lines.append(f"  {name:<9}" + "".join(f"{value:8d}" for value in quantiles.values())[6:])
    if report.chosen_longer is not None:
        lines.append(f"chosen is longer than rejected in {report.chosen_longer:.1%} of pairs")
    if report.score_gaps:
        lines.append(f"score gap, chosen minus rejected, of {counted(len(report.score_gaps), 'pair')}")
        bins = histogram(report.score_gaps)
        most = max(count for _, _, count in bins)
        for low, high, count in bins:
            bar = "#" * round(BAR_WIDTH * count / most)
            lines.append(f"  {low:8g} to {high:<8g} {count:8d} {bar}".rstrip())
    for finding in report.findings:
        lines.append(f"{'PROBLEM' if finding.is_problem else 'note'}: {finding.what}: {finding.count}")
        lines += [f"  {printable_line(example)}" for example in finding.examples[:SHOWN]]
        if finding.count > SHOWN:
            lines.append(f"  ... and {finding.count - SHOWN} more")
    lines.append("clean" if report.clean else "not clean")
    return "\n".join(lines)
