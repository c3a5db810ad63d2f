"""TRL's own loss against `PacedTrainer`: one loss and backward pass on the same batch, time and peak memory.

Each trainer runs in a separate process, because peak memory on a CPU is per process, and they alternate. The backbone
is small, so that the output layer dominates. The third row is `PacedTrainer(fused=False)`, on log-probs computed by
TRL.
"""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.turns import Process, Turns
from paced_fast.errors import InputError

METHODS = ("trl grpo", "paced", "paced on trl's log-probs")


@dataclass(frozen=True)
class Arguments:
    """Compare the losses of TRL and PacedTrainer."""

    tokens: int = 2048
    """Completion tokens of the micro-batch, in eight completions."""
    vocabulary: int = 49152
    """Entries of the output layer."""
    hidden: int = 576
    """Width of the model."""
    layers: int = 2
    """Number of layers."""
    repeats: int = 5
    """Measured passes, after one warm-up pass."""
    device: str = "auto"
    """"cpu", "cuda" or "auto"."""


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Return median seconds and peak bytes per method."""
    del path
    if arguments.tokens % 8:
        raise InputError(f"--tokens {arguments.tokens} must be a multiple of 8, for eight completions")
    if arguments.hidden < 64 or arguments.hidden % 64:
        raise InputError(f"--hidden {arguments.hidden} must be a multiple of 64, the size of a head")
    taken: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    with ExitStack() as stack:
        words = json.dumps(asdict(arguments))
        processes = [
            stack.enter_context(Process(name, "benchmarks.training.integrations", [name, words])) for name in METHODS
        ]
        for turn in range(1 + arguments.repeats):
            for process in processes:
                found = process.turn()
                if turn:
                    taken[process.name].append(found)
        ready = processes[0].ready
    rows = []
    for method, turns in taken.items():
        seconds = [turn["seconds"] for turn in turns]
        row = {
            "method": method,
            "median_seconds": statistics.median(seconds),
            "least_seconds": min(seconds),
            "largest_seconds": max(seconds),
            "peak_bytes": max(turn["peak_bytes"] for turn in turns),
            "device": ready["device"],
            "threads": ready["threads"],
        }
        rows.append(row)
        print(f"{method:<28}{row['median_seconds']:>9.3f} s{row['peak_bytes'] / 2**20:>10.0f} MiB  {row['device']}")
    return {"arguments": asdict(arguments), "interleaved": True, "rows": rows}


def run(method: str, arguments: Arguments) -> None:
    """Serve turns of one loss and backward pass in this process; bytes are above the model and the batch."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from paced_fast.integrations.trl import PacedConfig, PacedTrainer

    device = environment.choose_device(arguments.device)
    turns = Turns(device)
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=arguments.vocabulary,
            hidden_size=arguments.hidden,
            intermediate_size=2 * arguments.hidden,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 64,
            num_key_value_heads=arguments.hidden // 64,
        )
    ).to(torch.bfloat16 if on_gpu else torch.float32)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), pad_token="a", eos_token="b"
    )
    is_paced = method != METHODS[0]
    settings = {"fused": method == METHODS[1]} if is_paced else {}
    args = (PacedConfig if is_paced else GRPOConfig)(
        output_dir="/tmp/unused",
        per_device_train_batch_size=8,
        num_generations=8,
        use_cpu=not on_gpu,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        **settings,
    )
    trainer: Any = (PacedTrainer if is_paced else GRPOTrainer)(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
    )
    model.to(device).train()
    width = arguments.tokens // 8
    ones = torch.ones(8, width, dtype=torch.int64, device=device)
    reward = torch.tensor([1.0, 0.0] * 4, device=device)
    inputs = {
        "prompt_ids": ones[:, :8],
        "prompt_mask": ones[:, :8],
        "completion_ids": torch.randint(2, arguments.vocabulary, (8, width), device=device),
        "completion_mask": ones,
        "advantages": reward - 0.5,
        "num_items_in_batch": torch.tensor(8 * width, device=device),
        "rewards": reward,
        "log_z": torch.full((8,), 0.5 / 0.05, device=device),
        "weights": torch.ones(8, device=device),
        "num_trained": torch.tensor(8.0, device=device),
    }
    trainer.current_gradient_accumulation_steps = 1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # allocated before counting: part of no method's memory

    def step() -> None:
        trainer._compute_loss(model, inputs).backward()

    step()  # warm-up: libraries allocate on first use
    turns.count_memory_from_here()
    turns.ready(device=torch.cuda.get_device_name() if on_gpu else "cpu", threads=torch.get_num_threads())
    while True:
        turns.begin()
        step()
        turns.end()


if __name__ == "__main__":
    run(sys.argv[1], Arguments(**json.loads(sys.argv[2])))
