"""--profile: the ways do what they say, stages sum to the step, nothing is trained and nothing else is written.

No test looks at how long something took. What the ways compute is counted by spies on the tower and on the language model, and
compared with counts worked out from the pairs.
"""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from synpo_fast.data.loader import StepBatch
from synpo_fast.models.layout import SampleLengths, plan_rows
from synpo_fast.models.policy import Policy, Sample
from synpo_fast.models.qwen2_5_vl import Qwen25VL
from synpo_fast.models.scoring import EncodedPair
from synpo_fast.training import profile_batches, stage_clock
from synpo_fast.training.config import TrainConfig
from synpo_fast.training.loop import TrainingStopped
from synpo_fast.training.profile_batches import ProfiledStep, read_steps
from synpo_fast.training.profile_bench import WARM_UP, Bench, turned
from synpo_fast.training.profile_record import limit, stage_spreads, table, way_record
from synpo_fast.training.profile_ways import KINDS, Way, WaySwitch, ways_of
from synpo_fast.training.run_state import RunState
from synpo_fast.training.stage_clock import (
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
from tests.training.world import ROOT, environment, options, run, train_command

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
    module.loss_of_logps = lambda: "own"
    policy = SimpleNamespace(encode_videos=lambda: 1, hidden_states=lambda row: 2, _row_logps=lambda: 3)
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
    code = (
        "import sys, synpo_fast.training.start;"
        "print([m for m in sys.modules if 'stage_clock' in m or 'profile_' in m or 'step_profile' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr


# ---- the ways ----


def names_of(config, **facts):
    return {way.name: way.skipped for way in ways_of(config, **{"equal_batches": True, "copied": True, **facts})}


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
        ({}, {"equal_batches": False}, [], ""),
        ({"zero_stage": 3}, {"equal_batches": False}, [NAMES[2], *NAMES[4:]], "zero_stage=3"),
    ],
)  # fmt: skip
def test_what_can_not_be_measured_is_listed_with_its_reason(config, facts, skipped, reason):
    found = names_of(a_config(**config), **facts)
    assert [name for name, why in found.items() if why] == skipped
    assert all(reason in found[name] for name in skipped)


def test_everyone_follows_others_from_round_to_round():
    orders = [turned(NAMES, index) for index in range(-2, 2 * len(NAMES))]
    assert all(sorted(order) == sorted(NAMES) for order in orders)
    for place in (0, -1):
        assert {order[place] for order in orders} == set(NAMES)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"profile": -1}, "profile may not be negative, got -1"),
        ({"profile": 2, "resume": "auto"}, "leave resume"),
        ({"profile": 2, "overwrite_output_dir": True}, "overwrite_output_dir unset"),
    ],
)
def test_options_that_make_no_sense_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        a_config(**more)


def a_bench(**config):
    config = a_config(**config)
    pair = EncodedPair(Sample((1, 2), ((3,), (4,))), "a", preference=True, has_ground_truth=False)
    engine = SimpleNamespace(dtype=torch.float32, module=SimpleNamespace(auxiliary=None))
    ways = ways_of(config, equal_batches=True, copied=True)
    return Bench(config, engine, None, ways, [ProfiledStep([([pair], 1.0)], 1, 2, 2, 2, 0.0)], CPU)


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
def test_no_time_is_shown_for_ways_whose_losses_disagree(wrong, message):
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


def a_batch(step, num_pairs, wait_s):
    pairs = [
        EncodedPair(Sample(tuple(range(5 + i)), ((1, 2), (3,))), f"{step}-{i}", preference=True, has_ground_truth=False)
        for i in range(num_pairs)
    ]
    return StepBatch(0, step, pairs, 3, [], wait_s)


def read(sizes, waits, **config):
    loader = SimpleNamespace(
        steps_per_epoch=len(sizes),
        steps=lambda epoch: (a_batch(step, *each) for step, each in enumerate(zip(sizes, waits, strict=True))),
    )
    return read_steps(a_config(**config), loader)


def test_steps_without_pairs_and_the_first_reading_are_left_out(group):
    workers = read([3, 0, 2, 1], [9.0, 1.0, 2.0, 3.0], profile=2, dataloader_num_workers=2)
    assert [(step.pairs, step.prompt_tokens, step.response_tokens) for step in workers] == [(2, 11, 6), (1, 5, 3)]
    assert [step.reading_s for step in workers] == [2.0, 2.0]  # the mean of 1, 2, 3: workers read unevenly
    alone = read([3, 0, 2, 1], [9.0, 1.0, 2.0, 3.0], profile=2, dataloader_num_workers=0)
    assert [step.reading_s for step in alone] == [2.0, 3.0]
    with pytest.raises(ValueError, match="no step of x has a pair"):
        read([0, 0], [1.0, 1.0], profile=2)


def test_workers_hide_what_takes_less_time_than_computing():
    step = ProfiledStep([], 1, 2, 2, 2, reading_s=3.0)
    assert [step.wait_s(computing, ahead) for computing, ahead in ((1.0, True), (5.0, True), (5.0, False))] == [
        2.0,
        0.0,
        3.0,
    ]


def test_ranks_with_fewer_micro_batches_are_filled_up_with_weight_0(group, monkeypatch):
    other = (4, 8, 40, 20, 4)  # pairs, responses, prompt and response tokens, micro-batches of another rank
    monkeypatch.setattr(profile_batches, "every_rank", lambda own: [own, other] if isinstance(own, tuple) else [own])
    (step,) = read([2, 2], [0.0, 0.0], profile=1, per_device_train_batch_size=1)
    assert [(len(pairs), weight) for pairs, weight in step.micros] == [(1, 1.0), (1, 1.0), (1, 0.0), (1, 0.0)]
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
    way = Way("synpo", "synpo", None, True)
    record = way_record(way, times_of(1, 2, 4), times_of(2, 6, 20), [100, 100, 400], {"loss": -0.5})
    assert record["seconds"] == {"median": 2, "low": 1.5, "high": 3}
    assert record["ratio"] == {"median": 3, "low": 2.5, "high": 4}
    assert record["tokens_per_s"] == 100  # of 100, 50, 100
    assert way_record(way, times_of(1), None, [7], {})["ratio"] is None
    skipped = way_record(replace(way, skipped="no room"), [], times_of(1), [7], {})
    assert (skipped["skipped"], skipped["seconds"], skipped["loss"]) == ("no room", None, None)


def test_stages_of_the_median_step_sum_to_it():
    """Three stages, of which each round gives most to another: their median shares, 0.2 each, leave two fifths out."""
    times = []
    for seconds, most in ((10, VISION), (2, BACKWARD), (8, OTHER)):
        shares = {VISION: 0.2, BACKWARD: 0.2, OTHER: 0.2, most: 0.6}
        times.append(StageTimes(seconds, {stage: seconds * shares.get(stage, 0.0) for stage in STAGES}))
    stages = stage_spreads(times)
    assert [stages[stage]["median"] for stage in (VISION, BACKWARD, OTHER, HEAD)] == pytest.approx([8 / 3] * 3 + [0])
    assert stages[VISION]["low"] == pytest.approx(8 / 3) and stages[VISION]["high"] == pytest.approx(16 / 3)


# ---- whole profiles of a tiny model ----


@dataclass
class Seen:
    """What one step had computed: videos given to a tower, and rows and tokens given to a language model."""

    way: str
    videos: int = 0
    rows: int = 0
    tokens: int = 0
    pairs: list = field(default_factory=list)


@dataclass
class Watched:
    record: dict
    steps: list
    state: RunState
    moved: bool
    printed: str = ""


def watch(values, group) -> Watched:
    """A profile in this process, with spies on what is computed. `moved`: whether a trained weight changed."""
    from synpo_fast.training.start import train_in_group

    current, steps, moved = [""], [], []

    def spied(owner, name, note):
        own = getattr(owner, name)

        def inside(self, *args, **kwargs):
            note(*args)
            return own(self, *args, **kwargs)

        patch.setattr(owner, name, inside)

    def note_row(row, *_):
        if steps:
            steps[-1].rows += 1
            steps[-1].tokens += row.length

    def note_videos(_, videos):
        if steps:
            steps[-1].videos += len(videos)

    own_run = Bench.run

    def run_and_compare(self, progress):
        trained = [p for _, p in self.engine.trained_parameters()]
        before = [p.detach().clone() for p in trained]
        result = own_run(self, progress)
        moved.append(any(not torch.equal(p, was) for p, was in zip(trained, before, strict=True)))
        return result

    with pytest.MonkeyPatch.context() as patch:
        spied(WaySwitch, "use", lambda way: current.__setitem__(0, way.name))
        spied(Bench, "take", lambda step, seed: steps.append(Seen(current[0], pairs=step.samples)))
        spied(Policy, "hidden_states", note_row)
        spied(Qwen25VL, "encode_videos", note_videos)
        patch.setattr(Bench, "run", run_and_compare)
        state = train_in_group(TrainConfig(**values), group)
    record = json.loads((Path(values["output_dir"]) / "profile.json").read_text())
    return Watched(record, steps, state, moved[0])


def digests(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder that an earlier run has filled."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoint-000003").mkdir()
    for name in ("checkpoint-000003/adapter_model.safetensors", "metrics.jsonl", "config.yaml", "reference.pt"):
        (folder / name).write_text(f"{name} of an earlier run")
    return folder


@pytest.fixture(scope="module")
def profiled(world, run_folder, group):
    before = digests(run_folder)
    watched = watch(options(world, run_folder, profile=2, lora_dropout=0.1, gradient_accumulation_steps=PAIRS), group)
    return watched, before


def test_a_profile_trains_nothing_and_leaves_the_folders_run_as_it_was(profiled, run_folder):
    watched, before = profiled
    after = digests(run_folder)
    assert after.pop("profile.json")
    assert after == before
    assert watched.state == RunState() and not watched.moved


def test_profile_json_holds_what_the_report_reads(profiled):
    record = profiled[0].record
    assert [way["name"] for way in record["ways"]] == NAMES
    assert record["rounds"] == 2 and record["ratio_base"] == "dpo-adapter-off-unshared"
    for way in record["ways"]:
        assert way["skipped"] is None and set(way["stages"]) == set(STAGES)
        assert set(way["seconds"]) == set(way["ratio"]) == {"median", "low", "high"}
        assert sum(stage["median"] for stage in way["stages"].values()) == pytest.approx(way["seconds"]["median"])
        # The host's clock around the step against the borders inside it.
        assert way["stages_over_step"]["median"] == pytest.approx(1, abs=0.05)
        assert (way["stages"][REFERENCE]["median"] > 0) == (way["loss_type"] == "dpo")
        assert all(way["stages"][stage]["median"] > 0 for stage in (VISION, PREFIX, RESPONSES, HEAD, BACKWARD))
        assert way["peak_memory_bytes"] > 4 * record["environment"]["parameters"]
        assert (way["amortised_s"] is not None) == (way["reference"] == "precomputed")
    assert {"torch", "deepspeed", "device", "threads", "processes"} <= set(record["environment"])


def test_batches_are_counted_as_the_pairs_are_long(profiled):
    watched = profiled[0]
    # Rounds 0 and 1 are the steps behind those of the warm-up, which took each way once a round.
    rounds = [watched.steps[(WARM_UP + index) * len(NAMES)].pairs for index in range(2)]
    every = [sample for pairs in rounds for sample in pairs]
    batch = watched.record["batch"]
    assert batch["pairs"] == PAIRS
    assert batch["prompt_tokens"] == sum(len(sample.prompt) for sample in every) / 2
    assert batch["response_tokens"] == sum(len(r) for sample in every for r in sample.responses) / 2
    assert batch["prefix_to_completion"] == pytest.approx(2 * batch["prompt_tokens"] / batch["response_tokens"])


@pytest.mark.parametrize("name", NAMES)
def test_a_way_computes_what_it_says(profiled, name):
    """Micro-batches of one pair: with the gains a pair is one row, and one video for policy and reference."""
    found = [step for step in profiled[0].steps if step.way == name]
    assert len(found) == WARM_UP + 2 + 3  # and three steps that are counted
    passes = 2 if name.startswith(("dpo-adapter-off", "dpo-frozen-copy")) else 1
    shared = not name.endswith("-unshared")
    for step in found:
        assert step.videos == PAIRS * (1 if shared else passes)
        assert step.rows == PAIRS * passes * (1 if shared else 2)
        prompts = sum(len(sample.prompt) for sample in step.pairs) * (1 if shared else 2)
        branches = sum(len(response) - 1 for sample in step.pairs for response in sample.responses)
        assert step.tokens == passes * (prompts + branches)


def test_all_ways_of_a_round_take_the_same_step(profiled):
    steps = profiled[0].steps[: (WARM_UP + 2) * len(NAMES)]
    for begin in range(0, len(steps), len(NAMES)):
        part = steps[begin : begin + len(NAMES)]
        assert sorted(step.way for step in part) == sorted(NAMES)
        assert len({tuple(map(id, step.pairs)) for step in part}) == 1


def test_losses_are_equal_where_they_must_be(profiled):
    losses = {way["name"]: way["loss"] for way in profiled[0].record["ways"]}
    assert all(losses[name] == pytest.approx(LOG_2, abs=1e-5) for name in NAMES if name.startswith("dpo"))
    assert losses["synpo"] == pytest.approx(losses["synpo-unshared"], abs=1e-5) and losses["synpo"] < 0


def test_counted_work_orders_the_ways(profiled):
    flops = {way["name"]: way["flops"] for way in profiled[0].record["ways"]}
    assert flops["synpo"] == flops["dpo-precomputed"]  # the same passes under another formula
    assert flops["synpo-unshared"] == flops["dpo-precomputed-unshared"]
    assert flops["dpo-adapter-off"] == flops["dpo-frozen-copy"] > flops["synpo"]
    for kind in KINDS:
        name = f"dpo-{kind.replace('_', '-')}"
        assert flops[f"{name}-unshared"] > flops[name]


def test_the_table_names_every_way_and_every_reason(profiled):
    record = json.loads(json.dumps(profiled[0].record))
    text = table(record)
    assert all(sum(line.startswith(f"{name} ") for line in text.splitlines()) == 2 for name in NAMES)
    record["ways"][2] |= {"skipped": "no room for it", "seconds": None, "stages": None}
    assert "dpo-frozen-copy: not measured, no room for it" in table(record)


def test_full_fine_tuning_from_a_dpo_config_with_a_feature_cache(world, tmp_path, group):
    """No adapter to switch off; the run's own precomputed reference is not made; the cache spares the tower, except where
    the gains are left out."""
    more = {"use_peft": False, "loss_type": "dpo", "reference": "precomputed", "zero_stage": 0, "variant": "ipo"}
    values = options(world, tmp_path / "out", profile=1, feature_cache=str(tmp_path / "features"), **more)
    watched = watch({**values, "gradient_accumulation_steps": 2}, group)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["profile.json"]
    ways = {way["name"]: way for way in watched.record["ways"]}
    assert [name for name, way in ways.items() if way["skipped"]] == ["dpo-adapter-off", "dpo-adapter-off-unshared"]
    assert watched.record["ratio_base"] == "dpo-frozen-copy-unshared" and not watched.moved
    last = {step.way: step for step in watched.steps}
    videos = {"synpo": 0, "dpo-frozen-copy": 0, "dpo-precomputed": 0}
    unshared = {"synpo-unshared": 2, "dpo-frozen-copy-unshared": 4, "dpo-precomputed-unshared": 2}
    assert {name: step.videos for name, step in last.items()} == videos | unshared
    dpo = {way["loss"] for way in ways.values() if way["loss_type"] == "dpo" and not way["skipped"]}
    assert max(dpo) - min(dpo) < 1e-3 and min(dpo) > 1  # ipo begins at 1 / (2 beta) ** 2


def test_ways_whose_losses_differ_stop_the_profile(world, tmp_path, group, monkeypatch):
    """A reference that is not the policy as it begins."""
    from synpo_fast.training import profile_ways

    def shifted(policy, samples, share_prefix=True):
        return [[torch.full((len(r),), -1.0 - i) for i, r in enumerate(sample.responses)] for sample in samples]

    monkeypatch.setattr(profile_ways, "detached_logps", shifted)
    values = options(world, tmp_path, profile=1, gradient_accumulation_steps=2)
    with pytest.raises(TrainingStopped, match="dpo-precomputed"):
        watch(values, group)
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks(world, tmp_path, port, stage):
    values = options(world, tmp_path, profile=2, zero_stage=stage, gradient_accumulation_steps=2)
    done = run(train_command(values, num_ranks=2, port=port))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "profile.json").read_text())
    assert record["batch"]["pairs"] == 4 and record["environment"]["processes"] == 2
    measured = [way for way in record["ways"] if way["skipped"] is None]
    assert [way["name"] for way in measured] == [name for name in NAMES if stage == 2 or "frozen" not in name]
    for way in measured:
        assert way["stages_over_step"]["median"] == pytest.approx(1, abs=0.05)
        assert way["stages"][COMMUNICATION]["median"] > 0
    assert done.stdout.count("milliseconds by stage") == 1
