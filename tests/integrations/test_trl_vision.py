"""Images through TRL's own collator: the extra model inputs pass through to the model, and the loss is the eager one."""

import pytest
import torch

from . import tiny

pytest.importorskip("trl", minversion="1.16", reason="TRL is what is hooked into")
datasets = pytest.importorskip("datasets", reason="TRL's data are datasets")
image_module = pytest.importorskip("PIL.Image", reason="images are PIL's")

from synpo_fast.integrations.trl import SynPOConfig, SynPOTrainer  # noqa: E402

transformers = tiny.transformers
STEPS = 6
IMAGE = "<image>"
VOCABULARY = {**tiny.VOCABULARY, IMAGE: len(tiny.VOCABULARY)}


def processor():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": 16, "width": 16}
    return transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=tiny.tokenizer(VOCABULARY, additional_special_tokens=[IMAGE]),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def model():
    torch.manual_seed(0)
    shape = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    config = transformers.LlavaConfig(
        text_config={**shape, "model_type": "llama", "vocab_size": len(VOCABULARY), "hidden_size": 32},
        vision_config={
            **shape, "model_type": "clip_vision_model", "hidden_size": 16, "image_size": 16, "patch_size": 8,
            "projection_dim": 16,
        },
        image_token_index=VOCABULARY[IMAGE],
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def rows():
    pixels = torch.randint(0, 256, (4, 20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [
        {**row, "prompt": f"{IMAGE} {row['prompt']}", "images": [image_module.fromarray(pixels[i].numpy())]}
        for i, row in enumerate(tiny.pairs(4))
    ]


def eager_loss(policy, batch):
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    labels, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:].bool()
    logps = policy(**inputs).logits[:, :-1].double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    chosen, rejected = torch.stack([row[kept].mean().exp() for row, kept in zip(logps, mask, strict=True)]).chunk(2)
    language = torch.stack([row[kept].exp().mean() for row, kept in zip(logps, mask, strict=True)]).chunk(2)[0]
    return (-torch.sigmoid(30.0 * (chosen - rejected)) - 0.2 * language).mean()


def test_images(tmp_path):
    policy, eager = model(), model()
    trainer = SynPOTrainer(
        policy,
        args=SynPOConfig(**tiny.arguments(tmp_path, max_steps=STEPS, per_device_train_batch_size=2)),
        train_dataset=datasets.Dataset.from_list(rows()),
        processing_class=processor(),
    )
    batches = list(trainer.get_train_dataloader()) * (STEPS // 2)
    assert batches[0]["pixel_values"].shape == (4, 3, 16, 16)
    expected = tiny.eager_training(eager, [[batch] for batch in batches], eager_loss)
    trainer.train()
    assert tiny.logged(trainer) == pytest.approx(expected, abs=1e-6)
    assert expected[-2] < expected[0] - 0.1
    before = dict(model().named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in policy.named_parameters() if "vision" in name)
