"""The published figures equal the stored JSON: every table of results in benchmarks/README.md and in README.md.

benchmarks/README.md holds all of them. README.md may hold fewer rows and columns of the same tables, with the same names.
"""

import json
import re
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from benchmarks.head import readme_table

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "benchmarks/README.md")}
DETAILED = DOCUMENTS["benchmarks/README.md"].split("\n## Results on two CPU cores")[1]
STEPS = {
    "TRL 1.16 DPO, reference = adapter off": "trl-dpo-adapter-off",
    "the same, its head on response tokens only, as TRL does on a GPU": "trl-dpo-valid-rows",
    "TRL DPO, frozen copy": "trl-dpo-frozen-copy",
    "TRL DPO, reference precomputed": "trl-dpo-precomputed",
    "Liger 0.8.5 fused DPO, compiled, adapter off": "liger-dpo",
    "TRL SimPO": "trl-simpo",
    "SynPO as its authors released it": "synpo-released",
    "synpo_fast SynPO, prompt run for each response": "synpo-fast-unshared",
    "synpo_fast SynPO": "synpo-fast",
    "synpo_fast SynPO, features of the frozen tower cached": "synpo-fast-cached",
    "synpo_fast DPO, adapter off": "synpo-fast-dpo",
    "synpo_fast DPO, reference precomputed": "synpo-fast-dpo-precomputed",
}
CODECS = {"h264": "H.264", "hevc": "HEVC", "vp9": "VP9", "mjpeg": "MJPEG", "av1": "AV1"}
Cells = dict[str, str]  # of a row, by column; a column's second occurrence has a 2 behind its name


def stored(name: str) -> dict:
    return json.loads((ROOT / "benchmarks/results/cpu" / f"{name}.json").read_text())


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["name"]: row for row in rows}


def interval(row: dict) -> str:
    return f"{row['ratio']:.2f}x ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})"


def size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def step_cells() -> dict[str, Cells]:
    record = stored("throughput")
    rows = by_name(record["runs"][0]["rows"])
    return {
        label: {
            "step": f"{1e3 * rows[name]['seconds']['median']:.0f} ms",
            "pairs/s": f"{rows[name]['pairs_per_s']:.2f}",
            "peak memory": size(rows[name]["peak_memory_bytes"]),
            "GFLOP": f"{rows[name]['flops'] / 1e9:.0f}",
            "speed-up": "1.00x" if name == record["baseline"] else interval(rows[name]),
            "theory": f"{rows[name]['limit']:.2f}x",
        }
        for label, name in STEPS.items()
    }


SEVERAL = {
    "TRL 1.16 DPO, reference = adapter off, 45 pairs": "trl-dpo-adapter-off",
    "synpo_fast DPO, adapter off, 45 pairs": "synpo-fast-dpo",
    "synpo_fast SynPO, 45 pairs": "synpo-fast",
    "synpo_fast DPO, adapter off, one row": "synpo-fast-responses-dpo",
    "synpo_fast SynPO, one row": "synpo-fast-responses",
}


def several_cells() -> dict[str, Cells]:
    record = stored("responses")
    rows = by_name(record["runs"][0]["rows"])
    return {
        label: {
            "step": f"{rows[name]['seconds']['median']:.2f} s",
            "pairs/s": f"{rows[name]['pairs_per_s']:.1f}",
            "peak memory": size(rows[name]["peak_memory_bytes"]),
            "GFLOP": f"{rows[name]['flops'] / 1e9:.1f}",
            "speed-up": "1.00x" if name == record["baseline"] else interval(rows[name]),
            "theory": f"{rows[name]['limit']:.2f}x",
        }
        for label, name in SEVERAL.items()
    }


def decoding_cells() -> dict[str, Cells]:
    """The cells of the table of decoding, by clip and number of wanted frames in one string."""

    def times(row: dict) -> str:
        middle, low, high = (f"{1e3 * row['seconds'][which]:.0f}" for which in ("median", "low", "high"))
        return f"{middle} ms ({low}–{high})"

    cells: dict[str, Cells] = {}
    for case in stored("decode")["cases"]:
        rows = by_name(case["rows"])
        clip = (
            f"{CODECS[case['codec']]} {case['width']}x{case['height']}, {case['seconds']} s, "
            f"keyframe every {case['keyframe_every'] / case['fps']:g} s"
        )
        wanted = f"{case['num_wanted']} of {case['num_frames']:,}"
        speedup = f"{rows['pyav']['speedup']:.2f}x"
        cells[f"{clip} | {wanted}"] = {
            "wanted": wanted, "baseline": times(rows["baseline"]), "the baseline": times(rows["baseline"]),
            "synpo_fast": times(rows["pyav"]), "speed-up": speedup, "": speedup,
        }  # fmt: skip
    return cells


def gain(run: dict, loss: str = "synpo") -> float:
    return 100 * (run["accuracy"][loss] - run["accuracy"]["warm_up"])


def demo_cells() -> dict[str, Cells]:
    first, *again = stored("demo")["runs"]
    cells = {}
    for place, run in enumerate(first):
        shares, nll = ({name: run[key][name] for name in ("warm_up", "synpo", "dpo")} for key in ("accuracy", "nll"))
        cells[str(run["seed"])] = {
            "warm-up": f"{shares['warm_up']:.1%}".replace("%", " %"),
            "SynPO": f"{shares['synpo']:.1%}".replace("%", " %"),
            "DPO": f"{shares['dpo']:.1%}".replace("%", " %"),
            "NLL: warm-up": f"{nll['warm_up']:.3f}",
            "SynPO 2": f"{nll['synpo']:.3f}",
            "DPO 2": f"{nll['dpo']:.3f}",
            "gain of SynPO, points": f"{gain(run):+.1f}",
            "again, twice": ", ".join(f"{gain(runs[place]):+.1f}" for runs in again),
        }
    return cells


TABLES = {"variant": step_cells, "ten responses": several_cells, "clip": decoding_cells, "seed": demo_cells}


def tables(text: str, first_column: str) -> list[dict[str, Cells]]:
    """Every table with this first column: its rows by label, without bold type."""
    found = []
    for block in re.findall(rf"^\| {first_column} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.M):
        header = next(
            line for line in text[: text.index(block)].splitlines()[::-1] if line.startswith(f"| {first_column} ")
        )
        seen: Counter[str] = Counter()
        columns = []
        for column in (cell.strip() for cell in header[1:-1].split("|")):
            seen[column] += 1
            columns.append(column if seen[column] == 1 else f"{column} {seen[column]}")
        rows = {}
        for line in block.splitlines():
            cells = dict(zip(columns, (cell.strip() for cell in line.replace("**", "")[1:-1].split("|")), strict=True))
            label = cells.pop(first_column)
            rows[f"{label} | {cells['wanted']}" if first_column == "clip" else label] = cells
        found.append(rows)
    return found


@pytest.mark.parametrize("first_column", TABLES)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_table_of_results_is_that_of_the_stored_json(document, first_column):
    expected = TABLES[first_column]()
    text = DETAILED if document == "benchmarks/README.md" else DOCUMENTS[document]
    found = tables(text, first_column)
    if document == "benchmarks/README.md":
        assert len(found) == 1
        if first_column != "clip":  # the page shows some of the 22 cases
            assert list(found[0]) == list(expected)
    for table in found:
        for label, cells in table.items():
            assert label in expected, f"{label!r} is no row of benchmarks/README.md's table"
            assert cells == {column: expected[label][column] for column in cells}, label


def test_what_is_said_beside_the_tables_is_in_the_stored_json():
    said = []
    for run in stored("throughput")["runs"][1:]:
        rows = by_name(run["rows"])
        said += [interval(rows["synpo-fast"]), interval(rows["synpo-fast-unshared"])]
    for sweep in stored("throughput-sweeps")["sweeps"]:
        ends = [by_name(point["rows"])["synpo-fast"] for point in (sweep["points"][0], sweep["points"][-1])]
        said += [f"{row['ratio']:.2f}x" for row in ends]
        if sweep["name"] == "frames":
            said.append(f"we measure {ends[0]['ratio']:.2f}x; FLOP counts predict {ends[0]['limit']:.2f}x")
    apart, together = stored("responses-best-rest")["runs"][0]["rows"]
    said += [f"{together['flops'] / apart['flops']:.2f} of the FLOPs of nine separate pairs", interval(together)]
    sharing = stored("prefix_sharing")
    said += [f"{sharing['ratio']:.2f}x", f"{sharing['limit']:.2f}x"]
    said += [f"{median(sharing['seconds'][name]):.2f} s" for name in ("shared", "unshared")]
    runs = [run for repetition in stored("demo")["runs"] for run in repetition]
    gains, falls = sorted(map(gain, runs)), sorted(1 - run["nll"]["synpo"] / run["nll"]["warm_up"] for run in runs)
    of_dpo = sorted(gain(run, "dpo") for run in runs)
    said += [f"gains {gains[0]:.1f} to {gains[-1]:.1f}", f"gains {of_dpo[0]:.1f} to {of_dpo[-1]:.1f}"]
    said.append(f"falls by {100 * falls[0]:.0f} to {100 * falls[-1]:.0f} %")
    for case in stored("pairs")["pairs"]:
        said += [
            f"{case['ratio_to_liger']['time']:.2f}x the time and {case['ratio_to_liger']['peak_extra']:.3f}x the extra"
        ]
    cases = stored("decode")["cases"]
    slowest = min(by_name(case["rows"])["pyav"]["speedup"] for case in cases)
    said.append(f"The slowest of {len(cases)} cases is {slowest:.2f}x")
    text = " ".join(DETAILED.split())
    assert not [words for words in said if words not in text]


def test_the_tables_of_the_fused_head_are_written_from_the_stored_json():
    text = DOCUMENTS["benchmarks/README.md"]
    assert readme_table.page(text, stored("kernels")) == text, "the tables are stale: run `make docs`"


def test_what_the_readme_says_of_the_fused_head_is_in_the_stored_json():
    cases = stored("kernels")["cases"]
    wanted = ("bf16", "frozen", "train")
    rows = by_name(next(case for case in cases if (case["dtype"], case["head"], case["mode"]) == wanted)["rows"])
    own, liger = rows["synpo-native"], rows["liger-preference"]
    assert f"{own['ratio_to_floor']:.2f} times their time" in DOCUMENTS["README.md"]
    assert f"computes all rows, ignored ones (75 %) too: {liger['ratio_to_floor']:.2f} times" in DOCUMENTS["README.md"]
    assert f"{size(own['peak_extra_bytes'])} against {size(liger['peak_extra_bytes'])}" in DOCUMENTS["README.md"]


def test_every_speed_up_in_the_readme_is_among_the_detailed_results():
    section = DOCUMENTS["README.md"]
    assert not set(re.findall(r"\d+\.\d\dx", section)) - set(re.findall(r"\d+\.\d\dx", DETAILED))
