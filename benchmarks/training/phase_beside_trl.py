"""Training phase of `paced_fast` against TRL's GRPOTrainer: same weights, rollouts and number of optimiser steps.

A turn is all work between rewards and new weights: log-probs of the sampling policy, forward and backward passes, and
optimiser steps. TRL gets its completions from `rollout_func` and is timed by callbacks in its own loop; ours runs
`old_logprobs` and `update_policy` as the trainer does. Each method is a process, and they alternate. The rollouts
are random token ids with lengths spread evenly on a logarithmic scale, all drawn from the seed.

On a CPU everything is float32. On a GPU the use of bfloat16 differs: TRL keeps float32 weights and casts within
operations; ours keeps the parameters in bfloat16.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import random
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.turns import Process, Turns, note_progress
from paced_fast.errors import InputError

LOG = logging.getLogger(__name__)
OURS = "paced_fast"
TRL = {"trl, gradient checkpointing": True, "trl": False}
"""TRL's trainer with its default, and without recomputation, which needs more memory and less time."""
METHODS = (OURS, "trl", "trl, gradient checkpointing")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare the training phases of two trainers."""

    prompts: int = 2
    """Prompts per batch."""
    completions: int = 8
    """Completions per prompt."""
    shortest: int = 16
    """Fewest tokens of a completion."""
    longest: int = 64
    """Most tokens of a completion."""
    updates: int = 2
    """Optimiser steps per batch."""
    sequences: int = 8
    """Sequences per micro-batch of TRL; ours holds equally many tokens, including padding."""
    repeats: int = 3
    """Measured turns per method and number of threads, after one warm-up turn."""
    threads: tuple[str, ...] = ("1", "2")
    """Numbers of CPU threads, measured one after the other."""
    methods: tuple[str, ...] = METHODS
    """Methods to measure."""
    model: str = "smollm2"
    """smollm2 (random weights of the same shape if the package is missing), or toy."""
    matmul_precision: str = "highest"
    """Precision of float32 products, for all methods: highest, high or medium."""
    seed: int = 0
    """Seed of lengths and tokens."""
    device: str = "auto"
    """cuda, cpu or auto."""
    progress: str = ""
    """File that names the current measurement."""
    seconds: float = 0.0
    """Seconds after which no further turn starts; 0 means no limit."""


@dataclass(frozen=True)
class Batch:
    """Recorded rollouts, one list per completion; completions of a prompt are adjacent."""

    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[float]


def record(arguments: Arguments, vocabulary: int) -> Batch:
    """Draw prompts of 16 to 48 tokens and completions of `shortest` to `longest`; every second one is right."""
    source = random.Random(arguments.seed)

    def ids(count: int) -> list[int]:
        return [source.randrange(2, vocabulary) for _ in range(count)]

    prompts, completions = [], []
    low, high = math.log(arguments.shortest), math.log(arguments.longest)
    for _ in range(arguments.prompts):
        prompt = ids(source.randint(16, 48))
        for _ in range(arguments.completions):
            prompts.append(prompt)
            completions.append(ids(round(math.exp(source.uniform(low, high)))))
    return Batch(prompts, completions, [float(i % 2) for i in range(len(completions))])


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Measure time, tokens per second and peak memory per method, and compare; `path` always has the latest."""
    on_gpu = environment.choose_device(arguments.device).type == "cuda"
    _check(arguments)
    threads = [0] if on_gpu else [int(count) for count in arguments.threads]
    taken: dict[tuple[str, int], list[dict[str, Any]]] = {}
    started = time.perf_counter()
    result: dict[str, Any] = {"arguments": asdict(arguments), "rows": []}
    methods = [name for name in arguments.methods if name == OURS or importlib.util.find_spec("trl") is not None]
    if len(methods) < len(arguments.methods):
        result["left_out"] = [f"{name}: trl is not installed" for name in arguments.methods if name not in methods]
    with ExitStack() as stack:
        processes = []
        for name in methods:
            note_progress(arguments.progress, f"{name} (start)")
            words = [name, json.dumps(asdict(arguments))]
            processes.append(stack.enter_context(Process(name, "benchmarks.training.phase_beside_trl", words)))
        for turn in range(-1, arguments.repeats):
            for count in threads[-1:] if turn < 0 else threads:
                for process in processes:
                    if turn > 0 and arguments.seconds and time.perf_counter() - started > arguments.seconds:
                        continue
                    note_progress(arguments.progress, f"{process.name} (turn {turn})")
                    found = process.turn(threads=count) if count else process.turn()
                    LOG.info("%s, %d threads: %.1f s", process.name, count, found["seconds"])
                    if turn >= 0:
                        taken.setdefault((process.name, count), []).append(found)
            if turn >= 0:
                result |= {"rows": [_row(*key, turns, processes) for key, turns in taken.items()]}
                environment.write_json(path, environment.headed("trainer", result))
    print("\n".join(lines(result["rows"])))
    return result | {"comparisons": compare(result["rows"])}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Format the rows as text."""
    return [
        f"{row['method']:<30}{row['threads'] or 'gpu':>4}{row['median_seconds']:>9.2f} s "
        f"({row['least_seconds']:.2f} to {row['largest_seconds']:.2f}){row['tokens_per_second']:>9.0f} tokens/s"
        f"{row['peak_bytes'] / 2**20:>8.0f} MiB"
        for row in rows
    ]


def _check(arguments: Arguments) -> None:
    total = arguments.prompts * arguments.completions
    if total % (arguments.sequences * arguments.updates):
        raise InputError(
            f"--prompts x --completions is {total}, not a multiple of --sequences {arguments.sequences} x --updates "
            f"{arguments.updates}: change one of them"
        )
    if not 1 <= arguments.shortest <= arguments.longest:
        raise InputError(
            f"--shortest is {arguments.shortest} and --longest is {arguments.longest}: give 1 <= shortest <= longest"
        )
    for name in arguments.methods:
        if name not in METHODS:
            raise InputError(f"--methods {name!r} is unknown: the methods are {', '.join(map(repr, METHODS))}")


def _row(method: str, threads: int, turns: list[dict[str, Any]], processes: list[Process]) -> dict[str, Any]:
    seconds = [turn["seconds"] for turn in turns]
    ready = next(process.ready for process in processes if process.name == method)
    return {
        "method": method,
        "threads": threads,
        "turns": len(seconds),
        "updates": turns[0]["updates"],
        "median_seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "largest_seconds": max(seconds),
        "median_cpu_seconds": statistics.median(turn["cpu_seconds"] for turn in turns),
        "tokens_per_second": ready["tokens"] / statistics.median(seconds),
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
        **ready,
    }


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare ours with every other method per number of threads: speedup and share of memory."""
    found = []
    for ours in (row for row in rows if row["method"] == OURS):
        for row in rows:
            if row["threads"] == ours["threads"] and row is not ours:
                found.append(
                    {
                        "against": row["method"],
                        "threads": row["threads"],
                        "speed": row["median_seconds"] / ours["median_seconds"],
                        "memory": ours["peak_bytes"] / row["peak_bytes"],
                    }
                )
    return found


def _model(arguments: Arguments, dtype: Any) -> tuple[Any, str]:
    """Return the model and the source of its weights; random weights take equally long."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from paced_fast.policy import smollm2_folder

    if arguments.model == "smollm2":
        try:
            folder = smollm2_folder(Path.home() / ".cache" / "paced_fast")
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), "SmolLM2-135M-Instruct"
        except InputError as error:
            sys.stderr.write(f"{error}; random weights are used instead\n")
        sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    elif arguments.model == "toy":
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    else:
        raise InputError(f"--model {arguments.model!r}: give smollm2 or toy")
    torch.manual_seed(arguments.seed)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).to(dtype), "drawn"


def _said(arguments: Arguments, batch: Batch, precision: str, weights: str) -> dict[str, Any]:
    return {
        "tokens": sum(map(len, batch.completions)),
        "padded_tokens": len(batch.completions) * max(map(len, batch.completions)),
        "prompt_tokens": sum(map(len, batch.prompts)),
        "precision": precision,
        "weights": weights,
    }


def run_ours(arguments: Arguments) -> None:
    """Serve turns of `old_logprobs` and `update_policy`, always on the same batch."""
    import torch

    from paced_fast.config import OptimizerConfig
    from paced_fast.config.presets import preset
    from paced_fast.config.resolve import resolve
    from paced_fast.data import packing
    from paced_fast.data.records import Completion, Targets
    from paced_fast.paced.update import make_optimizer, minibatches, old_logprobs, update_policy
    from paced_fast.policy import Policy, choose_attention

    device = environment.choose_device(arguments.device)
    turns = Turns(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, weights = _model(arguments, dtype)
    batch = record(arguments, model.config.vocab_size)
    micro_batch = arguments.sequences * (max(map(len, batch.prompts)) + max(map(len, batch.completions)))
    optimizer_settings = OptimizerConfig(minibatches=arguments.updates, micro_batch_tokens=micro_batch)
    config = dataclasses.replace(resolve(preset("tiny")), algorithm="paced", optimizer=optimizer_settings)
    model = model.to(device).eval()
    # What a run takes: on a GPU packed rows and the best kernel there is for them.
    attention = choose_attention("auto", model, device)
    policy = Policy(model, max_tokens=micro_batch, attention=attention)
    optimizer = make_optimizer(policy, config.optimizer)
    completions = [Completion(token_ids=ids, logprobs=[0.0] * len(ids), stopped=True) for ids in batch.completions]
    prompts = [tuple(ids) for ids in batch.prompts]
    index = [i // arguments.completions for i in range(len(prompts))]
    said = _said(arguments, batch, str(dtype).removeprefix("torch."), weights)
    turns.ready(**said, attention=f"{attention.name} ({attention.reason})")
    step = 0
    while True:
        turns.begin()
        rollouts = packing.pack(completions, prompts, index, batch.rewards, step, device)
        first = frozenset(minibatches(rollouts, config, step=step, epoch=0)[0])
        others = [i for i in range(rollouts.num_sequences) if i not in first]
        old = old_logprobs(policy, rollouts, others, config.generation.temperature)
        targets = Targets(
            signal=rollouts.rewards,
            intercept=torch.full_like(rollouts.rewards, 0.5),
            old_logprobs=old,
            ref_logprobs=old,
            weights=torch.ones_like(rollouts.rewards),
            unscored=first,
        )
        done = update_policy(policy, optimizer, rollouts, targets, config, step=step, num_updates=step)
        turns.end(updates=int(done.taken), grad_norm=float(done.grad_norm))
        step += 1


def run_trl(arguments: Arguments, gradient_checkpointing: bool) -> None:
    """Run TRL's own loop; it waits for a turn before the first optimiser step on a batch and answers after the last."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    device = environment.choose_device(arguments.device)
    turns, on_gpu = Turns(device), device.type == "cuda"
    model, weights = _model(arguments, torch.float32)
    batch = record(arguments, model.config.vocab_size)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"0": 0, "1": 1}, unk_token="0")), pad_token="0", eos_token="1"
    )
    micro_batches = len(batch.completions) // arguments.sequences

    def recorded(prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Return recorded completions; TRL repeats each prompt once per completion."""
        del trainer
        seen = dict.fromkeys(prompts, 0)
        rows = []
        for prompt in prompts:
            rows.append(int(prompt) * arguments.completions + seen[prompt])
            seen[prompt] += 1
        ids = {"prompt_ids": batch.prompts, "completion_ids": batch.completions}
        return {**{name: [found[row] for row in rows] for name, found in ids.items()}, "logprobs": None}

    class TakeTurns(TrainerCallback):
        """Callback that times the training phase of a batch, which is `updates` optimiser steps."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % arguments.updates == 0:
                turns.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % arguments.updates == 0:
                turns.end(updates=arguments.updates)

    trainer = GRPOTrainer(
        model,
        lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        GRPOConfig(
            output_dir="/tmp/unused",
            per_device_train_batch_size=arguments.sequences,
            num_generations=arguments.completions,
            max_completion_length=arguments.longest,
            steps_per_generation=micro_batches,
            gradient_accumulation_steps=micro_batches // arguments.updates,
            gradient_checkpointing=gradient_checkpointing,
            max_steps=10**6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not on_gpu,
            bf16=on_gpu,
        ),
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(arguments.prompts)]}),
        processing_class=tokenizer,
        rollout_func=recorded,
        callbacks=[TakeTurns()],
    )
    turns.ready(**_said(arguments, batch, "bfloat16 autocast" if on_gpu else "float32", weights))
    trainer.train()


def main() -> None:
    """Run one competitor; command line: METHOD JSON."""
    import torch

    given = json.loads(sys.argv[2])
    arguments = Arguments(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})
    torch.set_float32_matmul_precision(arguments.matmul_precision)
    name = sys.argv[1]
    if name == OURS:
        run_ours(arguments)
    else:
        run_trl(arguments, TRL[name])


if __name__ == "__main__":
    main()
