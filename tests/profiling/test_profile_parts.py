"""The parts of --profile: its clock, which variants there are, what is checked and how figures are made of times."""

import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoded import EncodedPair
from synpo_fast.data.loader import StepBatch
from synpo_fast.models.layout import SampleLengths, plan_rows
from synpo_fast.models.policy import Sample
from synpo_fast.profiling import batches as profile_batches
from synpo_fast.profiling import stage_clock
from synpo_fast.profiling.batches import ProfiledStep, read_steps
from synpo_fast.profiling.bench import Bench
from synpo_fast.profiling.record import limit, stage_spreads, variant_record
from synpo_fast.profiling.stage_clock import (
    BACKWARD,
    COMMUNICATION,
    HEAD,
    OTHER,
    PREFIX,
    REFERENCE,
    RESPONSES,
    STAGES,
    VISION,
    StageClock,
    StageTimes,
    row_shares,
    timed_stages,
)
from synpo_fast.profiling.variants import Variant, variants_of
from synpo_fast.training.loop import TrainingStopped
from tests.world import ROOT, environment

CPU = torch.device("cpu")
PAIRS = 2  # of a step; micro-batches of one
NAMES = [
    "synpo", "dpo-adapter-off", "dpo-frozen-copy", "dpo-precomputed",
    "synpo-unshared", "dpo-adapter-off-unshared", "dpo-frozen-copy-unshared", "dpo-precomputed-unshared",
]  # fmt: skip


def a_config(**more):
    return TrainConfig(**{"model_name_or_path": "x", "train_file": "x", "output_dir": "x", "use_cpu": True, **more})


# ---- the clock ----


@pytest.fixture
def clock(monkeypatch):
    """A stage clock whose time goes on by hand: clock.passes(seconds)."""
    now = [100.0]
    monkeypatch.setattr(stage_clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    result = StageClock(CPU)
    result.passes = lambda seconds: now.__setitem__(0, now[0] + seconds)
    return result


def test_each_moment_is_charged_once_to_the_innermost_stage(clock):
    clock.start()
    clock.passes(1)
    with clock.stage({BACKWARD: 1.0}):
        clock.passes(2)
        with clock.stage({COMMUNICATION: 1.0}):
            clock.passes(4)
        clock.passes(8)
    with clock.stage({PREFIX: 0.75, RESPONSES: 0.25}):
        clock.passes(16)
    clock.passes(32)
    times = clock.stop()
    expected = {OTHER: 33, BACKWARD: 10, COMMUNICATION: 4, PREFIX: 12, RESPONSES: 4}
    assert times.stages == {**dict.fromkeys(STAGES, 0), **expected}
    assert times.seconds == 63


def test_inside_the_reference_everything_is_the_references(clock):
    clock.start()
    with clock.stage({REFERENCE: 1.0}):
        with clock.stage({VISION: 1.0}):
            clock.passes(3)
        clock.passes(1)
    with clock.stage({VISION: 1.0}):
        clock.passes(5)
    times = clock.stop()
    assert (times.stages[REFERENCE], times.stages[VISION]) == (4, 5)


def test_a_stage_that_fails_is_left_and_a_clock_at_rest_counts_nothing(clock):
    with clock.stage({HEAD: 1.0}):
        clock.passes(7)
    clock.start()
    with pytest.raises(KeyError), clock.stage({HEAD: 1.0}):
        clock.passes(1)
        raise KeyError
    clock.passes(2)
    times = clock.stop()
    assert (times.stages[HEAD], times.stages[OTHER], times.seconds) == (1, 2, 3)


@pytest.mark.parametrize("share", [True, False])
def test_a_rows_time_is_divided_by_whose_tokens_stand_in_it(share):
    (row,) = plan_rows([SampleLengths(10, (5, 8)), SampleLengths(3, (2, 1))], share_prefix=share)
    prefix = 13 if share else 26
    responses = 4 + 7 + 1 + 0
    shares = row_shares(row, ["samples"], [])
    assert shares == pytest.approx({PREFIX: prefix / (prefix + responses), RESPONSES: responses / (prefix + responses)})


def test_the_clock_leaves_every_object_as_it_was(group):
    module = torch.nn.Linear(2, 2)
    module.loss_of_logps = module.reference_logps = lambda: "own"
    policy = SimpleNamespace(encode_videos=lambda: 1, hidden_states=lambda row: 2, _logps=lambda: 3, _outputs=lambda: 4)
    module.policy = policy
    engine = SimpleNamespace(module=module, backward=lambda loss: 4, step=lambda rate: 5)
    before = [dict(vars(each)) for each in (policy, module, engine, dist.ProcessGroup, dist.Work)]
    clock = StageClock(CPU)
    with pytest.raises(KeyError), timed_stages(clock, engine):
        assert module.loss_of_logps() == "own" and engine.step(0.0) == 5
        assert engine.step is not before[2]["step"]
        clock.start()
        dist.all_reduce(torch.ones(3))
        assert clock.stop().stages[COMMUNICATION] > 0
        raise KeyError
    after = [dict(vars(each)) for each in (policy, module, engine, dist.ProcessGroup, dist.Work)]
    assert after == before
    dist.all_reduce(torch.ones(3))


def test_a_run_that_is_not_profiled_loads_none_of_it():
    code = "import sys, synpo_fast.training.start;print([m for m in sys.modules if 'profiling' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr


# ---- the variants ----


def names_of(config, **facts):
    return {variant.name: variant.skipped for variant in variants_of(config, **{"copied": True, **facts})}


def test_every_reference_is_measured_with_the_gains_and_without():
    assert list(names_of(a_config())) == NAMES and not any(names_of(a_config()).values())
    assert next(iter(names_of(a_config(loss_type="dpo")))) == "synpo"
    assert list(names_of(a_config(loss_type="simpo")))[::4] == ["simpo", "simpo-unshared"]
    assert list(names_of(a_config(loss_type="sft")))[::4] == ["sft", "sft-unshared"]


@pytest.mark.parametrize(
    ("config", "facts", "skipped", "reason"),
    [
        ({"use_peft": False}, {}, ["dpo-adapter-off", "dpo-adapter-off-unshared"], "no adapter"),
        ({"zero_stage": 3}, {}, ["dpo-frozen-copy", "dpo-frozen-copy-unshared"], "zero_stage=3"),
        ({}, {"copied": False}, ["dpo-frozen-copy", "dpo-frozen-copy-unshared"], "memory"),
    ],
)  # fmt: skip
def test_variants_that_cannot_be_measured_are_listed_with_their_reasons(config, facts, skipped, reason):
    found = names_of(a_config(**config), **facts)
    assert [name for name, why in found.items() if why] == skipped
    assert all(reason in found[name] for name in skipped)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"profile": -1}, "profile is -1, expected at least 0"),
        ({"profile": 2, "resume": "auto"}, "leave resume"),
        ({"profile": 2, "overwrite_output_dir": True}, "overwrite_output_dir unset"),
    ],
)
def test_options_that_make_no_sense_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        a_config(**more)


def a_batch(pairs, *, step=0, wait_s=0.0):
    return StepBatch(0, step, pairs, 3, [], wait_s)


def a_bench(**config):
    config = a_config(**config)
    pair = EncodedPair(Sample((1, 2), ((3,), (4,))), "a")
    engine = SimpleNamespace(dtype=torch.float32, module=SimpleNamespace(auxiliary=None))
    variants = variants_of(config, copied=True)
    return Bench(config, engine, None, variants, [ProfiledStep(a_batch([pair]), 1, 2, 2, 2, 0.0)], CPU)


LOG_2 = math.log(2)
GOOD = {name: LOG_2 if name.startswith("dpo") else -0.5 for name in NAMES}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"synpo-unshared": -0.49}, "synpo-unshared -0.490000"),
        ({"dpo-frozen-copy": 0.70}, "dpo-frozen-copy 0.700000"),
        ({name: 0.8 for name in NAMES if name.startswith("dpo")}, "should all be 0.693147"),
        ({"synpo": math.nan, "synpo-unshared": math.nan}, "synpo nan"),
        ({"dpo-precomputed": math.inf}, "inf"),
    ],
)
def test_no_time_is_shown_for_variants_whose_losses_disagree(wrong, message):
    a_bench().check(GOOD)
    with pytest.raises(TrainingStopped, match=message):
        a_bench().check({**GOOD, **wrong})


def test_a_loss_of_another_form_need_not_begin_at_log_2_but_must_agree():
    hinge = {**GOOD, **{name: 1.0 for name in NAMES if name.startswith("dpo")}}
    bench = a_bench(loss_type="dpo", variant="hinge")
    bench.check(hinge)
    with pytest.raises(TrainingStopped, match=r"should all be 1\.0"):
        bench.check({**hinge, "dpo-precomputed": 1.1})


# ---- reading ----


def some_pairs(step, num_pairs):
    return [EncodedPair(Sample(tuple(range(5 + i)), ((1, 2), (3,))), f"{step}-{i}") for i in range(num_pairs)]


def read(sizes, waits, **config):
    loader = SimpleNamespace(
        steps_per_epoch=len(sizes),
        steps=lambda epoch: (
            a_batch(some_pairs(step, size), step=step, wait_s=wait)
            for step, (size, wait) in enumerate(zip(sizes, waits, strict=True))
        ),
    )
    return read_steps(a_config(**config), loader)


def test_steps_without_pairs_and_the_first_reading_are_left_out(group):
    workers = read([3, 0, 2, 1], [9.0, 1.0, 2.0, 3.0], profile=2, dataloader_num_workers=2)
    assert [(step.pairs, step.prompt_tokens, step.response_tokens) for step in workers] == [(2, 11, 6), (1, 5, 3)]
    assert [step.reading_s for step in workers] == [2.0, 2.0]  # the mean of 1, 2, 3: workers read unevenly
    alone = read([3, 0, 2, 1], [9.0, 1.0, 2.0, 3.0], profile=2, dataloader_num_workers=0)
    assert [step.reading_s for step in alone] == [2.0, 3.0]
    with pytest.raises(ValueError, match="no step of x has a usable pair"):
        read([0, 0], [1.0, 1.0], profile=2)


def test_workers_hide_what_takes_less_time_than_computing():
    step = ProfiledStep(a_batch([]), 1, 2, 2, 2, reading_s=3.0)
    assert [step.wait_s(computing, ahead) for computing, ahead in ((1.0, True), (5.0, True), (5.0, False))] == [
        2.0,
        0.0,
        3.0,
    ]


def test_counts_are_of_all_ranks_and_samples_of_this_one(group, monkeypatch):
    other = (4, 8, 40, 20)  # pairs, responses, prompt and response tokens of another rank
    monkeypatch.setattr(profile_batches, "every_rank", lambda own: [own, other] if isinstance(own, tuple) else [own])
    (step,) = read([2, 2], [0.0, 0.0], profile=1, per_device_train_batch_size=1)
    assert (step.pairs, step.responses, step.prompt_tokens, len(step.samples)) == (6, 12, 51, 2)


# ---- the record ----


def test_the_limit_is_that_of_passes_per_token():
    """Prefix five times as long as a response: 3 * 2 * 6 over 2 * 7, and 3 over 2, as SYSTEMS counts them."""
    found = limit(a_config(), 500, 200)
    assert found["dpo_over_synpo_shared"] == pytest.approx(36 / 14) and found["unshared"] == 1.5
    assert limit(a_config(gradient_checkpointing=True), 500, 200)["unshared"] == pytest.approx(4 / 3)
    assert limit(a_config(), 500, 300, 3)["dpo_over_synpo_shared"] == pytest.approx(
        3 * 1800 / (2 * 800)
    )  # a ground truth
    assert limit(a_config(use_peft=False), 500, 200)["dpo_over_synpo_shared"] == pytest.approx(48 / 21)


def times_of(*seconds, vision=0.25):
    stages = dict.fromkeys(STAGES, 0.0)
    return [StageTimes(each, {**stages, VISION: vision * each, BACKWARD: (1 - vision) * each}) for each in seconds]


def test_ratios_are_taken_round_by_round():
    variant = Variant("synpo", "synpo", None, True)
    record = variant_record(variant, times_of(1, 2, 4), times_of(2, 6, 20), [100, 100, 400], {"loss": -0.5})
    assert record["seconds"] == {"median": 2, "low": 1, "high": 4, "samples": [1, 2, 4]}
    assert record["ratio"] == {"median": 3, "low": 2, "high": 5}
    assert record["tokens_per_s"] == 100  # of 100, 50, 100
    assert variant_record(variant, times_of(1), None, [7], {})["ratio"] is None
    skipped = variant_record(replace(variant, skipped="no room"), [], times_of(1), [7], {})
    assert (skipped["skipped"], skipped["seconds"], skipped["loss"]) == ("no room", None, None)


def test_stages_of_the_median_step_sum_to_it():
    """Three stages, of which each round gives most to another: their median shares, 0.2 each, leave two fifths out."""
    times = []
    for seconds, most in ((10, VISION), (2, BACKWARD), (8, OTHER)):
        shares = {VISION: 0.2, BACKWARD: 0.2, OTHER: 0.2, most: 0.6}
        times.append(StageTimes(seconds, {stage: seconds * shares.get(stage, 0.0) for stage in STAGES}))
    stages = stage_spreads(times)
    assert [stages[stage]["median"] for stage in (VISION, BACKWARD, OTHER, HEAD)] == pytest.approx([8 / 3] * 3 + [0])
    assert stages[VISION]["low"] == pytest.approx(8 / 3) and stages[VISION]["high"] == pytest.approx(8)
