"""Trains a language model with the SynPO loss in a plain loop: hidden states and head weight in, loss and gradients out.

    python examples/bare_loop.py                                        a small random model, in seconds on a CPU
    python examples/bare_loop.py --model Qwen/Qwen2.5-0.5B-Instruct --learning_rate 5e-6

The logits are never stored, and only the positions that predict response tokens are multiplied by the head. To adapt it, change
the model's name, replace PAIRS with your pairs, and lower the learning rate: a trained model needs a far lower one.
"""

import argparse

import torch
from torch.nn.functional import pad

from synpo_fast import FusedLinearSynPOLoss
from synpo_fast.integrations.hf_trainer import PairCollator
from synpo_fast.models.head import check_head, head_of, hidden_states
from synpo_fast.models.tiny import tiny_model

PAIRS = [
    {"prompt": "What falls? ", "chosen": "A red ball.", "rejected": "Nothing at all."},
    {"prompt": "Who waves? ", "chosen": "The woman on the left.", "rejected": "A dog."},
    {"prompt": "What is cut? ", "chosen": "Two onions, then a lemon.", "rejected": "Paper."},
    {"prompt": "How does it end? ", "chosen": "The door closes.", "rejected": "The door opens, I think."},
]


def load(name: str):
    """Returns (model, tokenizer) of a hub name or folder. "tiny" is a small random model that needs no download."""
    if name == "tiny":
        return tiny_model("text", seed=0)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


def token_rows(tokenizer, pairs) -> list[dict[str, list[int]]]:
    """Returns the token ids of prompts and responses. A response ends with EOS, so that the model learns to stop."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end = [tokenizer.eos_token_id]
    return [
        {
            "prompt_ids": ids(pair["prompt"]),
            "chosen_ids": ids(pair["chosen"]) + end,
            "rejected_ids": ids(pair["rejected"]) + end,
        }
        for pair in pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="hub name or folder of a causal language model; default: tiny")
    parser.add_argument("--steps", type=int, default=10, help="number of training steps")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    options = parser.parse_args()

    model, tokenizer = load(options.model)
    model.train().to("cuda" if torch.cuda.is_available() else "cpu")
    check_head(model)  # raises an error unless head_of describes how the model computes its logits
    head = head_of(model)
    loss_function = FusedLinearSynPOLoss(alpha=30.0, beta=0.2, logit_scale=head.logit_scale, softcap=head.softcap)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)

    # One batch for all steps; a real loop draws a new one each step. Chosen rows come first; labels are -100 outside responses.
    batch = PairCollator(tokenizer.pad_token_id)(token_rows(tokenizer, PAIRS))
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    target = pad(batch["pair_labels"][:, 1:], (0, 1), value=-100)  # position t predicts token t + 1
    for step in range(options.steps):
        hidden = hidden_states(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss, _ = loss_function(head.weight, hidden, target, head.bias)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = loss_function.last_output.metrics  # rewards/..., logps/..., nll_loss: detached tensors
        print(f"step {step}: loss {loss.item():.6f}, margin {metrics['rewards/margins'].item():.6f}")


if __name__ == "__main__":
    main()
