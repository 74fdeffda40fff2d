"""benchmarks/kernels.py: its JSON, the wrong results it does not show, its alternating order. No test asserts a time."""

import gc
import json
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.common import format_table, write_json
from benchmarks.contest import Options, Step, Unavailable, run_contest
from benchmarks.head import pairs, readme_table
from benchmarks.head.problem import (
    IGNORE_INDEX,
    TARGET_ENTROPY,
    Result,
    errors,
    fp64_truth,
    make_inputs,
    valid_mask,
    why_wrong,
)
from benchmarks.head.providers import DEFAULT, PROVIDERS, computes, liger, peers
from benchmarks.head.providers.torch_only import eager_valid_rows, gemm_floor
from benchmarks.head.shapes import Shape, find_shapes
from synpo_fast.profiling.counted_flops import count_flops

CPU = torch.device("cpu")
OPTIONS = Options(device=CPU, rounds=2, budget_seconds=5.0)
# Small, and odd so that nothing divides evenly.
SHAPE = Shape("tiny", 24, 301)


@pytest.fixture(autouse=True)
def quick():
    """One thread, as tiny tensors gain nothing from more. Freezes live objects, so that memory readings collect garbage fast."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def wrong(inputs):
    """A provider whose log-probs are off by a quarter, like those of a fused head with a broken softmax."""
    right = eager_valid_rows(inputs)

    def run():
        result = right.run()
        return Result(result.log_probs * 1.25, result.grad_hidden, result.grad_weight)

    return Step(run, "wrong on purpose")


def not_finite(inputs):
    right = eager_valid_rows(inputs)

    def run():
        result = right.run()
        return Result(result.log_probs, result.grad_hidden * float("nan"), result.grad_weight)

    return Step(run, "NaN on purpose")


def missing(inputs):
    import a_package_that_nobody_has  # noqa: F401

    raise AssertionError("not reached")


def crashing(inputs):
    def run():
        raise RuntimeError("out of luck")

    return Step(run, "crashes on purpose")


def run_cases(providers, heads=("frozen",), modes=("train",), dtype="fp32"):
    problem = kernels.Problem(SHAPE, 64, 0.25, dtype)
    return list(kernels.run_problem(problem, heads, modes, providers, OPTIONS))


def by_name(case):
    return {row["name"]: row for row in case["rows"]}


@pytest.fixture(scope="module")
def cases():
    providers = {
        "gemm-floor": gemm_floor,
        "eager-valid-rows": eager_valid_rows,
        "wrong": wrong,
        "not-finite": not_finite,
        "missing": missing,
        "crashing": crashing,
    }
    return run_cases(providers, heads=("frozen", "trainable"), modes=("train", "no_grad"))


def test_the_cases_follow_the_schema(cases, tmp_path):
    assert [(case["head"], case["mode"]) for case in cases] == [
        ("frozen", "train"),
        ("trainable", "train"),
        ("frozen", "no_grad"),
    ]
    for case in cases:
        assert (case["shape"], case["D"], case["V"], case["N"], case["valid"]) == ("tiny", 24, 301, 64, 0.25)
        assert case["valid_rows"] == 16
        for row in case["rows"]:
            assert {"name", "setting", "seconds", "ratio_to_floor", "peak_extra_bytes", "error", "skipped"} <= set(row)
            assert (row["seconds"] is None) == (row["skipped"] is not None)
        right = by_name(case)["eager-valid-rows"]
        assert right["seconds"]["low"] <= right["seconds"]["median"] <= right["seconds"]["high"]
        assert right["ratio_to_floor"] > 0 and right["peak_extra_bytes"] > 0
        expected = {"log_probs"} if case["mode"] == "no_grad" else {"log_probs", "grad_hidden"}
        assert set(right["error"]) == expected | ({"grad_weight"} if case["head"] == "trainable" else set())
        assert max(right["error"].values()) < 1e-5
    write_json(tmp_path / "out.json", {"cases": cases})
    assert json.loads((tmp_path / "out.json").read_text())["cases"] == cases


@pytest.mark.parametrize("name", ["wrong", "not-finite"])
def test_a_wrong_result_shows_no_speed(cases, name):
    row = by_name(cases[0])[name]
    assert row["skipped"].startswith("WRONG") and row["faulty"]
    assert row["seconds"] is None and row["ratio_to_floor"] is None and row["peak_extra_bytes"] is None
    assert row["error"]
    line = next(line for line in kernels.case_table(cases[0]).splitlines() if line.startswith(name))
    assert "WRONG" in line and " ms" not in line and " us" not in line


def test_a_result_that_turns_wrong_later_shows_no_speed():
    calls = []

    def turning(inputs):
        right = eager_valid_rows(inputs)

        def run():
            calls.append(None)
            result = right.run()
            return result if len(calls) <= 3 else Result(result.log_probs + 1, result.grad_hidden)

        return Step(run, "right at first")

    (case,) = run_cases({"gemm-floor": gemm_floor, "turning": turning})
    assert by_name(case)["turning"]["skipped"].startswith("WRONG")
    assert by_name(case)["turning"]["seconds"] is None


def test_a_missing_package_and_a_crash_are_rows_that_say_why(cases):
    row = by_name(cases[0])["missing"]
    assert "a_package_that_nobody_has" in row["skipped"] and not row["faulty"] and row["seconds"] is None
    row = by_name(cases[0])["crashing"]
    assert row["skipped"] == "RuntimeError: out of luck" and row["faulty"]


def test_only_our_own_faults_fail_the_run(cases):
    assert kernels.faulty_of_ours(cases) == []
    renamed = [{**case, "rows": [{**by_name(case)["wrong"], "name": "synpo-native"}]} for case in cases[:1]]
    assert len(kernels.faulty_of_ours(renamed)) == 1


def test_columns_of_a_table_are_padded():
    assert format_table(["a", "b"], [["long", "x"]]) == "a     b\nlong  x"


def test_the_truth_is_what_autograd_gives_in_fp64():
    inputs = make_inputs(SHAPE, num_rows=2048 + 30, valid=0.1, dtype=torch.float64, device=CPU)
    case = inputs.case(head="trainable", mode="train")
    truth = fp64_truth(case, num_rows=50, num_vocabulary=40)
    found = errors(eager_in_fp64(case), truth, case)
    assert set(found) == {"log_probs", "grad_hidden", "grad_weight"} and max(found.values()) < 1e-12


def eager_in_fp64(inputs):
    labels = inputs.labels.clamp(min=0)
    log_probs = (inputs.hidden @ inputs.weight.T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    log_probs = log_probs * (inputs.labels != IGNORE_INDEX)
    grads = torch.autograd.grad(log_probs, [inputs.hidden, inputs.weight], inputs.upstream.double())
    return Result(log_probs.detach(), *grads)


def test_an_ignored_row_that_is_not_zero_is_an_error():
    inputs = make_inputs(SHAPE, num_rows=64, valid=0.25, dtype=torch.float32, device=CPU)
    case = inputs.case(head="frozen", mode="train")
    truth = fp64_truth(case, num_rows=16, with_weight=False)
    right = eager_valid_rows(case).run()
    spoilt = right.grad_hidden + (case.labels == IGNORE_INDEX)[:, None] * right.grad_hidden.abs().max()
    eager = errors(right, truth, case)
    assert why_wrong(eager, eager, torch.float32) is None
    assert "grad_hidden" in why_wrong(errors(Result(right.log_probs, spoilt), truth, case), eager, torch.float32)
    with pytest.raises(ValueError, match="got nothing"):
        errors(Result(right.log_probs), truth, case)


@pytest.mark.parametrize("num_rows, share, expected", [(2048, 0.25, 512), (5, 0.05, 1), (1030, 1.0, 1030), (1, 0.5, 1)])
def test_the_share_of_valid_rows(num_rows, share, expected):
    # 5 rows at 5 %: never none; 1030: a second, short sequence.
    assert valid_mask(num_rows, share).sum() == expected


@pytest.mark.parametrize("num_rows, share", [(8, 0.0), (8, 1.5), (8, -1.0), (0, 0.5)])
def test_a_bad_share_or_row_count_is_refused(num_rows, share):
    with pytest.raises(ValueError, match=r"share|rows"):
        valid_mask(num_rows, share)


def test_the_inputs_are_a_language_models():
    inputs = make_inputs(Shape("wider", 64, 4000), num_rows=512, valid=0.5, dtype=torch.float32, device=CPU)
    log_probs = (inputs.hidden @ inputs.weight.T).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    assert abs(entropy - TARGET_ENTROPY) < 0.5
    valid = inputs.labels != IGNORE_INDEX
    assert (inputs.upstream[~valid] == 0).all()
    upstream = inputs.upstream[valid]
    assert (upstream < 0).any() and (upstream > 0).any() and upstream.unique().numel() > 200
    again = make_inputs(Shape("wider", 64, 4000), num_rows=512, valid=0.5, dtype=torch.float32, device=CPU)
    assert torch.equal(again.hidden, inputs.hidden) and torch.equal(again.labels, inputs.labels)


@pytest.mark.parametrize(
    "name, package",
    [
        ("eager-all-rows", "torch"),
        ("torch-compile", "torch"),
        ("torch-compile-max-autotune", "torch"),
        ("torch-linear-ce", "torch"),
        ("torch-linear-ce-chunked", "torch"),
        ("liger-scaled", "liger_kernel"),
        ("cut-cross-entropy", "cut_cross_entropy"),
        ("liger-preference", "liger_kernel"),
        ("trl-fused-head", "trl"),
    ],
)
def test_the_peers_compute_the_same_thing(name, package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    if name.startswith("torch-linear-ce") and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no F.linear_cross_entropy")
    with torch.compiler.set_stance("force_eager"):  # the compiler takes longer than the whole test
        for case in run_cases({name: PROVIDERS[name]}, heads=("frozen", "trainable"), modes=("train", "no_grad")):
            row = by_name(case)[name]
            assert row["skipped"] is None, row["skipped"]
            assert row["setting"] and row["seconds"] is not None
            assert all(tried["skipped"] is None for tried in row.get("tried", []))


@pytest.mark.parametrize("name", ["torch-linear-ce", "torch-linear-ce-chunked"])
def test_a_torch_without_linear_cross_entropy_says_so(name, monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    (case,) = run_cases({name: PROVIDERS[name]})
    row = by_name(case)[name]
    assert "has no F.linear_cross_entropy" in row["skipped"] and not row["faulty"]


def test_on_a_hopper_gpu_ligers_scaled_head_names_what_it_needs(monkeypatch):
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed")
    inputs = make_inputs(SHAPE, num_rows=64, valid=0.25, dtype=torch.float32, device=CPU)
    hopper = types.SimpleNamespace(hidden=types.SimpleNamespace(device=torch.device("cuda"), dtype=inputs.hidden.dtype))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(Unavailable, match=r"bf16 only, not torch\.float32"):
        liger.liger_scaled(hopper)
    hopper.hidden.dtype = torch.bfloat16
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="nvidia-cutlass-dsl"):
        liger.liger_scaled(hopper)


@pytest.mark.parametrize("num_wrong, kept", [(0, "fast"), (1, "middle"), (2, "slow"), (3, None)])
def test_of_several_settings_the_fastest_right_one_competes(num_wrong, kept):
    seconds = {"slow": 3.0, "middle": 2.0, "fast": 1.0}
    right = {name: i >= num_wrong for i, name in enumerate(reversed(seconds))}

    def setting(name):
        def run():
            return name

        return Step(run, name)

    def judge(name):
        return {"error": 0.0}, None if right[name] else "on purpose"

    (row,) = run_contest(
        {"peer": lambda: [setting(name) for name in seconds]},
        judge, floor="none", options=OPTIONS, timer=lambda call: seconds[call()],
    )  # fmt: skip
    assert [tried["setting"] for tried in row["tried"]] == list(seconds)
    assert [tried["seconds"] for tried in row["tried"]] == [seconds[n] if right[n] else None for n in seconds]
    if kept is None:
        assert row["skipped"] == "WRONG: on purpose" and row["seconds"] is None
    else:
        assert row["setting"] == kept and row["seconds"]["median"] == seconds[kept] and row["skipped"] is None


def test_ligers_kernel_in_the_interpreter(monkeypatch):
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton was imported without its interpreter")
    monkeypatch.setattr(liger, "need_cuda", lambda inputs, what: None)
    for case in run_cases({"liger": PROVIDERS["liger"]}, heads=("frozen", "trainable")):
        row = by_name(case)["liger"]
        assert row["skipped"] is None, row["skipped"]
        assert ("float32" in row["setting"]) == (case["head"] == "trainable")


def test_quack_is_called_by_its_contract(monkeypatch):
    """QuACK runs on Hopper only. A fake with its signatures and padded rows checks how its results are used."""

    def scaled_exp(x, weight, target, chunk_size, ignore_index=-100, *, need_dx=True, need_dw=True):
        assert chunk_size % 128 == 0 and not need_dw
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(leaf @ weight.T, target, reduction="none")
            dx = torch.autograd.grad(loss.sum(), [leaf])[0] if need_dx else None
        padding = -len(target) % 128
        pad = torch.nn.functional.pad
        return pad(loss.detach(), (0, padding)), None if dx is None else pad(dx, (0, 0, 0, padding)), None

    def linear_cross_entropy_func(x, weight, bias, target, ignore_index, reduction, inplace_backward):
        assert bias is None and reduction == "none"
        return torch.nn.functional.cross_entropy(x @ weight.T, target, reduction="none")

    stand_in = types.ModuleType("quack.linear_cross_entropy")
    stand_in.scaled_exp_linear_cross_entropy_fwd = scaled_exp
    stand_in.linear_cross_entropy_func = linear_cross_entropy_func
    stand_in._scaled_exp_lce_loss_only = lambda x, weight, target, ignore_index: torch.nn.functional.cross_entropy(
        x @ weight.T, target, reduction="none"
    )
    stand_in.scaled_exp_lce_supported = lambda x, weight, chunk_size, reduction: True
    package = types.ModuleType("quack")
    package.linear_cross_entropy = stand_in
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", stand_in)
    monkeypatch.setattr(peers, "need_cuda", lambda inputs, what: None)
    for case in run_cases({"quack": peers.quack}, heads=("frozen", "trainable"), modes=("train", "no_grad")):
        row = by_name(case)["quack"]
        assert row["skipped"] is None, row["skipped"]
        assert all(tried["skipped"] is None for tried in row.get("tried", []))


@pytest.mark.gpu
@pytest.mark.parametrize("cold_l2", [False, True])
def test_on_a_gpu_events_and_allocator_are_read(cold_l2):
    options = Options(device=torch.device("cuda"), rounds=2, budget_seconds=5.0, cold_l2=cold_l2)
    problem = kernels.Problem(Shape("aligned", 128, 1024), 2048, 0.25, "bf16")
    providers = {name: PROVIDERS[name] for name in ("gemm-floor", "eager-all-rows", "eager-valid-rows")}
    for case in kernels.run_problem(problem, ("frozen", "trainable"), ("train", "no_grad"), providers, options):
        rows = by_name(case)
        assert all(row["skipped"] is None and row["seconds"]["median"] > 0 for row in rows.values())
        # All rows are four times the valid ones, in bf16 and fp32 logits at least.
        assert rows["eager-all-rows"]["peak_extra_bytes"] > 2048 * 1024 * 6
        assert rows["eager-valid-rows"]["peak_extra_bytes"] < rows["eager-all-rows"]["peak_extra_bytes"] / 2


def test_on_a_cpu_every_gpu_contestant_says_so():
    gpu_only = ("liger", "liger-wide", "cut-cross-entropy-exact", "quack", "synpo-triton")
    (case,) = run_cases({name: PROVIDERS[name] for name in gpu_only})
    for row in case["rows"]:
        assert row["seconds"] is None and not row["faulty"]
        assert "GPU" in row["skipped"] or "No module named" in row["skipped"]
    assert "synpo-reference" in PROVIDERS and "synpo-reference" not in DEFAULT["cpu"] + DEFAULT["cuda"]


def test_pairs_hold_loss_and_gradient_against_fp64():
    def doubled(inputs):
        right = pairs.eager(inputs)

        def run():
            result = right.run()
            return pairs.LossResult(result.loss * 2, result.grad_hidden)

        return Step(run, "twice the loss")

    contestants = {"gemm-floor": gemm_floor, pairs.PEER: pairs.eager, pairs.OWN: pairs.eager, "doubled": doubled}
    comparison = pairs.compare_pairs(
        OPTIONS, dtype="fp32", num_pairs=1, valid=0.02, shape=SHAPE, contestants=contestants
    )
    rows = by_name(comparison)
    assert set(rows[pairs.OWN]["error"]) == {"loss", "grad_hidden"}
    assert max(rows[pairs.OWN]["error"].values()) < 1e-5
    assert rows["doubled"]["skipped"].startswith("WRONG: error of loss")
    assert set(comparison["ratio_to_liger"]) == {"time", "peak_extra"}
    assert "synpo-simpo over liger-simpo: time" in pairs.pairs_table(comparison)


@pytest.mark.parametrize("kind", ["cases", "overview"])
def test_pictures_are_drawn(cases, tmp_path, kind):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks.common import environment
    from benchmarks.head.plot import plot

    paths = plot({"environment": environment(CPU), "cases": cases}, tmp_path, kind)
    assert len(paths) == (3 if kind == "cases" else 2)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_shapes_by_name_group_and_size():
    assert [shape.name for shape in find_shapes(["qwen2.5-7b", "3584x152064", "cpu"])][:2] == ["qwen2.5-7b"] * 2
    assert find_shapes(["8x9"]) == [Shape("8x9", 8, 9)]
    for word in ("gpt-9", "0x5", "8x", "8x9x10"):
        with pytest.raises(ValueError, match=word):
            find_shapes([word])


@pytest.mark.parametrize(
    "argv",
    [["--valid", "1.5"], ["--rows", "0"], ["--shapes", "gpt-9"], ["--rounds", "-1"], ["--device", "cpu", "--cold_l2"]],
)
def test_bad_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        kernels.parse(argv)
    assert stop.value.code == 2 and capsys.readouterr().err


def test_the_command_line_writes_json(tmp_path, capsys):
    out = tmp_path / "out.json"
    argv = ["--device", "cpu", "--shapes", "24x301", "--valid_rows", "16", "--valid", "0.5", "--dtype", "bf16"]
    argv += ["--head", "frozen", "--providers", "gemm-floor", "eager-valid-rows", "--rounds", "2", "--json", str(out)]
    assert kernels.main(argv) == 0
    record = json.loads(out.read_text())
    assert record["environment"]["packages"]["torch"] and record["environment"]["cpu"]
    (case,) = record["cases"]
    assert (case["N"], case["valid_rows"], case["dtype"]) == (32, 16, "bf16")
    assert "eager-valid-rows" in capsys.readouterr().out
    assert record["command"] == "python benchmarks/kernels.py " + " ".join(argv)
    assert by_name(case)["eager-valid-rows"]["computes"]["rows"] == "valid"
    assert kernels.main([*argv, "--without", "gemm-floor", "--mode", "no_grad", "--head", "trainable"]) == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert [row["name"] for row in case["rows"]] == ["eager-valid-rows"] and case["mode"] == "no_grad"
    assert kernels.main([*argv, "--time_limit", "-1"]) == 0
    assert json.loads(out.read_text())["left_out"]


def test_the_readme_names_only_what_exists(capsys):
    folder = Path(kernels.__file__).parent
    text = (folder / "README.md").read_text().split("\n## Decoding")[0]
    with pytest.raises(SystemExit):
        kernels.parse(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out)) | {"--out", "--kind"}
    assert set(re.findall(r"--\w+", text)) <= known
    table = text.split("## Contestants")[1].split("## JSON")[0]
    for name in PROVIDERS:
        assert name in table or f"-{name.removeprefix('synpo-')}" in table, f"{name} is not in the table"


def test_every_contestant_says_what_it_computes():
    for name in PROVIDERS:
        for device in ("cpu", "cuda"):
            assert computes(name, device).rows in ("valid", "given", "all")


# In-place products, such as TRL's, and our C++ are invisible to the counter.
COUNTED = {
    "gemm-floor": "torch", "eager-all-rows": "torch", "eager-valid-rows": "torch", "torch-compile": "torch",
    "torch-linear-ce": "torch", "liger-scaled": "liger_kernel", "liger-preference": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy", "synpo-reference": "torch",
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_the_stated_number_of_products_is_the_counted_one(name):
    """The floor of a trained head among them: three bare GEMMs, two with a frozen head, one without gradients."""
    pytest.importorskip(COUNTED[name], reason=f"{COUNTED[name]} is not installed")
    if name == "torch-linear-ce" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no F.linear_cross_entropy")
    inputs = make_inputs(SHAPE, num_rows=64, valid=0.25, dtype=torch.float32, device=CPU)
    stated = computes(name, "cpu")
    product = 2 * (64 if stated.rows == "all" else 16) * SHAPE.D * SHAPE.V
    found = []
    with torch.compiler.set_stance("force_eager"):
        for head, mode in (("frozen", "train"), ("trainable", "train"), ("frozen", "no_grad")):
            made = PROVIDERS[name](inputs.case(head=head, mode=mode))
            (step,) = [made] if isinstance(made, Step) else made
            found.append(count_flops(step.run) / product)
    assert [*map(float, stated.products.split(" / ")), 1.0] == found


def a_case(ratios, **others):
    rows = [
        {
            "name": name,
            "ratio_to_floor": ratio,
            "peak_extra_bytes": 2**20,
            "error": {"log_probs": 1e-3},
            "skipped": None,
        }
        for name, ratio in ratios.items()
    ]
    case = {
        "D": 8,
        "V": 100,
        "valid_rows": 4,
        "N": 16,
        "mode": "train",
        "head": "frozen",
        "dtype": "bf16",
        "rows": rows,
    }
    return case | others


def test_the_readmes_table_names_the_fastest_and_leaves_out_what_did_not_run():
    ours_first = a_case({"gemm-floor": 0.5, "synpo-native": 1.0, "torch-compile": 1.1, "quack": None})
    peer_first = a_case({"synpo-native": 1.2, "torch-compile": 1.0}, dtype="fp32")
    equal = a_case({"synpo-native": 1.001, "torch-compile": 1.002}, head="trainable")
    alone = a_case({"torch-compile": 1.5}, mode="no_grad")
    packages = {"torch": "2.13.0+cpu"}
    record = {"environment": {"packages": packages}, "cases": [ours_first, peer_first, equal, alone]}
    text = readme_table.results(record)
    lines = text.splitlines()
    assert "| synpo_fast, native | **1.00** | 1 MiB | 1.20 | 1 MiB |" in lines
    assert "| torch.compile | 1.10 | 1 MiB | **1.00** | 1 MiB |" in lines
    assert "| synpo_fast, native | **1.00** | 1 MiB |" in lines and "| torch.compile | **1.00** | 1 MiB |" in lines
    assert "bf16: the fastest peer, torch.compile, takes 1.10 times as long." in text
    assert "fp32: **torch.compile is faster**; ours takes 1.20 times as long." in text
    assert "none of ours ran" in text and "QuACK" not in text and "gemm-floor" not in text
    assert readme_table.label("torch-linear-ce", packages) == "F.linear_cross_entropy, torch 2.13.0"


def test_the_readmes_table_is_written_between_its_markers(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(readme_table.PAGE.read_text())
    with pytest.raises(SystemExit):
        readme_table.main([str(tmp_path / "none.json"), "--page", str(page)])
    file = tmp_path / "kernels.json"
    case = a_case({"synpo-native": 1.23, "torch-compile": 1.3}, shape="tiny")
    file.write_text(json.dumps({"environment": {"packages": {}}, "cases": [case]}))
    assert readme_table.main([str(file), "--page", str(page)]) == 0
    once = page.read_text()
    assert "| synpo_fast, native | **1.23** |" in once and once.startswith("# Benchmarks") and "## Decoding" in once
    readme_table.main([str(file), "--page", str(page)])
    assert page.read_text() == once
    with pytest.raises(ValueError, match="lacks the markers"):
        readme_table.page("nothing", json.loads(file.read_text()))
