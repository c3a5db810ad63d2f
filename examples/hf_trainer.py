"""Trajectory balance in a Hugging Face `Trainer`: a subclass with another `compute_loss`, and nothing else.

A small Llama learns to count down: after the prompt n it should answer n - 1, ..., 0 and stop. The reward of an answer
is the share of it that is right. Each batch is sampled from the model in training, several answers per prompt, and
log Z of a prompt is estimated from the rewards of its answers. Needs torch, triton, transformers, accelerate 1.1 or
newer, and under half a minute on a CPU:

    PYTHONPATH=.:kernels python examples/hf_trainer.py

transformers 5.19 makes no TrainingArguments, and so no Trainer, without accelerate. With torch, triton and transformers
alone the body of `compute_loss` fits the loop of `plain_loop.py`.

accelerate asks for a batch ahead, so answers come from the model of the step before. With accumulation or several
processes every micro-batch here holds whole groups of its own; what the Trainer averages is then the mean over all
sequences.

B = sequences, L = padded length.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from importlib import util

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from paced_fast.integrations.own_loop import balance_loss

LARGEST = 5  # prompts are 1 .. LARGEST, and the tokens of answers 0 .. LARGEST
STOP, VOCAB_SIZE = LARGEST + 1, LARGEST + 2
MAX_LENGTH = LARGEST + 2
GROUP_SIZE = 8
BETA = 0.2


class BalanceTrainer(Trainer):
    """A Trainer for batches of sampled and scored completions."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, metrics = balance_loss(
            model,
            inputs["input_ids"],  # [B, L]
            inputs["attention_mask"],  # [B, L]
            inputs["is_completion"],  # [B, L], where the token belongs to the answer
            rewards=inputs["rewards"],
            groups=inputs["group"],
            beta=BETA,
        )
        return (loss, metrics) if return_outputs else loss


class Rollouts(IterableDataset):
    """Batches sampled from the model as it is when they are asked for; `history` keeps their mean rewards."""

    def __init__(self, model: LlamaForCausalLM, prompts_per_batch: int) -> None:
        self.model, self.prompts_per_batch = model, prompts_per_batch
        self.history: list[float] = []

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.sample()

    @torch.no_grad()
    def sample(self) -> dict[str, Tensor]:
        """Answers drawn until each has stopped."""
        group = torch.arange(self.prompts_per_batch).repeat_interleave(GROUP_SIZE)
        prompts = torch.randint(1, LARGEST + 1, (self.prompts_per_batch,))[group]
        ids, alive = prompts[:, None], [torch.zeros(len(group), dtype=torch.bool), torch.ones(len(group)).bool()]
        for _ in range(MAX_LENGTH):
            table = self.model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(table, 1)], 1)
            alive.append(alive[-1] & (ids[:, -1] != STOP))
        is_completion = torch.stack(alive[:-1], 1)
        right = prompts[:, None] - 1 - torch.arange(MAX_LENGTH)
        right = torch.where(right < 0, STOP, right)
        num_right = ((ids[:, 1:] == right) & is_completion[:, 1:]).cumprod(1).sum(1)
        rewards = num_right / (prompts + 1).maximum(is_completion.sum(1))
        self.history.append(rewards.mean().item())
        seen = torch.ones_like(ids)  # what follows the end of an answer is read by no token of it
        return {
            "input_ids": ids,
            "attention_mask": seen,
            "is_completion": is_completion,
            "rewards": rewards,
            "group": group,
        }


def main() -> None:
    """Train, and say how far the reward came."""
    if util.find_spec("accelerate") is None:
        sys.exit("error: transformers' Trainer needs accelerate: pip install 'accelerate>=1.1'")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    settings = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=STOP,
    )
    model = LlamaForCausalLM(settings)
    rollouts = Rollouts(model, prompts_per_batch=32)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=1,  # one item of the data set is a whole batch
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=25,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
        )
        trainer = BalanceTrainer(
            model=model, args=arguments, train_dataset=rollouts, data_collator=lambda batches: batches[0]
        )
        trainer.train()
    first, last = (sum(part) / len(part) for part in (rollouts.history[:10], rollouts.history[-10:]))
    print(f"mean reward of the first ten steps {first:.3f}, of the last ten {last:.3f}")


if __name__ == "__main__":
    main()
