"""A small random model of every text model type that is served, as transformers saves it, and its own log-probs."""

import copy
from pathlib import Path

import torch
from torch import Tensor

from synpo_fast.models import Sample
from synpo_fast.models.tiny import tiny_tokenizer

HIDDEN = 64
TOKENS = 256  # the letters of the tiny tokenizer
FULL = {"layer_types": ["full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 32}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
# What a type needs besides the sizes. Every layer attends to the whole row: windows are refused.
MORE = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": SHARED_EXPERT,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**SHARED_EXPERT, **LINEAR},
    "qwen3_5_text": LINEAR,
    "gemma2": {**FULL, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 1.0},
    "gemma3_text": {**FULL, "query_pre_attn_scalar": 32},
    "olmo3": FULL,
    "smollm3": FULL,
    "cohere2": FULL,
    "exaone4": {**FULL, "sliding_window": None},
    "starcoder2": {"sliding_window": None},
    "granite": {
        "logits_scaling": 4.0,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
    },
}


def save_text_model(folder: Path, model_type: str, **more: object) -> str:
    """Weights so large that attention is far from even, and norms that are not ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer("text")
    options = {
        "vocab_size": -(-len(tokenizer) // 16) * 16, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 4096,
        "initializer_range": HIDDEN**-0.5, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **MORE.get(model_type, {}), **more,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_sample(prompt: int, *responses: int, seed: int = 0) -> Sample:
    g = torch.Generator().manual_seed(seed)
    first, *others = (tuple(torch.randint(0, TOKENS, (size,), generator=g).tolist()) for size in (prompt, *responses))
    return Sample(first, tuple(others))


@torch.no_grad()
def own_logps(folder: str, sample: Sample) -> list[Tensor]:
    """transformers' own forward, on one whole sequence after the other, each with a model that has just been loaded."""
    from transformers import AutoModelForCausalLM

    found = []
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for response in sample.responses:
        logits = copy.deepcopy(loaded)(input_ids=torch.tensor([[*sample.prompt, *response]]), use_cache=False).logits
        logps = logits[0, len(sample.prompt) - 1 : -1].log_softmax(-1)
        found.append(logps.gather(1, torch.tensor(response)[:, None])[:, 0])
    return found
