"""A tiny text model, a word tokenizer made in memory, pairs of sentences, and SynPO written out on materialised logits."""

import copy
import random

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the integrations hook into transformers")

WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "bird",
    "runs",
    "sleeps",
    "sings",
    "on",
    "under",
    "behind",
    "red",
    "blue",
    "tree",
    "house",
]
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
VOCABULARY = {word: i for i, word in enumerate([PAD, EOS, UNK, *WORDS])}
STEPS, LEARNING_RATE, WARMUP = 30, 5e-3, 3


def tokenizer(vocabulary=VOCABULARY, **special):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK, **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def model(dtype=torch.float32, seed=0, **config):
    """About 30k parameters. The weights are larger than Llama's default, so that 30 steps have something to change."""
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": len(VOCABULARY), **shape, **config}
    config |= {"pad_token_id": VOCABULARY[PAD], "eos_token_id": VOCABULARY[EOS], "bos_token_id": None}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(dtype)


def pairs(num_pairs: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts of 2-4 words, responses of 1-7: shapes that pad on both halves."""
    draw = random.Random(seed)

    def words(shortest, longest):
        return " ".join(draw.choices(WORDS, k=draw.randint(shortest, longest)))

    return [
        {"prompt": words(2, 4), "chosen": " " + words(1, 7), "rejected": " " + words(1, 7)} for _ in range(num_pairs)
    ]


def token_rows(rows: list[dict[str, str]]) -> list[dict[str, list[int]]]:
    """Prompt and responses as token ids, EOS at the end of a response."""
    end = [VOCABULARY[EOS]]
    return [
        {
            "prompt_ids": ids(row["prompt"]),
            "chosen_ids": ids(row["chosen"]) + end,
            "rejected_ids": ids(row["rejected"]) + end,
        }
        for row in rows
    ]


def eager_logps(policy, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Token log-probs of one response, one unpadded row, full logits in fp64."""
    logits = policy(input_ids=torch.tensor([prompt + response])).logits[0].double()
    log_softmax = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return log_softmax.gather(-1, torch.tensor(response)[:, None])[:, 0]


def eager_synpo(policy, row, alpha=30.0, beta=0.2) -> torch.Tensor:
    chosen = eager_logps(policy, row["prompt_ids"], row["chosen_ids"])
    rejected = eager_logps(policy, row["prompt_ids"], row["rejected_ids"])
    contrast = torch.sigmoid(alpha * (chosen.mean().exp() - rejected.mean().exp()))
    return -contrast - beta * chosen.exp().mean()


def eager_training(policy, batches, loss_of_row=eager_synpo) -> list[float]:
    """The losses of AdamW on batches of token rows, with Trainer's defaults: linear warm-up and decay, gradients clipped to 1."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step, rows in enumerate(batches):
        warm, left = step / WARMUP, (len(batches) - step) / (len(batches) - WARMUP)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(warm, left, 1.0)
        loss = torch.stack([loss_of_row(policy, row) for row in rows]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batches_of(rows, size: int, steps: int) -> list[list]:
    """In order, epoch after epoch; the last batch of an epoch may be smaller."""
    epoch = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [epoch[step % len(epoch)] for step in range(steps)]


def arguments(folder, **changes):
    """The arguments with which Trainer and TRL train exactly as eager_training does."""
    settings = {
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": WARMUP,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }
    return {"output_dir": str(folder), **settings, **changes}


def logged(trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def twin(policy):
    return copy.deepcopy(policy)
