"""Runs of different losses on one page: no axis and no row of a table mixes their units without saying so."""

import re

import pytest

from tests.report.runs import make_run, step_row
from tests.report.test_report import Page, report

# What each loss's numbers look like: means and probabilities beside sums.
SCALES = {"synpo": (0.2, -1.5), "simpo": (-3.0, -1.5), "dpo": (10.4, -255.0)}
NAMES = ("rewards/margins", "logps/chosen")


def run_of(folder, loss, *, num_steps=12, **options):
    rows = [step_row(step, num_steps) for step in range(1, num_steps + 1)]
    margin, logp = SCALES[loss]
    for row in rows:
        row |= {"rewards/margins": margin, "logps/chosen": logp}
    return make_run(folder, rows=rows, num_steps=num_steps, loss_type=loss, **options)


def axes(page, title):
    """(lowest, highest, names of its lines) of each chart whose title begins so."""
    found = []
    for svg in re.findall(r"<svg .*?</svg>", page.source, re.S):
        label = re.search(r'aria-label="([^"]*)"', svg)[1]
        if label.startswith(title):
            low, high = map(float, re.search(r'data-y="(\S+) (\S+)', svg).groups())
            found.append((low, high, re.findall(r'data-name="([^"]*)"', svg), label))
    return found


@pytest.fixture
def page(tmp_path):
    return report(*(run_of(tmp_path / loss, loss) for loss in SCALES), out=tmp_path / "page.html")


def test_series_of_different_units_have_axes_of_their_own(page):
    found = axes(page, "Reward margin")
    assert [names for *_, names, _ in found] == [["synpo margin"], ["simpo margin"], ["dpo margin"]]
    for (low, high, *_), (margin, _) in zip(found, SCALES.values(), strict=True):
        assert low <= margin <= high and high - low < 1.5 * abs(margin)
    labels = [label for *_, label in found]
    assert "(probability)" in labels[0] and "(beta·nats per token, beta=2)" in labels[1]
    assert "(beta·nats over the reference, beta=0.1)" in labels[2]
    # Log-probs: two losses read means, one reads sums.
    logps = axes(page, "Log-prob of each response")
    assert [[name.split()[0] for name in names[::2]] for *_, names, _ in logps] == [["synpo", "simpo"], ["dpo"]]
    assert logps[0][0] > -10 and logps[1][0] < -200
    # What means the same everywhere is drawn once, for all.
    assert [len(names) for *_, names, _ in axes(page, "Pairs ranked correctly")] == [3]
    assert [len(names) for *_, names, _ in axes(page, "NLL")] == [3]
    assert len(axes(page, "Loss")) == len(axes(page, "Gradient norm")) == 3


def test_a_table_row_names_the_units_of_its_cells(page):
    numbers = page.text[page.text.index("at the end") :]
    assert (
        "reward margin 0.2 probability -3 beta·nats per token, beta=2 10.4 beta·nats over the reference, beta=0.1"
        in numbers
    )
    assert "log-prob, chosen -1.5 nats per token -1.5 nats per token -255 nats per response" in numbers
    assert "pairs ranked correctly 90 % 90 % 90 %" in numbers


def test_runs_of_one_loss_share_axes_unless_beta_scales_their_rewards(tmp_path):
    same = report(*(run_of(tmp_path / name, "dpo", learning_rate=1e-5 * int(name)) for name in "123"))
    assert [len(names) for *_, names, _ in axes(same, "Reward margin")] == [3]
    assert "reward margin beta·nats over the reference, beta=0.1 10.4 10.4 10.4" in same.text
    other = report(tmp_path / "1", run_of(tmp_path / "4", "dpo", beta=0.5))
    assert [names for *_, names, _ in axes(other, "Reward margin")] == [["1 margin"], ["4 margin"]]


def test_a_sum_of_losses_is_named_by_its_members_and_weights(tmp_path):
    def one(name, **options):
        rows = [
            step_row(step, 12) | {"rewards/margins": 1.0, "loss/dpo": 0.7, "loss/sft": 2.5} for step in range(1, 13)
        ]
        return make_run(tmp_path / name, rows=rows, num_steps=12, loss_type="dpo,sft", **options)

    runs = [
        one("1", loss_weights=(0.8, 0.2)),
        one("2", loss_weights=(0.8, 0.2)),
        one("3"),
        one("4", beta=0.5),
    ]
    page = report(*runs)
    found = axes(page, "loss/sft")
    assert [names for *_, names, _ in found] == [["1 loss/sft", "2 loss/sft"], ["3 loss/sft", "4 loss/sft"]]
    assert "(of the 0.8 dpo + 0.2 sft loss)" in found[0][3] and "(of the 1 dpo + 1 sft loss)" in found[1][3]
    assert [names for *_, names, _ in axes(page, "Reward margin")] == [
        ["1 margin", "2 margin", "3 margin"],
        ["4 margin"],
    ]


def test_one_run_names_its_units(tmp_path):
    page = report(run_of(tmp_path / "run", "dpo", beta=0.25))
    assert axes(page, "Reward margin")[0][3] == "Reward margin: chosen minus rejected"
    assert page.text.count("beta·nats over the reference, beta=0.25") == 5  # 3 rows of the table, 2 axes
    assert "log-prob, chosen nats per response -255" in page.text


@pytest.mark.parametrize("content", [None, b"loss_type: ppo\n", b"loss_type: [1]\n", b"beta: 0.1\n"])
def test_an_old_run_whose_loss_is_not_known_stands_alone(tmp_path, content):
    folders = [run_of(tmp_path / name, "dpo") for name in ("a", "b")]
    for folder in folders:
        (folder / "config.yaml").unlink()
        if content is not None:
            (folder / "config.yaml").write_bytes(content)
    page = report(*folders)
    assert [names for *_, names, _ in axes(page, "Reward margin")] == [["a margin"], ["b margin"]]
    assert "reward margin 10.4 unit not known 10.4 unit not known" in page.text
    assert axes(report(folders[0]), "Reward margin") and "unit not known" in Page(folders[0] / "report.html").text


@pytest.mark.parametrize("content", [b"loss_type: dpo\nbeta: lots\nvariant: 3\nauxiliary_nll: .inf\n"])
def test_options_that_are_no_numbers_are_left_to_the_loss(tmp_path, content):
    folder = run_of(tmp_path / "a", "dpo")
    (folder / "config.yaml").write_bytes(content)
    assert "beta·nats over the reference, beta=0.1" in report(folder).text
