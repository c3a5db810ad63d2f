"""Whole steps of `paced_fast`, of TRL's GRPOTrainer and of `PacedTrainer`, side by side on the same prompts.

A turn is a step: completions of equal lengths for all, rewards, log-probs of the old policy, optimiser steps. Each
method is a process, and they alternate; each phase has its seconds, its processor seconds and its peak memory.

On a CPU everything is float32. On a GPU the use of bfloat16 differs: TRL keeps float32 weights and casts within
operations; ours keeps the parameters in bfloat16.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import random
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.training.whole_step_methods import CHECKPOINTED, METHODS, OURS, PACED, TRL, Task
from benchmarks.turns import Process
from paced_fast.errors import InputError

LOG = logging.getLogger(__name__)
PHASES = ("generate", "reward", "old_logprobs", "update", "other")
"""Phases in the table; `other` is what is in none of them: drawing prompts, packing, log Z, records."""
TRAINING = ("old_logprobs", "update")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare whole steps of trainers."""

    prompts: int = 4
    """Prompts per step."""
    completions: int = 4
    """Completions per prompt."""
    tokens: int = 64
    """Tokens of every completion; none ends before."""
    updates: int = 2
    """Optimiser steps per step."""
    sequences: int = 8
    """Sequences per micro-batch of TRL; ours holds equally many tokens."""
    repeats: int = 3
    """Measured turns per method, after one warm-up turn."""
    threads: int = 1
    """CPU threads of every method."""
    methods: tuple[str, ...] = ()
    """Methods to measure; none means all on a GPU, and on a CPU those without gradient checkpointing."""
    model: str = "smollm2"
    """smollm2 or toy."""
    seed: int = 0
    """Seed of the prompts."""
    device: str = "auto"
    """cuda, cpu or auto."""


def prompts(arguments: Arguments) -> dict[str, str]:
    """Draw sums in words with their answers; no two are alike."""
    source = random.Random(arguments.seed)
    found: dict[str, str] = {}
    while len(found) < arguments.prompts:
        terms = [source.randrange(100, 1000) for _ in range(4)]
        found[f"Add the numbers {', '.join(map(str, terms))} step by step, then say the sum. Answer: "] = str(
            sum(terms)
        )
    return found


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Measure every method; `path` always has the latest."""
    _check(arguments)
    on_gpu = environment.choose_device(arguments.device).type == "cuda"
    asked = arguments.methods or [name for name in METHODS if on_gpu or not name.endswith(CHECKPOINTED)]
    methods = [name for name in asked if name == OURS or importlib.util.find_spec("trl") is not None]
    left_out = [f"{name}: trl is not installed" for name in asked if name not in methods]
    result: dict[str, Any] = {"arguments": asdict(arguments), "left_out": left_out, "rows": []}
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        task = _task(arguments, folder)
        processes = []
        for name in methods:
            words = [name, json.dumps(asdict(task))]
            processes.append(stack.enter_context(Process(name, "benchmarks.training.whole_step_methods", words)))
        if len({process.ready["prompt_tokens"] for process in processes}) > 1:
            seen = ", ".join(f"{process.name} {process.ready['prompt_tokens']}" for process in processes)
            raise InputError(
                f"the methods read prompts of different lengths ({seen}): give a model without a BOS token"
            )
        for turn in range(1 + arguments.repeats):
            for process in processes:
                found = process.turn() if on_gpu else process.turn(threads=arguments.threads)
                LOG.info("%s: %.1f s, %.1f s of the processor", process.name, found["seconds"], found["cpu_seconds"])
                if turn:
                    taken[process.name].append(found)
            if turn:
                result["rows"] = [row(name, turns) for name, turns in taken.items()]
                environment.write_json(path, environment.headed("end_to_end", result))
        result["prompt_tokens"] = processes[0].ready["prompt_tokens"]
    result["comparisons"] = compare(result["rows"])
    print("\n".join(lines(result["rows"])))
    return result


def _task(arguments: Arguments, folder: Path) -> Task:
    from paced_fast.policy import smollm2_folder

    model = folder / "model"
    if arguments.model == "toy":
        write_toy(model)
    else:
        model = smollm2_folder(Path.home() / ".cache" / "paced_fast")
    rows = folder / "prompts.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": text, "answer": answer}) + "\n" for text, answer in prompts(arguments).items())
    )
    names = {field.name for field in dataclasses.fields(Task)} - {"model", "rows"}
    shared = {name: getattr(arguments, name) for name in names}
    return Task(model=str(model), rows=str(rows), **shared)


def write_toy(folder: Path) -> None:
    """Write a tokenizer of characters and a model of two narrow layers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = ["<pad>", "<end>", *map(chr, range(32, 127))]
    made = Tokenizer(models.WordLevel({text: i for i, text in enumerate(characters)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(characters)}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **ends, tie_word_embeddings=True)).save_pretrained(folder)


def _check(arguments: Arguments) -> None:
    total = arguments.prompts * arguments.completions
    if total % (arguments.sequences * arguments.updates):
        raise InputError(
            f"--prompts x --completions is {total}, not a multiple of --sequences {arguments.sequences} x --updates "
            f"{arguments.updates}: change one of them"
        )
    if arguments.model not in ("smollm2", "toy"):
        raise InputError(f"--model {arguments.model!r}: give smollm2 or toy")
    for name in arguments.methods:
        if name not in METHODS:
            raise InputError(f"--methods {name!r} is unknown: the methods are {', '.join(map(repr, METHODS))}")


def row(method: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the turns of a method: medians, least and largest, in all and by phase."""
    phases = {}
    for name in PHASES:
        found = [_merged(turn["phases"], name) for turn in turns]
        phases[name] = {
            "cpu_seconds": statistics.median(phase["cpu_seconds"] for phase in found),
            "seconds": statistics.median(phase["seconds"] for phase in found),
            "peak_bytes": max(phase["peak_bytes"] for phase in found),
        }
    cpu, wall = ([turn[key] for turn in turns] for key in ("cpu_seconds", "seconds"))
    training = [sum(_merged(turn["phases"], name)["cpu_seconds"] for name in TRAINING) for turn in turns]
    return {
        "method": method,
        "turns": len(turns),
        "completion_tokens": turns[0]["completion_tokens"],
        "updates": turns[0]["updates"],
        "cpu_seconds": statistics.median(cpu),
        "least_cpu_seconds": min(cpu),
        "largest_cpu_seconds": max(cpu),
        "seconds": statistics.median(wall),
        "training_cpu_seconds": statistics.median(training),
        "training_seconds": statistics.median(
            sum(_merged(turn["phases"], name)["seconds"] for name in TRAINING) for turn in turns
        ),
        "tokens_per_second": turns[0]["completion_tokens"] / statistics.median(wall),
        "tokens_per_cpu_second": turns[0]["completion_tokens"] / statistics.median(cpu),
        "peak_bytes": max(phase["peak_bytes"] for turn in turns for phase in turn["phases"].values()),
        "phases": phases,
    }


def _merged(phases: dict[str, dict[str, float]], name: str) -> dict[str, float]:
    """Return a phase of `PHASES`; `other` takes all that is in none of them."""
    names = [key for key in phases if key == name or (name == "other" and key not in PHASES)]
    found = [phases[key] for key in names] or [{"cpu_seconds": 0.0, "seconds": 0.0, "peak_bytes": 0}]
    sums = {key: sum(phase[key] for phase in found) for key in ("cpu_seconds", "seconds")}
    return {**sums, "peak_bytes": max(phase["peak_bytes"] for phase in found)}


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare ours with every other method, and PacedTrainer with the GRPOTrainer of the same settings."""
    by_name = {found["method"]: found for found in rows}
    pairs = [(OURS, name) for name in by_name if name != OURS and OURS in by_name]
    pairs += [(PACED + end, TRL + end) for end in ("", CHECKPOINTED)]
    return [
        {
            "method": first,
            "against": second,
            "step": by_name[second]["cpu_seconds"] / by_name[first]["cpu_seconds"],
            "step_wall": by_name[second]["seconds"] / by_name[first]["seconds"],
            "training": by_name[second]["training_cpu_seconds"] / by_name[first]["training_cpu_seconds"],
            "training_wall": by_name[second]["training_seconds"] / by_name[first]["training_seconds"],
            "memory": by_name[first]["peak_bytes"] / by_name[second]["peak_bytes"],
        }
        for first, second in pairs
        if first in by_name and second in by_name
    ]


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Format the rows as text: seconds of the processor in all and by phase, and the peak of memory."""
    found = [f"{'processor seconds':<38}{'step':>8}" + "".join(f"{name:>14}" for name in PHASES) + f"{'MiB':>9}"]
    for row in rows:
        phases = "".join(f"{row['phases'][name]['cpu_seconds']:>14.2f}" for name in PHASES)
        found.append(f"{row['method']:<38}{row['cpu_seconds']:>8.2f}{phases}{row['peak_bytes'] / 2**20:>9.0f}")
    return found


def table(result: dict[str, Any]) -> list[str]:
    """Format the rows as Markdown: seconds of the processor by phase, memory, and how ours compares."""
    columns = ["method", "step", *(name.replace("_", " ") for name in PHASES), "tokens/s", "peak memory", "compared"]
    found = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in result["rows"]:
        spread = f"({row['least_cpu_seconds']:.1f} to {row['largest_cpu_seconds']:.1f})"
        phases = [
            f"{phase['cpu_seconds']:.1f} s, {phase['peak_bytes'] / 2**20:,.0f} MiB" if phase["peak_bytes"] else "0 s"
            for phase in (row["phases"][name] for name in PHASES)
        ]
        compared = [
            f"against {one['against']}: step {one['step']:.2f} x, training {one['training']:.2f} x as fast, "
            f"{one['memory']:.2f} x the memory"
            for one in result["comparisons"]
            if one["method"] == row["method"]
        ]
        cells = [row["method"], f"{row['cpu_seconds']:.1f} s {spread}", *phases]
        cells += [f"{row['tokens_per_cpu_second']:.0f}", f"{row['peak_bytes'] / 2**20:,.0f} MiB", "; ".join(compared)]
        found.append(f"| {' | '.join(cells)} |")
    return found
