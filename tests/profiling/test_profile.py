"""--profile: the variants do what they say, nothing is trained and nothing else is written.

No test looks at how long something took. What the variants compute is counted by spies on the tower and on the language model,
and compared with counts worked out from the pairs.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.models.families.qwen2_5_vl import Qwen25VL
from synpo_fast.models.policy import Policy
from synpo_fast.profiling import bench as profile_bench
from synpo_fast.profiling import variants as profile_variants
from synpo_fast.profiling.bench import WARM_UP, Bench
from synpo_fast.profiling.record import table
from synpo_fast.profiling.stage_clock import (
    BACKWARD,
    COMMUNICATION,
    HEAD,
    PREFIX,
    REFERENCE,
    RESPONSES,
    STAGES,
    VISION,
)
from synpo_fast.profiling.variants import KINDS, VariantSwitch
from synpo_fast.training.loop import TrainingStopped
from synpo_fast.training.run_state import RunState
from tests.profiling.test_profile_parts import NAMES, PAIRS
from tests.world import options, run, train_command, with_gaps


@dataclass
class Seen:
    """One step's work: videos given to a tower, and rows and tokens given to a language model."""

    variant: str
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
    from synpo_fast.train import run_in_group

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
        spied(VariantSwitch, "use", lambda variant: current.__setitem__(0, variant.name))
        spied(Bench, "take", lambda step, seed: steps.append(Seen(current[0], pairs=step.samples)))
        spied(Policy, "hidden_states", note_row)
        spied(Qwen25VL, "encode_videos", note_videos)
        patch.setattr(Bench, "run", run_and_compare)
        state = run_in_group(TrainConfig(**values), group)
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
    assert [variant["name"] for variant in record["variants"]] == NAMES
    assert record["rounds"] == 2 and record["ratio_base"] == "dpo-adapter-off-unshared"
    for variant in record["variants"]:
        assert variant["skipped"] is None and set(variant["stages"]) == set(STAGES)
        assert (
            set(variant["seconds"]) == {"median", "low", "high", "samples"} and len(variant["seconds"]["samples"]) == 2
        )
        assert set(variant["ratio"]) == {"median", "low", "high"}
        assert sum(stage["median"] for stage in variant["stages"].values()) == pytest.approx(
            variant["seconds"]["median"]
        )
        # The host's clock around the step against the borders inside it.
        assert variant["stages_over_step"]["median"] == pytest.approx(1, abs=0.05)
        assert (variant["stages"][REFERENCE]["median"] > 0) == (variant["loss_type"] == "dpo")
        assert all(variant["stages"][stage]["median"] > 0 for stage in (VISION, PREFIX, RESPONSES, HEAD, BACKWARD))
        assert variant["peak_memory_bytes"] > 4 * record["environment"]["parameters"]
        assert (variant["amortised_s"] is not None) == (variant["reference"] == "precomputed")
    assert {"torch", "deepspeed", "device", "threads", "processes"} <= set(record["environment"])


def test_batches_are_counted_as_the_pairs_are_long(profiled):
    watched = profiled[0]
    # Rounds 0 and 1 are the steps behind those of the warm-up, which took each variant once a round.
    rounds = [watched.steps[(WARM_UP + index) * len(NAMES)].pairs for index in range(2)]
    every = [sample for pairs in rounds for sample in pairs]
    batch = watched.record["batch"]
    assert batch["pairs"] == PAIRS
    assert batch["prompt_tokens"] == sum(len(sample.prompt) for sample in every) / 2
    assert batch["response_tokens"] == sum(len(r) for sample in every for r in sample.responses) / 2
    assert batch["prefix_to_completion"] == pytest.approx(2 * batch["prompt_tokens"] / batch["response_tokens"])


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_computes_what_it_says(profiled, name):
    """Micro-batches of one pair, one row each; with the gains its prompt is there once, and its video runs once."""
    found = [step for step in profiled[0].steps if step.variant == name]
    assert len(found) == WARM_UP + 2 + 3  # and three steps that are counted
    passes = 2 if name.startswith(("dpo-adapter-off", "dpo-frozen-copy")) else 1
    shared = not name.endswith("-unshared")
    for step in found:
        assert step.videos == PAIRS * (1 if shared else passes)
        assert step.rows == PAIRS * passes  # unshared ones are packed, too
        prompts = sum(len(sample.prompt) for sample in step.pairs) * (1 if shared else 2)
        branches = sum(len(response) - 1 for sample in step.pairs for response in sample.responses)
        assert step.tokens == passes * (prompts + branches)


def test_all_variants_of_a_round_take_the_same_step(profiled):
    steps = profiled[0].steps[: (WARM_UP + 2) * len(NAMES)]
    for begin in range(0, len(steps), len(NAMES)):
        part = steps[begin : begin + len(NAMES)]
        assert sorted(step.variant for step in part) == sorted(NAMES)
        assert len({tuple(map(id, step.pairs)) for step in part}) == 1


def test_losses_are_equal_where_they_must_be(profiled):
    losses = {variant["name"]: variant["loss"] for variant in profiled[0].record["variants"]}
    assert all(losses[name] == pytest.approx(math.log(2), abs=1e-5) for name in NAMES if name.startswith("dpo"))
    assert losses["synpo"] == pytest.approx(losses["synpo-unshared"], abs=1e-5) and losses["synpo"] < 0


def test_counted_work_orders_the_variants(profiled):
    flops = {variant["name"]: variant["flops"] for variant in profiled[0].record["variants"]}
    assert flops["synpo"] == flops["dpo-precomputed"]  # the same passes under another formula
    assert flops["synpo-unshared"] == flops["dpo-precomputed-unshared"]
    assert flops["dpo-adapter-off"] == flops["dpo-frozen-copy"] > flops["synpo"]
    for kind in KINDS:
        name = f"dpo-{kind.replace('_', '-')}"
        assert flops[f"{name}-unshared"] > flops[name]


def test_the_table_names_every_variant_and_every_reason(profiled):
    record = json.loads(json.dumps(profiled[0].record))
    text = table(record)
    assert all(sum(line.startswith(f"{name} ") for line in text.splitlines()) == 2 for name in NAMES)
    assert "medians [lowest - highest]" in text
    record["variants"][2] |= {"skipped": "no room for it", "seconds": None, "stages": None}
    assert "dpo-frozen-copy: not measured, no room for it" in table(record)


def test_full_fine_tuning_from_a_dpo_config_with_a_feature_cache(world, tmp_path, group, monkeypatch):
    """No adapter to switch off; the run's own precomputed reference is not made; the cache spares the tower, except where
    the gains are left out, as they are when log-probs are made for the unshared variant."""
    beforehand, own = [], profile_variants.detached_logps

    def spied(policy, samples, share_prefix=True):
        beforehand.append((share_prefix, policy.feature_store is not None))
        return own(policy, samples, share_prefix)

    monkeypatch.setattr(profile_variants, "detached_logps", spied)
    more = {"use_peft": False, "loss_type": "dpo", "reference": "precomputed", "zero_stage": 0, "variant": "ipo"}
    values = options(world, tmp_path / "out", profile=1, feature_cache=str(tmp_path / "features"), **more)
    watched = watch({**values, "gradient_accumulation_steps": 2}, group)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["profile.json"]
    variants = {variant["name"]: variant for variant in watched.record["variants"]}
    assert [name for name, variant in variants.items() if variant["skipped"]] == [
        "dpo-adapter-off",
        "dpo-adapter-off-unshared",
    ]
    assert watched.record["ratio_base"] == "dpo-frozen-copy-unshared" and not watched.moved
    last = {step.variant: step for step in watched.steps}
    videos = {"synpo": 0, "dpo-frozen-copy": 0, "dpo-precomputed": 0}
    unshared = {"synpo-unshared": 2, "dpo-frozen-copy-unshared": 4, "dpo-precomputed-unshared": 2}
    assert {name: step.videos for name, step in last.items()} == videos | unshared
    dpo = {variant["loss"] for variant in variants.values() if variant["loss_type"] == "dpo" and not variant["skipped"]}
    assert max(dpo) - min(dpo) < 1e-3 and min(dpo) > 1  # ipo begins at 1 / (2 beta) ** 2
    assert beforehand[0] == (True, True), "one call to warm up"
    assert sorted(beforehand[1:]) == sorted([(False, False), (True, True)] * (len(beforehand) // 2))
    taken = {name: variant["amortised_s"] for name, variant in variants.items() if variant["amortised_s"] is not None}
    assert set(taken) == {"dpo-precomputed", "dpo-precomputed-unshared"} and len(set(taken.values())) == 2


def test_rows_are_not_packed_where_attention_takes_their_square(world, tmp_path, group):
    values = options(world, tmp_path, profile=1, per_device_train_batch_size=2, attn_implementation="sdpa")
    watched = watch({**values, "gradient_accumulation_steps": 1}, group)
    rows = {step.variant: step.rows for step in watched.steps}
    passes = {name: 1 if name.startswith(("synpo", "dpo-precomputed")) else 2 for name in NAMES}
    assert rows == {name: passes[name] * (4 if name.endswith("-unshared") else 1) for name in NAMES}


def test_counting_that_runs_out_of_memory_is_named(world, tmp_path, group, monkeypatch):
    def count(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(profile_bench, "count_flops", count)
    with pytest.raises(TrainingStopped, match=r"^synpo ran out of memory.*max_batch_tokens"):
        watch(options(world, tmp_path, profile=1, gradient_accumulation_steps=1), group)


def test_variants_whose_losses_differ_stop_the_profile(world, tmp_path, group, monkeypatch):
    """A reference that is not the policy as it begins."""

    def shifted(policy, samples, share_prefix=True):
        return [[torch.full((len(r),), -1.0 - i) for i, r in enumerate(sample.responses)] for sample in samples]

    monkeypatch.setattr(profile_variants, "detached_logps", shifted)
    values = options(world, tmp_path, profile=1, gradient_accumulation_steps=2)
    with pytest.raises(TrainingStopped, match="dpo-precomputed"):
        watch(values, group)
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.parametrize(
    ("in_the_step", "more"), [(True, {}), (False, {}), (True, {"oom_policy": "skip", "zero_stage": 1})]
)
def test_a_variant_that_runs_out_of_memory_is_named(world, tmp_path, group, monkeypatch, in_the_step, more):
    """Under oom_policy=skip, too: a step without some of its pairs is not what the others took."""

    def failing(own):
        def method(self, samples, *, share_prefix=True, **more):
            if not share_prefix and torch.is_grad_enabled() == in_the_step:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return own(self, samples, share_prefix=share_prefix, **more)

        return method

    for name in ("forward", "token_outputs"):  # of a reference, and of a step
        monkeypatch.setattr(Policy, name, failing(getattr(Policy, name)))
    with pytest.raises(
        TrainingStopped,
        match=rf"{'.*' if in_the_step else 'dpo-precomputed'}-unshared ran out of memory.*lower per_device_train_batch_size",
    ):
        watch(options(world, tmp_path, profile=1, **more), group)
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks(world, tmp_path, port, stage):
    values = options(world, tmp_path, profile=2, zero_stage=stage, gradient_accumulation_steps=2)
    done = run(train_command(values, num_ranks=2, port=port))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "profile.json").read_text())
    assert record["batch"]["pairs"] == 4 and record["environment"]["processes"] == 2
    measured = [variant for variant in record["variants"] if variant["skipped"] is None]
    assert [variant["name"] for variant in measured] == [name for name in NAMES if stage == 2 or "frozen" not in name]
    for variant in measured:
        assert variant["stages_over_step"]["median"] == pytest.approx(1, abs=0.05)
        assert variant["stages"][COMMUNICATION]["median"] > 0
    assert done.stdout.count("milliseconds by stage") == 1


@pytest.mark.heavy
def test_ranks_with_unequal_numbers_of_pairs_share_the_weights(world, tmp_path, port):
    """zero_stage=3 has all ranks gather weights in step, whatever each of them holds."""
    with_gaps(world / "pairs.jsonl", tmp_path / "pairs.jsonl")
    values = options(world, tmp_path / "out", profile=3, zero_stage=3, per_device_train_batch_size=2)
    values |= {"train_file": tmp_path / "pairs.jsonl", "video_root": world, "gradient_accumulation_steps": 1}
    done = run(train_command(values, num_ranks=2, port=port))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [variant["name"] for variant in record["variants"] if variant["skipped"] is None] == [
        n for n in NAMES if "frozen" not in n
    ]
