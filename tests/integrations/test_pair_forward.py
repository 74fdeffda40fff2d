"""model(..., pair_labels=...) against the formula on materialised logits: loss, gradients, what is computed and what is not."""

import pytest
import torch

from synpo_fast.integrations.hf_trainer import PairCollator
from synpo_fast.integrations.pair_forward import add_pair_loss

from . import tiny

transformers = tiny.transformers
ROWS = tiny.token_rows(tiny.pairs(3))


def batch(rows=ROWS):
    inputs = PairCollator(tiny.VOCABULARY[tiny.PAD])(rows)
    inputs.pop("labels")
    return inputs


def gradients(policy):
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", ["trainable", "frozen", "tied"])
def test_loss_and_gradients(head):
    policy = tiny.model(tie_word_embeddings=head == "tied")
    policy.lm_head.requires_grad_(head != "frozen")
    eager = tiny.twin(policy)
    expected = torch.stack([tiny.eager_synpo(eager, row, alpha=20.0, beta=0.3) for row in ROWS]).mean()
    expected.backward()

    add_pair_loss(policy, alpha=20.0, beta=0.3)
    loss = policy(**batch())["loss"]
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    got, wanted = gradients(policy), gradients(eager)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_outputs():
    policy = tiny.model()
    add_pair_loss(policy)
    with torch.no_grad():
        outputs = policy(**batch())
        for side in ("chosen", "rejected"):
            for i, row in enumerate(ROWS):
                prompt, response = row["prompt_ids"], row[f"{side}_ids"]
                logps = tiny.eager_logps(policy, prompt, response)
                logits = policy(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
                assert outputs[f"{side}_tokens"][i] == len(response)
                assert float(outputs[f"{side}_logps"][i]) == pytest.approx(float(logps.mean()), rel=1e-5)
                assert float(outputs[f"{side}_rewards"][i]) == pytest.approx(float(logps.mean().exp()), rel=1e-5)
                assert float(outputs[f"{side}_logits"][i]) == pytest.approx(float(logits.mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("family", "options"),
    [("Phi", {}), ("Cohere", {"logit_scale": 0.25}), ("Gemma2", {"final_logit_softcapping": 1.0})],
    ids=["bias", "scale", "softcap"],
)
def test_heads_that_are_more_than_a_weight(family, options):
    """Log-probs are the model's own; mean logits too, which a softcap leaves out because they would need every logit."""
    shape = {"vocab_size": len(tiny.VOCABULARY), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape, **options)
    policy = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if policy.lm_head.bias is not None:
        torch.nn.init.normal_(policy.lm_head.bias, mean=2.0)
    prompt, response = ROWS[0]["prompt_ids"], ROWS[0]["chosen_ids"]
    add_pair_loss(policy)
    with torch.no_grad():
        outputs = policy(**batch(ROWS[:1]))
        logits = policy(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logps = tiny.eager_logps(policy, prompt, response)
    assert float(outputs["chosen_logps"][0]) == pytest.approx(float(logps.mean()), rel=1e-5)
    if family == "Gemma2":
        assert "chosen_logits" not in outputs
    else:
        assert float(outputs["chosen_logits"][0]) == pytest.approx(float(logits.mean()), abs=1e-5)


def test_no_logits_are_built_and_prompts_are_not_projected(monkeypatch):
    policy = tiny.model()
    module = add_pair_loss(policy)
    seen = []
    original = module.forward

    def spy(weight, hidden, target, bias):
        seen.append(target)
        return original(weight, hidden, target, bias)

    monkeypatch.setattr(module, "forward", spy)
    policy.lm_head.register_forward_hook(lambda *_: pytest.fail("the head's own forward ran"))
    policy(**batch())
    responses = [row[name] for name in ("chosen_ids", "rejected_ids") for row in ROWS]
    assert [row[row != -100].tolist() for row in seen[0]] == responses


def test_the_plain_forward_stays_what_it_was():
    policy = tiny.model().eval()
    inputs = {"input_ids": torch.tensor([tiny.ids("the dog runs")])}
    before = policy(**inputs, labels=inputs["input_ids"])
    generated = policy.generate(**inputs, max_new_tokens=4, do_sample=False)
    add_pair_loss(policy)
    after = policy(**inputs, labels=inputs["input_ids"])
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(policy.generate(**inputs, max_new_tokens=4, do_sample=False), generated)
    copied = tiny.twin(policy)
    torch.nn.init.zeros_(copied.lm_head.weight)
    assert copied(**inputs).logits.abs().max() == 0


def test_other_losses_and_those_that_need_a_reference():
    policy = tiny.model()
    module = add_pair_loss(policy, "simpo", beta=2.0, gamma=0.3)
    loss = policy(**batch())["loss"]

    def simpo(row):
        chosen, rejected = (
            tiny.eager_logps(policy, row["prompt_ids"], row[name]).mean() for name in ("chosen_ids", "rejected_ids")
        )
        return -torch.nn.functional.logsigmoid(2.0 * (chosen - rejected) - 0.3)

    torch.testing.assert_close(loss.double(), torch.stack([simpo(row) for row in ROWS]).mean(), rtol=1e-6, atol=0)
    assert module.last_output.metrics["rewards/accuracies"] <= 1
    with pytest.raises(ValueError, match="'dpo' needs reference"):
        add_pair_loss(tiny.model(), "dpo")


def test_a_head_that_cannot_be_checked_gives_a_warning():
    policy = tiny.model()
    policy.lm_head.weight = torch.nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it outside the engine's forward
    with pytest.warns(UserWarning, match=r"ZeRO-3 shard.*check_head"):
        add_pair_loss(policy)


def test_wrong_use():
    policy = tiny.model()
    add_pair_loss(policy)
    inputs = batch()
    with pytest.raises(ValueError, match="labels or pair_labels"):
        policy(**inputs, labels=inputs["pair_labels"])
    with pytest.raises(ValueError, match="keyword inputs only"):
        policy(inputs["input_ids"], pair_labels=inputs["pair_labels"])
    with pytest.raises(ValueError, match=r"pair_labels is \[6, \d+\], the hidden states \[6"):
        policy(**{**inputs, "pair_labels": inputs["pair_labels"][:, :-1]})
    with pytest.raises(ValueError, match="chosen half first"):
        policy(**{name: value[:3] for name, value in inputs.items()})


def vision_language_model():
    torch.manual_seed(0)
    text = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2, "tie_word_embeddings": False, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [0], "window_size": 28, "patch_size": 14, "spatial_merge_size": 2,
    }  # fmt: skip
    special = {"image_token_id": 50, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def test_vision_inputs_pass_through():
    policy = vision_language_model()
    prompt = [52, 50, 50, 53, 7]  # two image tokens: a 4x2 grid of patches, merged 2x2
    rows = [{"prompt_ids": prompt, "chosen_ids": [8, 9, 10], "rejected_ids": [11, 12]}]
    inputs = PairCollator(0)(rows)
    inputs.pop("labels")
    grid = torch.tensor([[1, 4, 2]] * 2)
    inputs |= {"pixel_values": torch.randn(8, 3 * 2 * 14 * 14).repeat(2, 1), "image_grid_thw": grid}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 50).long()
    add_pair_loss(policy)
    with torch.no_grad():
        outputs = policy(**inputs)
        labels = inputs.pop("pair_labels")
        logits = policy(**inputs).logits
        blind = policy(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert not torch.allclose(blind, logits, atol=1e-2)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    means = (logps * (labels[:, 1:] != -100)).sum(1) / torch.tensor([3, 2])
    torch.testing.assert_close(outputs["chosen_logps"], means[:1])
    torch.testing.assert_close(outputs["rejected_logps"], means[1:])
