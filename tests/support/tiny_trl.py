"""TRL with the model of `tiny_policy`: a run that keeps what it trained on, in this process or as one of several.

As a program: `tiny_trl.py FOLDER JSON` with the variables of a launcher set; JSON are settings of PacedConfig, and with
`resume` a second run in the same process goes on from that checkpoint of the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tiny_policy
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paced_fast.integrations.trl import PacedConfig, PacedTrainer


def tokenizer() -> PreTrainedTokenizerFast:
    """The digits 0 to 8 as the ids 2 to 10, each a token; 0 pads and 1 stops."""
    vocabulary = {"<pad>": 0, "<stop>": tiny_policy.STOP, **{str(i): i + 2 for i in range(9)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<stop>", padding_side="left")


def data(rows: int = 12) -> Dataset:
    """Prompts of one to three digits; the answer is a digit."""
    prompts = [str(i) * (1 + i % 3) for i in range(rows)]
    return Dataset.from_dict(
        {"prompt": [p[:9].replace("9", "0") for p in prompts], "answer": [str(i % 9) for i in range(rows)]}
    )


def reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """From 0 to 1, rarely alike within a group: without a spread Adam would divide rounding errors by themselves."""
    return [0.5 * (a in c) + 0.125 * (sum(map(ord, c)) % 5) for a, c in zip(answer, completions, strict=True)]


def settings(folder: Path, *, config: Any = PacedConfig, **changes: Any) -> Any:
    """Eight sequences an optimizer step, on a CPU in float32, three steps."""
    return config(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            **changes,
        },
    )


class Recorder(PacedTrainer):
    """Keeps the batches it trained on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        super().__init__(*args, **options)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.batches.append({k: v.clone() for k, v in output.items() if isinstance(v, torch.Tensor)})
        return output


def trainer(folder: Path, *, reward_funcs: Any = reward, model: Any = None, rows: int = 12, **changes: Any) -> Recorder:
    """A trainer that has not begun."""
    return Recorder(
        tiny_policy.model(sharpness=2.0) if model is None else model,
        reward_funcs,
        settings(folder, **changes),
        train_dataset=data(rows),
        processing_class=tokenizer(),
    )


def state_of(made: Recorder) -> dict[str, Any]:
    """Everything that training moves: parameters, log Z, completions to replay, what the scheduler has seen."""
    state = {name: p.detach().clone() for name, p in made.accelerator.unwrap_model(made.model).named_parameters()}
    if made.memory is None:
        return {"state": state}
    table = {} if made.memory.table is None else made.memory.table.state_dict()
    return {
        "state": state,
        "table": {name: value.clone() for name, value in table.items()},
        "ring": [(kept.prompt.tolist(), kept.completion.tolist(), kept.born) for kept in made.memory.replay.ring],
        "visits": made.memory.scheduler.visits.clone(),
    }


def main() -> None:
    """Train as one process of a launch, and write what it trained on and what came out."""
    folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    resume = changes.pop("resume", None)
    made = trainer(folder, ddp_backend="gloo", **changes)
    made.train()
    result = {"batches": made.batches, **state_of(made)}
    if resume is not None:
        other = trainer(folder, ddp_backend="gloo", **changes)
        other.train(resume_from_checkpoint=str(folder / resume))
        result["resumed"] = {"batches": other.batches, **state_of(other)}
    torch.save(result, folder / f"rank{made.accelerator.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
