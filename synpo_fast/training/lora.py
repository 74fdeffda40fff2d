"""LoRA adapters on a policy's language model. The only importer of peft."""

from typing import Any

from synpo_fast.models.policy import Policy

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(
    policy: Policy, *, r: int = 128, alpha: int = 64, dropout: float = 0.05, targets: tuple[str, ...] = TARGETS
) -> Policy:
    """Wraps the policy's model, in place; everything but the adapter is frozen. Defaults are the SynPO authors'.

    The vision tower has layers of the same names: only those inside the language model get an adapter.
    Raises ValueError if a target is not there, or is the head (the fused loss reads its weight and would miss an adapter).
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install synpo-fast[train]") from error
    language_model = policy.family.language_model(policy.base)
    inside = {id(module) for module in language_model.modules()}
    found: dict[str, list[str]] = {target: [] for target in targets}
    for name, module in policy.base.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last in found and id(module) in inside:
            found[last].append(name)
    missing = [target for target, names in found.items() if not names]
    if missing:
        raise ValueError(f"the language model of {policy.family.name} has no layer called {', '.join(missing)}")
    names = [name for each in found.values() for name in each]
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none")
    # autocast_adapter_dtype would put the adapter in fp32 under ZeRO-3, where dtypes must match.
    model: Any = get_peft_model(policy.base, config, autocast_adapter_dtype=False)
    policy.model = model
    return policy
