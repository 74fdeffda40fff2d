"""README.md names every loss, option and default as the code has them, and none besides."""

import ast
import dataclasses
import re
from pathlib import Path

import torch

from synpo_fast import losses
from synpo_fast.losses.nll import REDUCES, TARGETS

README = (Path(__file__).parents[2] / "synpo_fast" / "losses" / "README.md").read_text()


def table(header: str) -> list[list[str]]:
    lines = README.splitlines()
    rows = []
    for line in lines[lines.index(header) + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def test_the_table_of_losses():
    rows = table("| loss | formula | options and defaults | reference | reads | reward | its unit |")
    assert [code(row[0])[0] for row in rows] == list(losses.LOSSES)
    for name, formula, options, reference, reads, reward, unit in rows:
        spec = losses.LOSSES[code(name)[0]]
        assert code(formula) == [spec.formula]
        documented = dict(option.split("=") for option in code(options))
        assert {key: ast.literal_eval(value) for key, value in documented.items()} == spec.options
        assert (reference == "yes") == spec.needs_reference
        assert reads == spec.reads
        assert code(reward) == [spec.reward] and unit == spec.reward_unit


def test_the_table_of_the_auxiliary_nll():
    rows = table("| option | default | values |")
    documented = {code(option)[0]: ast.literal_eval(code(default)[0]) for option, default, _ in rows}
    assert documented == {field.name: field.default for field in dataclasses.fields(losses.AuxiliaryNLL)}
    values = {code(option)[0]: tuple(map(ast.literal_eval, code(cell))) for option, _, cell in rows if "`" in cell}
    assert values == {"target": TARGETS, "reduce": REDUCES}


def test_the_values_an_option_takes():
    lines = {code(line)[0]: code(line)[1:] for line in README.splitlines() if line.startswith("- `")}
    every_option = {option for spec in losses.LOSSES.values() for option in spec.options}
    assert set(lines) <= every_option
    documented = {key: tuple(map(ast.literal_eval, values)) for key, values in lines.items() if values}
    expected: dict[str, tuple[str, ...]] = {}
    for spec in losses.LOSSES.values():
        for key, words in spec.choices.items():
            if words != expected.get(key):
                expected[key] = expected.get(key, ()) + words
    assert documented == expected


def test_metrics_are_all_named():
    logps = [torch.tensor([-1.0])]
    policy = losses.PairLogprobs.from_pairs([(logps[0], logps[0])], ground_truth=logps)
    auxiliary = losses.AuxiliaryNLL("ground_truth")
    metrics = losses.preference_loss("synpo", policy, auxiliary=auxiliary).metrics
    section = README.split("## Metrics")[1].split("\n\n")[1]
    assert set(code(section)) == set(metrics)
