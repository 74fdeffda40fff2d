"""Helpers for the tests of the families: tiny models, a sample, and its hidden states, ours and transformers' own."""

import torch

from synpo_fast.models.families.registry import FAMILIES
from synpo_fast.models.tiny import tiny_model

VIDEO_FAMILIES = [name for name in FAMILIES if name != "text"]
TEXT = "What happens, naïve  reader?\n"
# An odd T with sides no patch divides, larger than the bound; an even T; one frame smaller than a patch.
SHAPES = [(5, 61, 143, 3), (8, 56, 56, 3), (1, 11, 9, 3), (3, 30, 200, 3)]

_models: dict[str, tuple] = {}


def tiny(name):
    if name not in _models:
        _models[name] = tiny_model(name)
    return FAMILIES[name], *_models[name]


def random_frames(shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def sample(family, model, tokenizer, shape, seed=0, **options):
    video = family.video_inputs(model.config, tokenizer, random_frames(shape, seed), **options)
    prompt = family.prompt_ids(tokenizer, TEXT, video.token_ids)
    response = tokenizer("A dog runs.", add_special_tokens=False).input_ids
    return torch.tensor([*prompt, *response, tokenizer.eos_token_id]), video


@torch.no_grad()
def our_hidden(family, model, token_ids, video=None, features=None, positions=None):
    embeddings = model.get_input_embeddings()(token_ids)[None]
    mask = torch.zeros(1, len(token_ids), dtype=torch.bool)
    all_features = []
    if video is not None:
        all_features = [features or family.encode_videos(model, [video])[0]]
        mask[0] = token_ids == video.placeholder_id
        embeddings[mask] = all_features[0].features
    if positions is None:
        positions = family.position_ids(model, token_ids, video)
    output = family.language_model(model)(
        inputs_embeds=embeddings,
        position_ids=positions[..., None, :],
        use_cache=False,
        **family.language_kwargs(mask[0].nonzero()[:, 0], all_features),
    )
    return output.last_hidden_state[0]


@torch.no_grad()
def official_hidden(name, model, token_ids, video=None):
    inputs = official_inputs(name, model, token_ids, video)
    return model.base_model(**inputs, use_cache=False).last_hidden_state[0]


def official_inputs(name, model, token_ids, video=None):
    """The inputs that transformers' own processor of the family would pass to the model's forward."""
    inputs = {"input_ids": token_ids[None], "attention_mask": torch.ones(1, len(token_ids), dtype=torch.long)}
    if video is not None:
        inputs |= video.arguments()
        if name == "llava_onevision":
            inputs["pixel_values_videos"] = inputs["pixel_values_videos"][None]
        if name in ("qwen2_5_vl", "qwen3_vl"):
            inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == model.config.video_token_id).int()
        if name == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([video.seconds_per_grid])
    return inputs
