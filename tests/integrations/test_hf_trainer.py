"""The plain Trainer with synpo_loss_func follows the eager formula step by step; a step is a mean over its pairs."""

import pytest
import torch

from synpo_fast.integrations.hf_trainer import PairCollator, synpo_loss_func

from . import tiny

transformers = tiny.transformers
pytest.importorskip("accelerate", reason="transformers.Trainer needs it")

PAIRS = tiny.pairs(7)
ROWS = tiny.token_rows(PAIRS)
COLLATOR = PairCollator(tiny.VOCABULARY[tiny.PAD])


def trainer_for(policy, folder, rows=ROWS, *, loss_options=None, eval_dataset=None, compute_metrics=None, **changes):
    settings = {"per_device_train_batch_size": 2, "remove_unused_columns": False, **changes}
    return transformers.Trainer(
        policy,
        transformers.TrainingArguments(**tiny.arguments(folder, **settings)),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        data_collator=COLLATOR,
        compute_loss_func=synpo_loss_func(policy, **(loss_options or {})),
        compute_metrics=compute_metrics,
    )


def test_thirty_steps(tmp_path):
    policy = tiny.model()
    expected = tiny.eager_training(tiny.twin(policy), tiny.batches_of(ROWS, 2, tiny.STEPS))
    trainer = trainer_for(policy, tmp_path)
    trainer.train()
    got = tiny.logged(trainer)
    assert len(got) == tiny.STEPS
    assert got[0] > -0.6 and got[-1] < -1.0
    assert got == pytest.approx(expected, abs=1e-6)


def test_thirty_steps_with_lora(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(tiny.model(), config)
    expected = tiny.eager_training(tiny.twin(policy), tiny.batches_of(ROWS, 2, tiny.STEPS))
    trainer = trainer_for(policy, tmp_path)
    trainer.train()
    assert tiny.logged(trainer) == pytest.approx(expected, abs=1e-6)


def test_thirty_steps_with_gradient_accumulation(tmp_path):
    """Micro-batches of 2, 2, 2, 1 pairs, two to a step: the second step of an epoch is a mean over three pairs, not
    the mean of a mean of two and a mean of one."""
    policy = tiny.model()
    expected = tiny.eager_training(tiny.twin(policy), tiny.batches_of(ROWS, 4, tiny.STEPS))
    trainer = trainer_for(policy, tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    assert tiny.logged(trainer) == pytest.approx(expected, abs=1e-6)


def test_no_logits_and_one_forward_a_step(tmp_path):
    policy = tiny.model()
    calls = []
    trainer = trainer_for(policy, tmp_path, max_steps=3, logging_steps=3)
    policy.model.register_forward_hook(lambda *_: calls.append(1))
    policy.lm_head.register_forward_hook(lambda *_: pytest.fail("logits were built"))
    trainer.train()
    assert len(calls) == 3


def test_evaluation(tmp_path):
    seen = {}

    def compute(prediction):
        seen["predictions"] = prediction.predictions
        return {"pairs": len(prediction.predictions[0])}

    policy = tiny.model()
    trainer = trainer_for(
        policy, tmp_path, eval_dataset=ROWS[:5], compute_metrics=compute, per_device_eval_batch_size=2
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        losses = torch.stack([tiny.eager_synpo(policy, row) for row in ROWS[:5]])
        chosen = [tiny.eager_logps(policy, row["prompt_ids"], row["chosen_ids"]).mean() for row in ROWS[:5]]
    assert metrics["eval_loss"] == pytest.approx(float(losses.mean()), abs=1e-6)  # batches of 2, 2 and 1
    assert metrics["eval_pairs"] == 5
    assert list(seen["predictions"][0]) == pytest.approx(torch.stack(chosen).tolist(), rel=1e-5)
    assert trainer.compute_loss_func.pop_metrics("train") == {}
    got = trainer.compute_loss_func.pop_metrics("eval")
    assert got["logps/chosen"] == pytest.approx(float(torch.stack(chosen).mean()), rel=1e-5)
    assert trainer.compute_loss_func.pop_metrics("eval") == {}


def test_metrics(tmp_path):
    trainer = trainer_for(tiny.model(), tmp_path, max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    got = trainer.compute_loss_func.pop_metrics()
    policy = tiny.model()
    with torch.no_grad():
        chosen, rejected = (
            [tiny.eager_logps(policy, row["prompt_ids"], row[name]) for row in ROWS[:4]]
            for name in ("chosen_ids", "rejected_ids")
        )
    G_chosen, G_rejected = (torch.stack([x.mean().exp() for x in side]) for side in (chosen, rejected))
    expected = {
        "rewards/chosen": G_chosen.mean(),
        "rewards/rejected": G_rejected.mean(),
        "rewards/margins": (G_chosen - G_rejected).mean(),
        "rewards/accuracies": (G_chosen > G_rejected).double().mean(),
        "logps/rejected": torch.stack([x.mean() for x in rejected]).mean(),
        "nll_loss": -torch.cat(chosen).mean(),
    }
    assert {name: got[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)


def test_options_reach_the_loss(tmp_path):
    trainer = trainer_for(tiny.model(), tmp_path, loss_options={"alpha": 5.0, "beta": 0.7}, max_steps=1)
    trainer.train()
    with torch.no_grad():
        expected = torch.stack([tiny.eager_synpo(tiny.model(), row, 5.0, 0.7) for row in ROWS[:2]]).mean()
    assert tiny.logged(trainer)[0] == pytest.approx(float(expected), abs=1e-6)
    assert trainer.compute_loss_func.module.options["link"] == "sigmoid"


def test_collator():
    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10, 11]},
    ]
    batch = PairCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 0, 0, 0], [1, 2, 3, 6, 0], [7, 9, 10, 11, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    N = -100
    assert batch["pair_labels"].tolist() == [[N, N, N, 4, 5], [N, 8, N, N, N], [N, N, N, 6, N], [N, 9, 10, 11, N]]
    assert batch["labels"][:, 1:].ne(N).sum() == batch["labels"].ne(N).sum() == 2
    assert next(iter(batch)) == "labels"


def test_collator_refuses():
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        PairCollator(0)([{"chosen_ids": [2]}])
    for name in row:
        with pytest.raises(ValueError, match=f"{name} is empty"):
            PairCollator(0)([{**row, name: []}])


def test_wrong_use(tmp_path):
    policy = tiny.model()
    loss_func = synpo_loss_func(policy)
    batch = COLLATOR(ROWS[:2])
    labels = batch.pop("labels")
    outputs = policy(**batch)
    assert loss_func(outputs, labels) == outputs["loss"]
    with pytest.raises(ValueError, match="use PairCollator"):
        loss_func(outputs, None)
    with pytest.raises(ValueError, match="use PairCollator"):
        loss_func(policy(input_ids=batch["input_ids"]), labels)
    with pytest.raises(ValueError, match=r"must be pairs and not tokens"):
        loss_func(outputs, batch["pair_labels"])
    with pytest.raises(ValueError, match="DataParallel"):
        loss_func(outputs, labels, torch.tensor([[2], [2]]))


def test_an_adapter_on_the_head_is_refused():
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    policy = peft.get_peft_model(tiny.model(), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="adapter on its head"):
        synpo_loss_func(policy)
