"""SynPOTrainer: TRL's own machinery follows the plain eager formula step by step, with one forward a step and no reference.

fp32 throughout; the losses are of size 1, so a tolerance of 1e-6 is some ten roundings. Measured: 1.2e-7.
"""

import dataclasses
import importlib.util
import sys

import pytest
import torch

from . import tiny

trl = pytest.importorskip("trl", minversion="1.16", reason="TRL is what is hooked into")
datasets = pytest.importorskip("datasets", reason="TRL's data are datasets")

from synpo_fast.integrations import trl as integration  # noqa: E402
from synpo_fast.integrations.trl import SynPOConfig, SynPOTrainer  # noqa: E402

ROWS = tiny.pairs(8)
METRICS = {
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "logits/chosen", "logits/rejected", "nll_loss", "num_tokens",
}  # fmt: skip


def trainer_for(policy, folder, rows=ROWS, *, trainer_class=SynPOTrainer, config_class=SynPOConfig, **changes):
    keys = ("peft_config", "eval_dataset", "ref_model", "compute_metrics", "data_collator")
    parts = {name: changes.pop(name) for name in keys if name in changes}
    return trainer_class(
        policy,
        args=config_class(**tiny.arguments(folder, per_device_train_batch_size=2, **changes)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        **parts,
    )


@pytest.mark.parametrize("head", ["trainable", "frozen"])
def test_thirty_steps(head, tmp_path):
    policy = tiny.model()
    policy.lm_head.requires_grad_(head == "trainable")
    expected = tiny.eager_training(tiny.twin(policy), tiny.batches_of(tiny.token_rows(ROWS), 2, tiny.STEPS))
    trainer = trainer_for(policy, tmp_path)
    trainer.train()
    got = tiny.logged(trainer)
    assert len(got) == tiny.STEPS
    assert got[0] > -0.6 and got[-1] < -1.0  # it learned: the loss lies between 0 and -1.2
    assert got == pytest.approx(expected, abs=1e-6)


def test_thirty_steps_with_lora(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = trainer_for(tiny.model(), tmp_path, peft_config=config, learning_rate=tiny.LEARNING_RATE)
    eager = tiny.twin(trainer.model)
    del eager.get_base_model().forward  # the copy computes its logits as transformers does
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "lora" not in name}
    expected = tiny.eager_training(eager, tiny.batches_of(tiny.token_rows(ROWS), 2, tiny.STEPS))
    trainer.train()
    assert tiny.logged(trainer) == pytest.approx(expected, abs=1e-6)
    assert expected[28] < expected[0] - 0.1  # the same batch, 28 steps later
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters() if name in before)
    assert trainer.ref_model is None
    assert list(trainer.model.peft_config) == ["default"]


def test_an_adapter_given_ready_made_is_not_copied(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    policy = peft.get_peft_model(tiny.model(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = trainer_for(policy, tmp_path, max_steps=1)
    trainer.train()
    assert list(policy.peft_config) == ["default"]  # DPOTrainer would have added "ref"


def test_gradient_accumulation(tmp_path):
    """Four micro-batches of two pairs a step are the mean over eight."""
    steps = 5
    policy = tiny.model()
    expected = tiny.eager_training(tiny.twin(policy), [tiny.token_rows(ROWS)] * steps)
    trainer = trainer_for(policy, tmp_path, max_steps=steps, gradient_accumulation_steps=4)
    trainer.train()
    assert tiny.logged(trainer) == pytest.approx(expected, abs=1e-6)


def test_truncation_is_trls(tmp_path):
    rows, length = tiny.token_rows(ROWS), 7
    for row in rows:
        room = length - len(row["prompt_ids"])
        row["chosen_ids"], row["rejected_ids"] = row["chosen_ids"][:room], row["rejected_ids"][:room]
    policy = tiny.model()
    expected = tiny.eager_training(tiny.twin(policy), tiny.batches_of(rows, 2, 4))
    trainer = trainer_for(policy, tmp_path, max_steps=4, max_length=length)
    trainer.train()
    assert tiny.logged(trainer) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("options", [{"synpo_alpha": 5.0}, {"synpo_beta": 0.7}, {"synpo_link": "logsigmoid"}], ids=str)
def test_options_reach_the_loss(options, tmp_path):
    trainer = trainer_for(tiny.model(), tmp_path, max_steps=1, **options)
    trainer.train()
    first = tiny.logged(trainer)[0]
    with torch.no_grad():
        plain = torch.stack([tiny.eager_synpo(tiny.model(), row) for row in tiny.token_rows(ROWS[:2])]).mean()
    assert abs(first - float(plain)) > 1e-3
    named = {name.removeprefix("synpo_"): value for name, value in options.items()}
    assert trainer.pair_loss.options == {"alpha": 30.0, "beta": 0.2, "link": "sigmoid", **named}


def test_one_forward_a_step_and_no_reference(tmp_path, monkeypatch):
    def no_loading(*_, **__):
        pytest.fail("a reference model was loaded")

    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", no_loading)
    policy = tiny.model()
    trainer = trainer_for(policy, tmp_path, max_steps=3)
    calls = []
    policy.model.register_forward_hook(
        lambda module, args, kwargs, _: calls.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    policy.lm_head.register_forward_hook(lambda *_: pytest.fail("logits were built"))
    trainer.train()
    assert calls == [4, 4, 4]  # two chosen and two rejected rows, once a step
    assert trainer.ref_model is None
    with pytest.raises(ValueError, match="no reference model"):
        trainer.ref_model = policy


def test_a_model_given_by_name_is_loaded_once(tmp_path, monkeypatch):
    loaded = []
    original = sys.modules["trl.trainer.dpo_trainer"].create_model_from_path

    def load(*args, **kwargs):
        loaded.append(args[0])
        return original(*args, **kwargs)

    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", load)
    folder = str(tmp_path / "model")
    tiny.model().save_pretrained(folder)
    trainer = trainer_for(folder, tmp_path, max_steps=1)
    trainer.train()
    assert loaded == [folder]
    with torch.no_grad():
        plain = torch.stack([tiny.eager_synpo(tiny.model(), row) for row in tiny.token_rows(ROWS[:2])]).mean()
    assert tiny.logged(trainer)[0] == pytest.approx(float(plain), abs=1e-6)


def test_resuming_from_a_checkpoint(tmp_path):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer = trainer_for(tiny.model(), tmp_path, **saving)
    trainer.train()
    resumed = trainer_for(tiny.model(seed=1), tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.logged(resumed) == pytest.approx(tiny.logged(trainer), abs=1e-6)
    assert "SynPO" in (tmp_path / "README.md").read_text()  # the model card TRL writes beside a checkpoint


def test_the_command_line_knows_the_options(tmp_path):
    parser = tiny.transformers.HfArgumentParser(SynPOConfig)
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--synpo_alpha", "7", "--synpo_link", "logsigmoid"]
    (config,) = parser.parse_args_into_dataclasses(words)
    assert (config.synpo_alpha, config.synpo_beta, config.synpo_link) == (7.0, 0.2, "logsigmoid")


def test_metrics_are_trls_and_right(tmp_path):
    policy = tiny.model()
    trainer = trainer_for(
        policy, tmp_path, max_steps=1, eval_dataset=datasets.Dataset.from_list(ROWS[:4]), eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=4, learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    train, evaluation = ({}, {})
    for entry in trainer.state.log_history:
        (evaluation if any(name.startswith("eval_") for name in entry) else train).update(entry)
    assert train.keys() >= METRICS
    assert evaluation.keys() >= {f"eval_{name}" for name in METRICS}
    assert "empty_pairs" not in train

    for rows, got in ((ROWS[:2], train), (ROWS[:4], {k.removeprefix("eval_"): v for k, v in evaluation.items()})):
        expected = eager_metrics(tiny.model(), tiny.token_rows(rows))
        assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def eager_metrics(policy, rows):
    """TRL's metrics from materialised logits; a reward is a geometric mean, logps are means."""
    logps: dict[str, list] = {"chosen": [], "rejected": []}
    logits: dict[str, list] = {"chosen": [], "rejected": []}
    top1, entropies = [], []
    with torch.no_grad():
        for row in rows:
            for side in logps:
                prompt, response = row["prompt_ids"], row[f"{side}_ids"]
                logps[side].append(tiny.eager_logps(policy, prompt, response))
                own = policy(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
                logits[side].append(own.mean(-1))
                entropies.append(torch.distributions.Categorical(logits=own.double()).entropy())
                if side == "chosen":
                    top1.append(own.argmax(-1) == torch.tensor(response))
        loss = torch.stack([tiny.eager_synpo(policy, row) for row in rows]).mean()
    means = {side: torch.stack([x.mean() for x in logps[side]]) for side in logps}
    rewards = {side: means[side].exp() for side in means}
    return {
        "loss": float(loss),
        **{f"logps/{side}": float(means[side].mean()) for side in means},
        **{f"rewards/{side}": float(rewards[side].mean()) for side in rewards},
        "rewards/accuracies": float((rewards["chosen"] > rewards["rejected"]).double().mean()),
        "rewards/margins": float((rewards["chosen"] - rewards["rejected"]).mean()),
        "nll_loss": float(-torch.cat(logps["chosen"]).mean()),
        **{f"logits/{side}": float(torch.cat(logits[side]).mean()) for side in logits},
        "entropy": float(torch.cat(entropies).mean()),
        "mean_token_accuracy": float(torch.cat(top1).double().mean()),
    }


def test_metric_names_and_logits_as_in_dpotrainer(tmp_path):
    """Beside DPOTrainer on the same batches: every metric of ours but nll_loss is one of its, and logits/* agree."""
    peft = pytest.importorskip("peft", reason="with an adapter DPOTrainer needs no second model")
    logs = []
    for trainer_class, config_class in ((SynPOTrainer, SynPOConfig), (trl.DPOTrainer, trl.DPOConfig)):
        trainer = trainer_for(
            tiny.model(), tmp_path, trainer_class=trainer_class, config_class=config_class, max_steps=1,
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )  # fmt: skip
        trainer.train()
        logs.append(trainer.state.log_history[0])
    ours, theirs = logs
    assert set(ours) - {"nll_loss"} == set(theirs)
    for name in ("logits/chosen", "logits/rejected", "num_tokens", "entropy", "mean_token_accuracy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_bf16(tmp_path):
    policy = tiny.model()
    eager = tiny.twin(policy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = torch.stack([tiny.eager_synpo(eager, row) for row in tiny.token_rows(ROWS[:2])]).mean()
    trainer = trainer_for(policy, tmp_path, max_steps=2, bf16=True, gradient_checkpointing=True)
    trainer.train()
    assert tiny.logged(trainer)[0] == pytest.approx(float(expected), abs=0.02)
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_compute_metrics_gets_logits(tmp_path):
    shapes = []

    def compute(prediction):
        shapes.append(prediction.predictions.shape)
        return {"seen": 1.0}

    trainer = trainer_for(
        tiny.model(), tmp_path, eval_dataset=datasets.Dataset.from_list(ROWS[:2]), compute_metrics=compute
    )
    assert trainer.evaluate()["eval_seen"] == 1.0
    assert shapes[0][-1] == len(tiny.VOCABULARY)


def test_dataset_with_reference_log_probs_of_an_earlier_run(tmp_path):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in ROWS]
    policy, names = tiny.model(), set()
    trainer = trainer_for(policy, tmp_path, rows=rows, max_steps=1)
    policy.model.register_forward_pre_hook(lambda module, args, kwargs: names.update(kwargs), with_kwargs=True)
    trainer.train()
    assert {"input_ids", "attention_mask"} <= names
    assert not {"ref_chosen_logps", "ref_rejected_logps", "completion_mask"} & names
    with torch.no_grad():
        plain = torch.stack([tiny.eager_synpo(tiny.model(), row) for row in tiny.token_rows(ROWS[:2])]).mean()
    assert tiny.logged(trainer)[0] == pytest.approx(float(plain), abs=1e-6)


def test_an_adapter_on_the_head_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"lm_head.*target_modules"):
        trainer_for(tiny.model(), tmp_path, peft_config=config)


@pytest.mark.parametrize(
    "option",
    [
        {"beta": 0.2}, {"loss_type": "hinge"}, {"loss_weights": [2.0]}, {"label_smoothing": 0.1}, {"ld_alpha": 0.5},
        {"f_divergence_type": "forward_kl"}, {"f_alpha_divergence_coef": 0.7}, {"use_weighting": True},
        {"discopop_tau": 0.1}, {"precompute_ref_log_probs": True}, {"precompute_ref_batch_size": 4},
        {"sync_ref_model": True}, {"ref_model_mixup_alpha": 0.5}, {"ref_model_sync_steps": 8},
    ],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_options_of_dpo_are_refused_with_the_reason(option, tmp_path):
    (name,) = option
    with pytest.raises(ValueError, match=rf"no {name}=.*: {integration.WHY_REFUSED[name][:20]}"):
        SynPOConfig(**tiny.arguments(tmp_path), **option)


def test_every_refused_option_exists():
    assert set(integration.WHY_REFUSED) <= {option.name for option in dataclasses.fields(trl.DPOConfig)}


def test_a_reference_and_a_plain_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no reference model: leave ref_model out"):
        trainer_for(tiny.model(), tmp_path, ref_model=tiny.model())
    with pytest.raises(ValueError, match="SynPOConfig, got DPOConfig"):
        trainer_for(tiny.model(), tmp_path, config_class=trl.DPOConfig)


def test_a_wrong_link_is_refused(tmp_path):
    with pytest.raises(ValueError, match="link"):
        trainer_for(tiny.model(), tmp_path, synpo_link="probit", max_steps=1).train()


def test_router_loss_is_refused_unless_it_is_off(tmp_path):
    def mixture():
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
        config = tiny.transformers.MixtralConfig(vocab_size=len(tiny.VOCABULARY), **small, **experts)
        return tiny.transformers.MixtralForCausalLM(config)

    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.0"):
        trainer_for(mixture(), tmp_path)
    trainer_for(mixture(), tmp_path, router_aux_loss_coef=0.0, max_steps=1).train()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (trl.__version__, None),
        ("1.17.0", r"supports TRL 1\.16 and found 1\.17\.0"),
        (None, r"pip install 'synpo-fast\[trl\]'"),
    ],
    ids=["installed", "newer", "missing"],
)
def test_version(found, message, monkeypatch):
    if found is None:
        monkeypatch.setitem(sys.modules, "trl", None)
    else:
        monkeypatch.setattr(trl, "__version__", found)
    spec = importlib.util.spec_from_file_location("a_second_import", integration.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "a_second_import", module)  # dataclasses look their module up
    if message is None:
        spec.loader.exec_module(module)
    else:
        with pytest.raises(ImportError, match=message):
            spec.loader.exec_module(module)
