"""Counted FLOPs of a SynPO step beside DPO as TRL does it, and beside the cost formula."""

from dataclasses import replace

import torch

from synpo_fast.data.encoded import EncodedPair
from synpo_fast.losses import PairLogprobs, dpo, synpo
from synpo_fast.models import Policy, Sample
from synpo_fast.models.attention import SEGMENTS
from synpo_fast.models.layout import plan_rows
from synpo_fast.profiling.counted_flops import count_flops
from synpo_fast.training.pair_module import pair_logprobs
from tests.models.test_policy import policy_of

PREFIX, COMPLETION = 1000, 200


def make_sample(policy: Policy) -> Sample:
    """A video of a few tokens in a prompt filled up to PREFIX, and two responses of COMPLETION tokens."""
    video = policy.family.video_inputs(
        policy.base.config, policy.tokenizer, torch.randint(0, 256, (8, 56, 56, 3), dtype=torch.uint8)
    )
    start = policy.family.prompt_ids(policy.tokenizer, "Describe.", video.token_ids)
    filler = policy.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    prompt = (*start, *[filler] * (PREFIX - len(start)))
    responses = tuple(tuple(torch.randint(10, 60, (COMPLETION,)).tolist()) for _ in range(2))
    return Sample(prompt, responses, video)


def whole_rows(policy: Policy, samples: list[Sample]) -> list[list[torch.Tensor]]:
    """Log-probs computed as TRL does: each response a row of its own with its own pass of the video, logits at all positions."""
    head = policy.head()
    results = []
    policy.attn_implementation = policy.family.language_model(policy.base).config._attn_implementation = "sdpa"
    for sample in samples:
        both = []
        for response in sample.responses:
            single = Sample(sample.prompt, (response,), sample.video)
            features = policy.encode_videos([single])
            tokens = Sample(sample.prompt, ((*response, 0),), sample.video)  # TRL feeds the last token too
            (row,) = plan_rows([tokens.lengths])
            hidden = policy.hidden_states(row, [tokens], features)
            logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
            predicting = logits[len(sample.prompt) - 1 : -1]
            both.append(torch.log_softmax(predicting, -1).gather(1, torch.tensor(response)[:, None]).squeeze(1))
        results.append(both)
    return results


def test_a_synpo_step_costs_what_the_formula_says(capsys):
    policy = policy_of("qwen2_5_vl", lora=True, attn_implementation=SEGMENTS).train()
    samples = [make_sample(policy)]

    def trl_dpo() -> None:
        with torch.no_grad(), policy.model.disable_adapter():
            reference = whole_rows(policy, samples)
        logps = whole_rows(policy, samples)
        pairs = [PairLogprobs.from_pairs([tuple(s) for s in each]) for each in (logps, reference)]
        dpo(*pairs).losses.mean().backward()

    def synpo_shared() -> None:
        policy.attn_implementation = policy.family.language_model(policy.base).config._attn_implementation = SEGMENTS
        logps = policy(samples)
        synpo(PairLogprobs.from_pairs([tuple(s) for s in logps])).losses.mean().backward()

    for call in (trl_dpo, synpo_shared):
        call()
    counted = {"trl": count_flops(trl_dpo), "synpo": count_flops(synpo_shared)}
    predicted = predict(policy, samples[0])
    ratio, expected = counted["trl"] / counted["synpo"], predicted["trl"] / predicted["synpo"]
    tokens_only = 6 * (PREFIX + COMPLETION) / (2 * (PREFIX + 2 * COMPLETION))
    with capsys.disabled():
        print(
            f"\nFLOPs of TRL-style DPO over shared SynPO, prefix {PREFIX}, completions {COMPLETION}: counted {ratio:.2f}, "
            f"formula {expected:.2f} (tokens of the language model alone {tokens_only:.2f})"
        )
    assert abs(ratio / expected - 1) < 0.10
    for name in counted:
        assert abs(counted[name] / predicted[name] - 1) < 0.10, (name, counted, predicted)


def predict(policy: Policy, sample: Sample) -> dict[str, float]:
    """The cost formula of a step: language model by tokens, attention by query-key pairs, tower by calls, head by rows.

    A forward pass is 2 FLOPs a weight and token; with a frozen base the backward is one more (gradients to inputs), and the
    adapter's own weights add a third. Attention is 4 E FLOPs a query-key pair and head, two and a half times that backward.
    """
    base = policy.base
    language_model = policy.family.language_model(base)
    config = language_model.config
    linear = {"base": 0, "lora": 0}
    for name, p in language_model.named_parameters():
        if p.dim() == 2 and "embed_tokens" not in name:
            linear["lora" if "lora_" in name else "base"] += p.numel()
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    layers = config.num_hidden_layers
    D, V = base.get_output_embeddings().weight.shape[::-1]
    P, C = PREFIX, COMPLETION
    tower = count_flops(lambda: policy.encode_videos([sample]))

    def forward(tokens: int, query_keys: int) -> float:
        return 2 * tokens * (linear["base"] + linear["lora"]) + 4 * layers * width * query_keys

    def backward(tokens: int, query_keys: int) -> float:
        return 2 * tokens * (linear["base"] + 2 * linear["lora"]) + 10 * layers * width * query_keys

    whole, whole_keys = 2 * (P + C), 2 * (P + C) ** 2
    shared, shared_keys = P + 2 * (C - 1), P**2 + 2 * (C - 1) * (P + C - 1)
    without_adapter = 2 * whole * linear["base"] + 4 * layers * width * whole_keys
    return {
        "trl": without_adapter
        + forward(whole, whole_keys)
        + backward(whole, whole_keys)
        + 4 * tower
        + 3 * 2 * whole * D * V,
        "synpo": forward(shared, shared_keys) + backward(shared, shared_keys) + tower + 4 * (2 * C) * D * V,
    }


def test_ten_responses_of_one_video_cost_a_quarter_of_nine_pairs(capsys):
    """The best response against nine others: one row of P + 10C tokens beside nine pairs of P + 2C, which share their prompt."""
    policy = policy_of("qwen2_5_vl", lora=True, attn_implementation=SEGMENTS).train()
    pair, num = make_sample(policy), 10
    responses = tuple(tuple(torch.randint(10, 60, (COMPLETION,)).tolist()) for _ in range(num))
    row = EncodedPair(replace(pair, responses=responses), "row", tuple((0, worse) for worse in range(1, num)))
    pairs = [EncodedPair(replace(pair, responses=(responses[0], worse)), "pair") for worse in responses[1:]]

    def step(rows: list[EncodedPair]) -> None:
        logps = policy([each.sample for each in rows])
        synpo(pair_logprobs(rows, logps)).losses.mean().backward()

    counted = []
    for rows in ([row], pairs):
        step(rows)
        counted.append(count_flops(lambda rows=rows: step(rows)))
    ratio, predicted = counted[0] / counted[1], (PREFIX + num * COMPLETION) / (9 * (PREFIX + 2 * COMPLETION))
    with capsys.disabled():
        print(
            f"\nFLOPs of a row with {num} responses over nine pairs, prefix {PREFIX}, completions {COMPLETION}: counted "
            f"{ratio:.3f}, by tokens of the language model alone {predicted:.3f}"
        )
    assert predicted < ratio <= 1 / 3
