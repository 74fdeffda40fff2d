"""`--profile N`: measures a step of this run and DPO's step on the same batches, with the same engine and weights.

Nothing is trained: model, adapter, data and engine are those of the run, but every step has learning rate 0, so the weights do
not change. Losses that must be equal are compared before any time is shown. A round takes one step of each variant
(variants.py), in an order that changes from round to round. A clock (stage_clock.py) splits each step's time by stage.

The profile writes only profile.json. It saves no checkpoint and leaves a run in the same folder unchanged.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from synpo_fast.config.options import LOSS_OPTIONS
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.errors import UserError
from synpo_fast.profiling.batches import ProfiledStep, every_rank, read_steps
from synpo_fast.profiling.bench import WARM_UP, Bench
from synpo_fast.profiling.record import baseline_of, limit, table, variant_record
from synpo_fast.profiling.stage_clock import StageTimes
from synpo_fast.profiling.variants import VariantSwitch, make_references, variants_of
from synpo_fast.run_folder.checkpoint import check_writable
from synpo_fast.run_folder.superseded import set_aside
from synpo_fast.terminal.printable import counted
from synpo_fast.terminal.progress import Progress
from synpo_fast.training.run_data import RunData, read_data, train_loader
from synpo_fast.training.run_model import build_engine, build_model, checkpoints_activations
from synpo_fast.training.run_state import versions
from synpo_fast.training.start import check_options_for_device

FILE = "profile.json"


def profile_in_group(config: TrainConfig, device: torch.device) -> None:
    """Runs the profile. All ranks must call this; rank 0 writes profile.json and prints the table.

    Raises TrainingStopped if memory runs out, or if variants that must have the same loss differ: then they did not do the same
    work, and their times cannot be compared.
    """
    folder, rank = Path(config.output_dir), dist.get_rank()
    check_options_for_device(device, config)
    _check_folder(folder)
    # The automatic setting is resolved here, since the predicted ratios depend on it.
    config = replace(config, gradient_checkpointing=checkpoints_activations(config, device))
    progress = Progress(shows=rank == 0, bar=False, first_step=0, num_steps=config.profile, every=1)
    bench = _build(config, read_data(config), device)
    progress.say(
        f"profile: {counted(config.profile, 'round')} after {counted(WARM_UP, 'warm-up round')}, "
        f"{counted(len(bench.measured), 'variant')}, {counted(len(bench.steps), 'batch', 'batches')}, "
        f"{counted(bench.engine.world_size, 'process', 'processes')} on {device.type}",
        "profile",
    )
    times, losses = bench.run(progress)
    progress.say("counting memory and FLOPs")
    record = _record(bench, _mean_over_ranks(times), losses)
    if rank == 0:
        partial = folder / f"{FILE}.partial"
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if (folder / FILE).exists():
            progress.say(f"the earlier {FILE} is now {set_aside(folder / FILE)}")
        partial.replace(folder / FILE)
        print(table(record), flush=True)


def _check_folder(folder: Path) -> None:
    """Raises UserError on every rank if rank 0 cannot write to the folder."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            check_writable(folder)
        except UserError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0)
    if answer[0] is not None:
        raise UserError(answer[0])


def _build(config: TrainConfig, data: RunData, device: torch.device) -> Bench:
    """Builds the run as start.py does, with the references of all variants made before the engine, which may shard the model."""
    # Built for a loss without a reference; otherwise the run's own reference would be made and written into its folder.
    unset: dict[str, Any] = dict.fromkeys(LOSS_OPTIONS)
    model = build_model(replace(config, loss_type="synpo", reference="auto", **unset), data, device, checkpoint=None)
    # Some variants do not use the feature cache, so the videos are read with their pixels.
    with train_loader(
        replace(config, feature_cache=None), data, model.policy, dist.get_rank(), dist.get_world_size()
    ) as loader:
        steps = read_steps(config, loader)
    references = make_references(config, model.policy, [step.samples for step in steps])
    engine = build_engine(config, model)
    variants = variants_of(config, copied=references.copy is not None)
    return Bench(config, engine, VariantSwitch(config, model.module, references), variants, steps, device)


def _record(bench: Bench, times: Mapping[str, list[StageTimes]], losses: Mapping[str, float]) -> dict[str, Any]:
    """The content of profile.json. All ranks must call this, since measuring memory and FLOPs takes further steps."""
    config, base = bench.config, baseline_of(times)
    used = [bench.steps[index % len(bench.steps)] for index in range(config.profile)]
    batch = _batch_facts(used, len(bench.steps))
    tokens = [step.prompt_tokens + step.response_tokens for step in used]
    variants = []
    for variant in bench.variants:
        costs = {} if variant.skipped is not None else {"loss": losses[variant.name], **bench.costs(variant)}
        variants.append(
            variant_record(variant, times.get(variant.name, []), times[base] if base else None, tokens, costs)
        )
    return {
        "environment": _environment(bench),
        "rounds": config.profile,
        "batch": batch,
        "limit": limit(config, batch["prompt_tokens"], batch["response_tokens"], batch["responses"] / batch["pairs"]),
        "ratio_base": base,
        "variants": variants,
        "config": {name: value for name, value in asdict(config).items() if name != "local_rank"},
    }


def _batch_facts(used: Sequence[ProfiledStep], distinct: int) -> dict[str, Any]:
    """Means over the steps of the measured rounds; counts are sums over all ranks."""
    names = ("pairs", "responses", "prompt_tokens", "response_tokens", "reading_s")
    facts: dict[str, Any] = {name: sum(getattr(step, name) for step in used) / len(used) for name in names}
    a_prompt, a_response = facts["prompt_tokens"] / facts["pairs"], facts["response_tokens"] / facts["responses"]
    facts["prefix_to_completion"] = a_prompt / a_response
    return facts | {"distinct": distinct}


def _mean_over_ranks(times: Mapping[str, list[StageTimes]]) -> dict[str, list[StageTimes]]:
    """The mean times over all ranks. Ranks wait for each other, so their totals agree, but their stages may differ."""
    ranks = every_rank(dict(times))
    return {name: [_mean(row) for row in zip(*(rank[name] for rank in ranks), strict=True)] for name in times}


def _mean(times: Sequence[StageTimes]) -> StageTimes:
    stages = {stage: sum(each.stages[stage] for each in times) / len(times) for stage in times[0].stages}
    return StageTimes(sum(each.seconds for each in times) / len(times), stages)


def _environment(bench: Bench) -> dict[str, Any]:
    policy, engine = bench.engine.module.policy, bench.engine
    on_gpu = bench.device.type == "cuda"
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in policy.parameters()]
    return {
        **versions(),
        "device": torch.cuda.get_device_name(bench.device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "processes": engine.world_size,
        "zero_stage": engine.stage,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "attention": policy.attn_implementation,
        "model": policy.family.name,
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
        "feature_cache": bench.switch.store is not None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
