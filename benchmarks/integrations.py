"""TRL's own loss against `PacedTrainer`: one loss and backward pass on the same batch, time and peak memory.

Each trainer runs in a process of its own, because peak memory on a CPU is that of a process. The backbone is small, so
that the output layer is what is seen. The third line is `PacedTrainer(fused=False)`, on the log-probs TRL computes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment, memory_probe
from paced_fast.errors import InputError

METHODS = ("trl grpo", "paced", "paced on trl's log-probs")


@dataclass(frozen=True)
class Arguments:
    """Compare the losses of two trainers."""

    tokens: int = 2048
    """Completion tokens of the micro-batch, in eight completions."""
    vocabulary: int = 49152
    """Entries of the output layer."""
    hidden: int = 576
    """Width of the model."""
    layers: int = 2
    """Its layers."""
    repeats: int = 5
    """Measured passes, after one that is not."""
    device: str = "auto"
    """"cpu", "cuda" or "auto"."""


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Median seconds and peak bytes of each method."""
    del path
    if arguments.tokens % 8:
        raise InputError(f"--tokens {arguments.tokens} must be a multiple of 8, for eight completions")
    rows = []
    for method in METHODS:
        command = [sys.executable, "-m", "benchmarks.integrations", method, json.dumps(asdict(arguments))]
        done = subprocess.run(
            command, env=environment.child_environment(), capture_output=True, text=True, timeout=1800, check=False
        )
        if done.returncode != 0:
            raise InputError(f"{method}: {done.stderr.strip().splitlines()[-1]}")
        rows.append({"method": method, **json.loads(done.stdout.splitlines()[-1])})
        row = rows[-1]
        print(f"{method:<28}{row['median_seconds']:>9.3f} s{row['peak_bytes'] / 2**20:>10.0f} MiB  {row['device']}")
    return {"arguments": asdict(arguments), "rows": rows}


def run(method: str, arguments: Arguments) -> dict[str, Any]:
    """Median seconds, and peak bytes above the model and the batch, in this process."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from paced_fast.integrations.trl import PacedConfig, PacedTrainer

    on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")
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
        parameter.grad = torch.zeros_like(parameter)  # their memory is nobody's

    def step() -> float:
        begin = time.perf_counter()
        trainer._compute_loss(model, inputs).backward()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        memory_probe.reset_high_water_mark()
        before = memory_probe.status_bytes("VmRSS")
    seconds = [step() for _ in range(arguments.repeats)]
    peak = torch.cuda.max_memory_allocated() if on_gpu else memory_probe.status_bytes("VmHWM")
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    return {
        "median_seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "largest_seconds": max(seconds),
        "peak_bytes": peak - before,
        "device": name,
    }


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Arguments(**json.loads(sys.argv[2])))))
