"""Trains with SynPO through TRL: DPOTrainer's datasets, collators and loop, with another loss and no reference model.

    python examples/trl_trainer.py                                      a small random model, in seconds on a CPU
    python examples/trl_trainer.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized --lora

It needs `pip install 'synpo-fast[trl]'`. To adapt it, change the names of the model and the dataset. A dataset has columns
prompt, chosen and rejected, or only chosen and rejected if these are conversations. DPOConfig's other options work as in TRL.
"""

import argparse
import tempfile

import torch
from datasets import Dataset, load_dataset

from synpo_fast.integrations.trl import SynPOConfig, SynPOTrainer
from synpo_fast.models.tiny import tiny_model

PAIRS = [
    {"prompt": "What falls? ", "chosen": "A red ball.", "rejected": "Nothing at all."},
    {"prompt": "Who waves? ", "chosen": "The woman on the left.", "rejected": "A dog."},
    {"prompt": "What is cut? ", "chosen": "Two onions, then a lemon.", "rejected": "Paper."},
    {"prompt": "How does it end? ", "chosen": "The door closes.", "rejected": "The door opens, I think."},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="hub name or folder of a causal language model; default: tiny")
    parser.add_argument("--dataset", help="hub dataset with a train split; default: the four pairs in this file")
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter in place of all weights")
    parser.add_argument("--output_dir", help="default: a temporary folder that is deleted at the end")
    parser.add_argument("--max_steps", type=int, default=5)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="use about 5e-6 for a trained model")
    options = parser.parse_args()

    if options.model == "tiny":
        model, tokenizer = tiny_model("text", seed=0)
    else:
        model, tokenizer = options.model, None  # TRL loads the model by name, and its tokenizer
    dataset = load_dataset(options.dataset, split="train") if options.dataset else Dataset.from_list(PAIRS)
    peft_config = None
    if options.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])

    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SynPOConfig(
            output_dir=options.output_dir or scratch,
            synpo_alpha=30.0,
            synpo_beta=0.2,
            learning_rate=options.learning_rate,
            max_steps=options.max_steps,
            per_device_train_batch_size=4,
            logging_steps=1,
            bf16=on_gpu,  # TRL trains in bf16 by default, which needs a GPU
            use_cpu=not on_gpu,
            disable_tqdm=True,
            report_to="none",
            save_strategy="steps" if options.output_dir else "no",
        )
        trainer = SynPOTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
        if options.output_dir:
            trainer.save_model()
    for entry in trainer.state.log_history:
        if "rewards/margins" in entry:
            print(f"step {entry['step']}: loss {entry['loss']:.6f}, margin {entry['rewards/margins']:.6f}")


if __name__ == "__main__":
    main()
