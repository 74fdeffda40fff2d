"""docs/using_the_loss.md: its code runs and computes the eager loss, and the options it names are the code's."""

import ast
import contextlib
import dataclasses
import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from . import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "using_the_loss.md").read_text()
ROWS = tiny.token_rows(tiny.pairs(4))
BATCHES = [ROWS[:2], ROWS[2:]]
PAD = tiny.VOCABULARY[tiny.PAD]


def blocks(heading: str) -> list[str]:
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section, heading
    return re.findall(r"^```python\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)


def run(code: str, **names):
    """Runs a block in a module of its own (classes look theirs up) and returns its names."""
    module = types.ModuleType("a_block_of_the_page")
    module.__dict__.update(names)
    exec(compile(code, "docs/using_the_loss.md", "exec"), module.__dict__)
    return module


def eager(rows, policy=None) -> float:
    with torch.no_grad():
        return float(torch.stack([tiny.eager_synpo(policy or tiny.model(), row) for row in rows]).mean())


def test_every_block_is_run_here():
    assert len(re.findall("^```python", PAGE, re.MULTILINE)) == 6


def test_own_loop():
    (code,) = blocks("Your own loop")
    policy, other = tiny.model(), tiny.model()
    ran = run(code, model=policy, pad_token_id=PAD, batches=BATCHES)
    optimizer = torch.optim.AdamW(other.parameters(), lr=5e-6)
    for rows in BATCHES:
        loss = torch.stack([tiny.eager_synpo(other, row) for row in rows]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(ran.loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-6)
    assert {"rewards/chosen", "logps/chosen"} <= ran.metrics.keys()
    for parameter, expected in zip(policy.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=2e-6)


def test_trl(tmp_path):
    pytest.importorskip("trl", minversion="1.16", reason="the block imports it")
    datasets = pytest.importorskip("datasets", reason="TRL's data are datasets")
    (code,) = blocks("TRL")
    dataset = datasets.Dataset.from_list(tiny.pairs(8))
    names = {"output_dir": str(tmp_path), "max_steps": 1, "dataset": dataset, "tokenizer": tiny.tokenizer()}
    ran = run(code, model=tiny.model(), **names)
    assert ran.trainer.state.global_step == 1
    assert ran.trainer.state.log_history[-1]["train_loss"] < 0


def test_trl_options():
    pytest.importorskip("trl", minversion="1.16", reason="its config has the options")
    from synpo_fast.integrations.trl import WHY_REFUSED, SynPOConfig

    rows = re.findall(r"^\| `(synpo_\w+)` \| `(.*?)` \|", PAGE, re.MULTILINE)
    fields = {field.name: field.default for field in dataclasses.fields(SynPOConfig)}
    assert {name: ast.literal_eval(default) for name, default in rows} == {
        name: default for name, default in fields.items() if name.startswith("synpo_")
    }
    refused = re.search(r"only mean something for DPO\s+\((.*?)\)", PAGE, re.DOTALL)
    assert refused
    assert set(re.findall(r"`(\w+)`", refused[1])) <= set(WHY_REFUSED)
    assert "router_aux_loss_coef" in fields


def test_hf_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
    (code,) = blocks(r"transformers\.Trainer")
    policy = tiny.model()
    ran = run(code, model=policy, output_dir=str(tmp_path), max_steps=1, rows=ROWS, pad_token_id=PAD)
    assert ran.trainer.state.log_history[-1]["train_loss"] == pytest.approx(eager(ROWS), abs=1e-6)
    assert ran.metrics.keys() >= {"rewards/chosen", "logps/chosen", "nll_loss"}
    assert tiny.transformers.TrainingArguments(str(tmp_path), accelerator_config={"dispatch_batches": False})


def lightning_or_stand_in():
    """Lightning where it is installed; else a base class with the one method the block calls."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("lightning")
    stand_in = types.ModuleType("lightning")
    stand_in.LightningModule = type("LightningModule", (torch.nn.Module,), {"log_dict": lambda *_, **__: None})
    return stand_in


def test_lightning(monkeypatch):
    from synpo_fast.integrations.hf_trainer import PairCollator

    monkeypatch.setitem(sys.modules, "lightning", lightning_or_stand_in())
    (code,) = blocks("Lightning")
    module = run(code).PairModule(tiny.model())
    module.log_dict = lambda metrics, batch_size: metrics.update(batch_size=batch_size)
    loss = module.training_step(PairCollator(PAD)(ROWS), 0)
    assert float(loss.detach()) == pytest.approx(eager(ROWS), abs=1e-6)
    assert module.pair_loss.last_output.metrics["batch_size"] == len(ROWS)
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)


def test_the_model_that_is_wrapped():
    from synpo_fast import FusedLinearSynPOLoss
    from synpo_fast.integrations.hf_trainer import PairCollator

    code, _ = blocks("DDP, FSDP, ZeRO-3")
    module = run(code).PairModel(tiny.model(), FusedLinearSynPOLoss())
    batch = PairCollator(PAD)(ROWS)
    target = torch.nn.functional.pad(batch["pair_labels"][:, 1:], (0, 1), value=-100)
    loss = module(batch["input_ids"], batch["attention_mask"], target)
    assert float(loss.detach()) == pytest.approx(eager(ROWS), abs=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in module.model.parameters())


def test_gathering_the_head(monkeypatch):
    """With a stand-in for DeepSpeed: what is absent is gathered, what is there is left alone."""
    gathered = []
    status = types.SimpleNamespace(NOT_AVAILABLE="absent", AVAILABLE="there")

    @contextlib.contextmanager
    def gather(parameters):
        gathered.append(parameters)
        yield

    names = ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.zero.partition_parameters")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["deepspeed"].zero = types.SimpleNamespace(GatheredParameters=gather)
    sys.modules["deepspeed.runtime.zero.partition_parameters"].ZeroParamStatus = status
    _, code = blocks("DDP, FSDP, ZeRO-3")
    policy = tiny.model()
    for policy.lm_head.weight.ds_status in (status.NOT_AVAILABLE, status.AVAILABLE):
        run(code, model=policy)
    assert gathered == [[policy.lm_head.weight], []]
