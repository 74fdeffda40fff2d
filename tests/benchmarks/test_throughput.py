"""benchmarks/throughput.py: every variant agrees with the truth, a wrong one is caught, TRL's variants run TRL's code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the variants train an adapter")
pytest.importorskip("trl", reason="TRL is what is compared with")

from benchmarks import throughput
from benchmarks.contest import Options
from benchmarks.steps import BASELINE, GAINS, OF_SEVERAL_RESPONSES, VARIANTS, trl_trainers
from benchmarks.steps import agreement as agreement_module
from benchmarks.steps.cost import expected_flops, tokens_only_limit, unit_costs
from benchmarks.steps.measure import compare
from benchmarks.steps.presets import PRESETS, Preset, build_policy, qwen25_vl_config
from benchmarks.steps.step_variant import Scores, full_step, use_attention
from benchmarks.steps.tables import table
from benchmarks.steps.workload import make_rows, make_workload, padded_batch, separate_samples
from synpo_fast.profiling.counted_flops import count_flops

CPU = torch.device("cpu")
OPTIONS = Options(CPU, rounds=1, budget_seconds=1.0)
LANGUAGE = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 301}
# 3 frames: one is repeated to fill the tower's step of two. Responses of different lengths: rows with padding.
TINY = Preset(
    "tiny", "qwen2_5_vl", LANGUAGE | {"vision_hidden_size": 16, "vision_layers": 1}, "float32",
    frames=3, size=56, prefix=23, completion=9, spread=0.5, pairs=3, lora_r=4,
)  # fmt: skip
TINY_TEXT = replace(TINY, name="tiny text", family="text", shape=LANGUAGE, frames=0, size=0)
REQUIRED = {"trl-dpo-adapter-off", "synpo-released", "synpo-fast-unshared", "synpo-fast", "synpo-fast-dpo"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """One thread and small GEMMs: tiny tensors gain nothing from threads, and the machine's rate is not tested."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("benchmarks.steps.measure.GEMM_SIZE", {"cpu": 8})
    monkeypatch.setattr("benchmarks.contest.peak_extra_memory", lambda call, device: {"peak": 1000})
    with torch.compiler.set_stance("force_eager"):  # compiling Liger's loss takes half a minute
        yield
    torch.set_num_threads(threads)


def fixed_timer(call):
    call()
    return 0.5


@pytest.mark.parametrize("preset", [TINY, TINY_TEXT], ids=["video", "text"])
def test_every_variant_runs_and_agrees_with_the_truth(preset):
    workload = make_workload(preset, CPU)
    assert len({len(response) for sample in workload.samples for response in sample.responses}) > 1
    assert 0 in workload.batch["attention_mask"]
    record = compare(workload, list(VARIANTS.values()), OPTIONS, timer=fixed_timer)
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == list(VARIANTS) and set(rows) >= REQUIRED and set(GAINS) <= set(rows)
    for name, row in rows.items():
        assert row["skipped"] is None, (name, row["skipped"])
        assert row["ratio"] == 1.0 and row["pairs_per_s"] == 6.0 and row["tokens_per_s"] == 2 * workload.tokens
        assert row["peak_memory_bytes"] > 1000 and row["flops"] > 0
        assert {"low", "median", "high"} <= set(row["seconds"])
    assert len({round(row["loss"], 4) for row in rows.values()}) == 3  # one for each of the losses
    assert rows["trl-dpo-frozen-copy"]["peak_memory_bytes"] > rows[BASELINE]["peak_memory_bytes"]
    json.dumps(record, allow_nan=False)


def off_by_one_token(variant):
    """A variant whose head reads the row after the one that predicts."""

    def prepare(workload):
        forward = variant.prepare(workload)

        def loss(scores: Scores):
            value = forward.loss(scores)
            scores.tokens = [row.roll(1) for row in scores.responses()]
            return value

        return replace(forward, loss=loss)

    return replace(variant, prepare=prepare)


def half_the_gradient(variant):
    """A variant with right values that detaches the rejected half: only the gradient shows it."""

    def prepare(workload):
        forward = variant.prepare(workload)

        def loss(scores: Scores):
            value = forward.loss(scores)
            return 0.5 * value + 0.5 * value.detach()

        return replace(forward, loss=loss)

    return replace(variant, prepare=prepare)


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("synpo-fast", off_by_one_token, "log_probs"),
        ("synpo-fast-dpo", half_the_gradient, "grad"),
        (BASELINE, half_the_gradient, "grad"),
    ],
)
def test_a_wrong_variant_fails_the_script_and_shows_no_speed(name, broken, said, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "cpu", TINY)
    monkeypatch.setitem(VARIANTS, name, broken(VARIANTS[name]))
    file = tmp_path / "out.json"
    assert throughput.main(["--device", "cpu", "--rounds", "1", "--variants", BASELINE, name, "--json", str(file)]) == 1
    row = next(row for row in json.loads(file.read_text())["runs"][0]["rows"] if row["name"] == name)
    assert row["skipped"].startswith("WRONG") and said in row["skipped"]
    assert row["seconds"] is None and row["ratio"] is None and row["flops"] is None
    assert name in capsys.readouterr().err


def test_a_crash_of_ours_fails_the_script_and_one_of_a_peer_does_not(monkeypatch, capsys):
    def crash(workload):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(PRESETS, "cpu", TINY)
    for name, code in (("liger-dpo", 0), ("synpo-fast", 1)):
        with monkeypatch.context() as patch:
            patch.setitem(VARIANTS, name, replace(VARIANTS[name], prepare=crash))
            assert throughput.main(["--device", "cpu", "--rounds", "1", "--variants", BASELINE, name]) == code
        assert "RuntimeError: out of luck" in capsys.readouterr().out


def test_a_reference_that_sees_the_adapter_is_caught():
    """The truth's adapter does something, so that policy and reference differ."""
    workload = make_workload(TINY, CPU)
    truth = agreement_module.find_truth(workload, ["dpo"])
    assert abs(float(truth.losses["dpo"]) - 0.693147) > 1e-3
    forward = VARIANTS[BASELINE].prepare(workload)
    workload.policy.model.disable_adapter = torch.no_grad  # any context that switches nothing off
    result = full_step(workload, VARIANTS[BASELINE], forward)()
    found = agreement_module.errors(result, truth, workload)
    assert "loss" in agreement_module.why_wrong(found, torch.float32)


def test_the_padded_batch_and_its_loss_are_what_trls_own_pipeline_makes(tmp_path):
    """TRL's own tokenising and collator give the same batch, loss and FLOPs on text."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    workload = make_workload(TINY_TEXT, CPU)
    tokenizer = workload.policy.tokenizer

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    rows = [
        {"prompt": text(s.prompt), "chosen": text(s.responses[0]), "rejected": text(s.responses[1])}
        for s in workload.samples
    ]
    arguments = {**trl_trainers._arguments(workload, str(tmp_path)), "max_length": None}
    trainer = DPOTrainer(
        model=workload.policy.model,
        args=DPOConfig(**arguments, train_sampling_strategy="sequential"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.model.delete_adapter("ref")
    trainer.current_gradient_accumulation_steps = 1  # as train() sets it
    (batch,) = trainer.get_train_dataloader()
    assert set(batch) == set(workload.batch)
    for name, tensor in workload.batch.items():
        assert torch.equal(batch[name], tensor), name

    use_attention(workload, "sdpa")

    def trls_step():
        workload.optimizer.zero_grad(set_to_none=True)
        loss = trainer.training_step(trainer.model, batch)
        workload.optimizer.step()
        return loss

    own_step = full_step(workload, VARIANTS[BASELINE], VARIANTS[BASELINE].prepare(workload))
    assert float(trls_step()) == pytest.approx(float(own_step().loss), abs=1e-6)
    assert count_flops(trls_step) == count_flops(own_step)


def test_the_published_shape_is_the_7b_model():
    from transformers import AutoModelForImageTextToText

    from synpo_fast.models.tiny import tiny_tokenizer

    config = qwen25_vl_config(PRESETS["gpu"].shape, tiny_tokenizer("qwen2_5_vl"))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 8_292_166_656  # as its repository states
    assert config.vision_config.fullatt_block_indexes == [7, 15, 23, 31]
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]


def shrunk(preset: Preset, divisor: int) -> Preset:
    """A published shape with fewer, narrower layers and a small vocabulary: the same code, for a small machine."""
    shape = {
        "hidden_size": preset.shape["hidden_size"] // divisor // 28 * 28,
        "num_layers": 2,
        "num_heads": preset.shape["num_heads"] // 7,
        "num_kv_heads": preset.shape["num_kv_heads"] // 4,
        "intermediate_size": preset.shape["intermediate_size"] // divisor,
        "vocab_size": 512,
        "vision_hidden_size": 64,
        "vision_layers": 8,
        "vision_heads": 2,
        "vision_intermediate_size": preset.shape["vision_intermediate_size"] // divisor,
    }
    return replace(preset, name=f"{preset.name}/{divisor}", shape=shape)


def test_the_gpu_preset_runs_the_same_code_on_a_cpu():
    """The preset gpu at a hundredth of the width, with two layers, in fp32. 84 px use windows and a full layer of the tower."""
    preset = replace(
        shrunk(PRESETS["gpu"], 32),
        dtype="float32", frames=4, size=84, prefix=40, completion=11, spread=0.2, lora_r=4, checkpointing=True,
    )  # fmt: skip
    workload = make_workload(preset, CPU)
    names = (BASELINE, "synpo-released", "synpo-fast")
    record = compare(workload, [VARIANTS[name] for name in names], OPTIONS, timer=fixed_timer)
    assert [row["skipped"] for row in record["rows"]] == [None] * 3


def test_bf16_agrees_within_its_tolerance():
    record = compare(
        make_workload(replace(TINY, dtype="bfloat16"), CPU), [VARIANTS[BASELINE], VARIANTS["synpo-fast"]], OPTIONS,
        timer=fixed_timer,
    )  # fmt: skip
    assert [row["skipped"] for row in record["rows"]] == [None, None]


def test_samples_have_the_lengths_asked_for():
    policy = build_policy(TINY, CPU)
    for spread, bounds in ((0.0, (9, 9)), (0.5, (4, 14))):
        preset = replace(TINY, spread=spread, pairs=7)
        samples = separate_samples(make_rows(policy, preset, seed=0))
        assert (len({len(response) for sample in samples for response in sample.responses}) > 1) == (spread > 0)
        for sample in samples:
            assert len(sample.prompt) == 23 and sample.video.num_placeholders == 8
            for response in sample.responses:
                assert bounds[0] <= len(response) <= bounds[1] and response[-1] == policy.tokenizer.eos_token_id
    with pytest.raises(ValueError, match="3 frames of 56 px are 10 tokens"):
        make_rows(policy, replace(TINY, prefix=10), seed=0)


def test_rows_with_several_responses_agree_with_their_pairs_and_cost_less():
    """Every variant is compared with the truth of each pair alone. The formula of the cost knows what runs once."""
    workload = make_workload(replace(TINY, responses=4, pairs=2, spread=0.5), CPU)
    assert len(workload.rows) == 2 and len(workload.samples) == 12
    record = compare(workload, [VARIANTS[name] for name in OF_SEVERAL_RESPONSES], OPTIONS, timer=fixed_timer)
    rows = {row["name"]: row for row in record["rows"]}
    assert [row["skipped"] for row in rows.values()] == [None] * 5
    for name in ("synpo-fast", "synpo-fast-dpo"):
        one_row = rows[name.replace("fast", "fast-responses")]
        assert one_row["flops"] < rows[name]["flops"] / 2 and one_row["limit"] > 2 * rows[name]["limit"]
        assert one_row["loss"] == pytest.approx(rows[name]["loss"], abs=1e-5)
    tokens = record["workload"]["language_tokens"]
    lengths = [[len(each) - 1 for each in row.sample.responses] for row in workload.rows]
    assert tokens["responses"] == sum(23 + sum(of_row) for of_row in lengths)
    assert tokens["shared"] == sum(23 * 6 + 3 * sum(of_row) for of_row in lengths)
    assert "12 pairs per step, comparisons (all) of 4 responses to each of 2 videos" in table(
        record["workload"], record
    )
    best = make_workload(replace(TINY, responses=4, pairs=1, pairs_from="best_rest"), CPU)
    assert [s.responses[0] for s in best.samples] == [best.rows[0].sample.responses[0]] * 3


def test_videos_stand_in_the_batch_as_often_as_rows():
    workload = make_workload(TINY, CPU)
    patches = [sample.video.tensors["pixel_values_videos"] for sample in workload.samples]
    assert torch.equal(workload.batch["pixel_values_videos"], torch.cat(patches * 2))
    assert len(workload.batch["video_grid_thw"]) == 6
    chosen = padded_batch(workload.policy, workload.samples, (0,))
    assert torch.equal(chosen["pixel_values_videos"], torch.cat(patches)) and len(chosen["input_ids"]) == 3


@pytest.mark.parametrize("name", [BASELINE, "synpo-released", "synpo-fast-unshared", "synpo-fast", "synpo-fast-dpo"])
def test_the_cost_formula_is_near_the_counted_flops(name):
    """A wide and short model, where attention, which the formula leaves out, is small. Lengths are equal, as in the formula."""
    shape = LANGUAGE | {"hidden_size": 256, "num_layers": 2, "vision_hidden_size": 64, "vision_layers": 2}
    workload = make_workload(replace(TINY, shape=shape, spread=0.0, prefix=40, completion=8, lora_r=1), CPU)
    variant = VARIANTS[name]
    step = full_step(workload, variant, variant.prepare(workload))
    step()
    counted, expected = count_flops(step), expected_flops(workload, variant.passes, unit_costs(workload))
    assert counted == pytest.approx(expected, rel=0.1)


def test_the_cost_of_the_tower_is_near_what_it_runs():
    """Videos of 56 px: one window and one full layer of 16 patches, so that attention is small here too."""
    shape = LANGUAGE | {"hidden_size": 64, "vision_hidden_size": 256, "vision_layers": 2}
    workload = make_workload(replace(TINY, shape=shape, frames=4), CPU)
    policy = workload.policy
    counted = count_flops(lambda: policy.encode_videos(workload.samples))
    assert counted == pytest.approx(unit_costs(workload).vision, rel=0.03)


def test_the_formula_for_tokens_alone():
    assert tokens_only_limit(5.0, share_prefix=True) == pytest.approx(18 / 7)  # 6 (P + C) / (2 (P + 2 C))
    assert tokens_only_limit(5.0, share_prefix=False) == 1.5


def test_the_script_prints_writes_and_draws(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures are matplotlib's")
    monkeypatch.setitem(PRESETS, "cpu", TINY)
    file = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--rounds", "1", "--json", str(file), "--plot", str(tmp_path)]
    variants = ["synpo-no-reference", "synpo-fast", "trl-dpo-precomputed"]
    assert throughput.main([*arguments, "--variants", *variants]) == 0
    record = json.loads(file.read_text())
    (run,) = record["runs"]
    assert run["rows"][0]["name"] == BASELINE and record["environment"]["packages"]["trl"]
    printed = capsys.readouterr().out
    for row in run["rows"]:
        assert f"{row['ratio']:.2f}x" in printed and row["setting"] in printed
    for name in ("gains.png", "variants.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_repetitions_of_the_table_stand_in_one_file_with_their_spread(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "cpu", TINY)
    file = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--rounds", "2", "--repeat", "3", "--json", str(file)]
    assert throughput.main([*arguments, "--variants", "synpo-fast"]) == 0
    record = json.loads(file.read_text())
    assert record["baseline"] == BASELINE and record["workload"]["name"] == "tiny" and len(record["runs"]) == 3
    assert all([row["name"] for row in run["rows"]] == [BASELINE, "synpo-fast"] for run in record["runs"])
    assert len({run["rows"][0]["seconds"]["median"] for run in record["runs"]}) == 3, "each was measured"
    assert len({run["rows"][1]["loss"] for run in record["runs"]}) == 1
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.split("3 runs")[1].splitlines() if line.startswith("synpo-fast"))
    rows = [run["rows"][1] for run in record["runs"]]
    assert line.split()[1:4] == [f"{row['ratio']:.2f}x" for row in rows]
    low, high = min(row["ratio_low"] for row in rows), max(row["ratio_high"] for row in rows)
    assert line.endswith(f"({low:.2f} - {high:.2f})")


def test_the_saving_of_a_shared_prompt_is_a_table_of_its_own(monkeypatch, tmp_path):
    """Speed-ups over the unshared step. Counted and predicted ones lie below the formula for tokens alone."""
    monkeypatch.setitem(PRESETS, "text-1024", replace(TINY_TEXT, prefix=64, completion=8, spread=0.0))
    file = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--rounds", "2", "--preset", "text-1024", "--json", str(file)]
    assert throughput.main([*arguments, "--baseline", "synpo-fast-unshared", "--variants", "synpo-fast"]) == 0
    record = json.loads(file.read_text())
    unshared, shared = record["runs"][0]["rows"]
    assert record["baseline"] == unshared["name"] == "synpo-fast-unshared" and shared["name"] == "synpo-fast"
    assert unshared["ratio"] == 1.0
    quotients = [a / b for a, b in zip(*(row["seconds"]["samples"] for row in (unshared, shared)), strict=True)]
    assert shared["ratio"] == pytest.approx(sum(quotients) / 2)
    assert 1.5 < unshared["flops"] / shared["flops"] < 1.8 and 1.0 < shared["limit"] < 1.8  # 2 (8 + 1) / (8 + 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--frames", "-1"], "--frames must be at least 0, not -1"),
        (["--spread", "1"], r"--spread must lie in [0, 1), not 1.0"),
        (["--prefix", "100"], "leaves no text in --prefix 100"),
        (["--preset", "text", "--frames", "4"], "preset 'text' takes no --frames"),
        (["--preset", "text-1024", "--size", "56"], "preset 'text-1024' takes no --frames"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--responses", "1"], "--responses must be at least 2, not 1"),
        (["--repeat", "0"], "--repeat must be at least 1, not 0"),
        (["--repeat", "2", "--sweep", "ratio"], "--repeat is for the table, not for --sweep"),
        (["--baseline", "synpo-fast", "--sweep", "ratio"], "--baseline is for the table, not for --sweep"),
        (["--largest_batch"], "needs one"),
        (["--sweep", "sideways"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused_with_their_values(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.parse(["--device", "cpu", *arguments])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_more_frames_lengthen_the_prompt_with_them():
    usual, more = (throughput.parse(["--device", "cpu", *extra]).preset for extra in ([], ["--frames", "32"]))
    assert more.prefix - usual.prefix == 8 * 25 and more.frames == 32


def test_the_readme_names_every_variant_and_option():
    text = (Path(throughput.__file__).parent / "README.md").read_text()
    for name in VARIANTS:
        assert f"`{name}`" in text, name
    for option in (
        "--preset",
        "--spread",
        "--sweep",
        "--largest_batch",
        "--checkpointing",
        "--variants",
        "--repeat",
        "--baseline",
        "--responses",
        "--pairs_from",
    ):
        assert option in text, option
