"""What leaving out columns of E' saves on real states: SmolLM2-135M on its own completions, with their own policy.

    python -m benchmarks.run peaked

For each temperature the model answers a few questions, and the loss of those completions is computed with several
values of `skipped_share`: columns kept, errors of the gradients against float64, processor and wall time of a step.
Steps alternate in one process. The columns of blocks are what the products on a GPU would take, in the order of the
vocabulary and with the vocabulary sorted by what each column holds.

T = packed tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import environment
from benchmarks.loss import accuracy
from benchmarks.loss.methods import Method, answer_of, balance_terms, our_balance, run_step
from benchmarks.loss.problems import BETA, LOG_RATIO_NOISE, Batch, Shape, chunked_logprobs
from benchmarks.loss.report import aligned
from benchmarks.timing import Clock, summarise
from paced_fast.errors import InputError
from paced_kernels._loss.engine import make_head
from paced_kernels._loss.fused_pass import FusedOptions, FusedPass, plan_groups
from paced_kernels._loss.gradients import Wanted
from paced_kernels._loss.sequences import make_terms
from paced_kernels._loss.skipping import Kept
from paced_kernels._loss.torch_rows import DEFAULT_WORKSPACE_BYTES, Exponentials, TorchRows

QUESTIONS = (
    "A shop sells pens at 3 dollars each and notebooks at 5 dollars each. Tom buys 4 pens and 2 notebooks. How much "
    "does he pay?",
    "A train travels 60 miles per hour for 3 hours and then 40 miles per hour for 2 hours. How far does it travel?",
    "What is 17 + 28? Think step by step.",
    "Explain why the sky is blue.",
    "Write a Python function that returns the sum of the even numbers of a list.",
    "Solve for x: 3x + 7 = 22.",
    "List five facts about the moon.",
    "A rectangle is 8 cm long and 5 cm wide. What are its area and its perimeter?",
)
TILE, BLOCK = 128, 128
"""Rows and columns of a block on a GPU of compute capability 9.0."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure what leaving out columns of peaked policies saves."""

    temperatures: tuple[str, ...] = ("1", "0.6")
    """Temperatures of sampling and of the loss."""
    exponents: tuple[str, ...] = ("10", "9", "8", "7")
    """Each n gives a skipped_share of 2^-n."""
    tokens: int = 768
    """Most completion tokens."""
    completion_tokens: int = 128
    """Longest completion."""
    repetitions: int = 5
    """Steps of each kind."""
    seed: int = 0
    """Seed of sampling and of the rewards."""
    quick: bool = False
    """Random states of a toy size, to check that everything runs."""


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Measure every temperature; `path` always holds the finished ones."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    shares = [0.0, *(2.0**-n for n in _numbers("exponents", arguments.exponents))]
    result: dict[str, Any] = {"settings": asdict(arguments), "device": environment.device(device), "cells": []}
    for temperature in _numbers("temperatures", arguments.temperatures):
        batch = _toy_batch(arguments) if arguments.quick else _own_completions(arguments, temperature)
        cell = {
            "temperature": temperature,
            "shape": asdict(batch.shape),
            "sequences": len(batch.cu_seqlens) - 1,
            "mean_logprob": batch.mean_logprob,
            "rows": _rows(batch, shares, arguments.repetitions),
        }
        result["cells"].append(cell)
        environment.write_json(path, environment.headed("peaked", result))
        print(_text(cell), flush=True)
    return result


def _numbers(name: str, words: tuple[str, ...]) -> list[float]:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) <= 0:
        raise InputError(f"--{name} {' '.join(words)}: give numbers greater than 0")
    return numbers


def _rows(batch: Batch, shares: list[float], repetitions: int) -> list[dict[str, Any]]:
    """Return a row for each share; the first is 0, with which times are compared."""
    methods = []
    for share in shares:
        balance = our_balance(skipped_share=share, denominator=batch.shape.num_sequences)  # as the oracle divides
        methods.append(Method(name=f"{share:g}", balance=balance, thv=lambda *_: 6.0, ours=True))
    exact = accuracy.oracle("trajectory_balance", batch, torch.float64)
    rows = []
    for share, method in zip(shares, methods, strict=True):
        errors = accuracy.errors(answer_of("trajectory_balance", method, batch), exact)
        rows.append({"share": share, "errors": errors, **(_kept_shares(batch, share) if share else {})})
    clock = Clock(torch.device("cpu"))
    steps = [(row, method, "full") for row, method in zip(rows, methods, strict=True)]
    steps += [({}, methods[0], "forward")]
    milliseconds: list[dict[str, list[float]]] = [{"cpu": [], "wall": []} for _ in steps]
    for _ in range(repetitions):
        for (_, method, mode), found in zip(steps, milliseconds, strict=True):
            before = time.process_time()
            found["wall"].append(clock.time_ms(lambda m=method, w=mode: run_step("trajectory_balance", m, batch, w)))
            found["cpu"].append(1e3 * (time.process_time() - before))
    for (row, _, _), found in zip(steps, milliseconds, strict=True):
        row |= {kind: summarise(values).to_json() for kind, values in found.items()}
    rows[0]["forward"] = steps[-1][0]
    # A bfloat16 E' with exact products: what rounding the stored matrix costs.
    rows[0]["rounding"] = _rounding(batch)
    return rows


class CountingRows(TorchRows):
    """The engine of the reference, which also counts the columns that choices keep."""

    kept = 0
    blocks = 0.0
    sorted_blocks = 0.0

    def choose(self, chunk: Exponentials, rows: slice, scale: Tensor, share: float) -> list[Kept] | None:
        """See `TorchRows.choose`."""
        found = super().choose(chunk, rows, scale, share)
        vocab_size = chunk.matrix.shape[1]
        for part in found or []:
            num_rows = part.rows.stop - part.rows.start
            self.kept += num_rows * (vocab_size if part.columns is None else part.columns.shape[0])
        target, _ = self.head.owned_targets(self.token_ids[rows])
        by_mass = torch.mv(chunk.matrix.abs().T, scale.abs()).argsort()
        for name, order in (("blocks", torch.arange(vocab_size)), ("sorted_blocks", by_mass)):
            setattr(self, name, getattr(self, name) + _kept_blocks(chunk.matrix, scale, target, order, share))
        return found


def _kept_blocks(matrix: Tensor, scale: Tensor, target: Tensor, order: Tensor, share: float) -> float:
    """Return the elements [R, V] in blocks that the products on a GPU would take, columns in a given order."""
    from paced_kernels._loss.triton_skipping import choose_blocks

    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))[target]
    at_target = matrix.gather(1, target[:, None])[:, 0]
    sums = F.pad(matrix[:, order].scatter(1, place[:, None], 0.0), (0, -len(order) % BLOCK)).unflatten(1, (-1, BLOCK))
    own = torch.ones_like(target, dtype=torch.bool)
    kept = choose_blocks(
        sums.sum(-1).T.contiguous(), scale, at_target, place // BLOCK, own, share=share, tile_rows=TILE
    )
    rows = [min(TILE, len(scale) - start) for start in range(0, len(scale), TILE)]
    shares = [count / len(sums[0]) for count in kept.num_blocks.tolist()]
    return len(order) * sum(share * num for share, num in zip(shares, rows, strict=True))


def _kept_shares(batch: Batch, share: float) -> dict[str, float]:
    """Return the shares of the elements of E' that the products take."""
    head = make_head(batch.head_weight, None, 1.0, "", 0)
    engine = CountingRows(head, batch.hidden, batch.token_ids, False, DEFAULT_WORKSPACE_BYTES)
    terms = make_terms(
        batch.cu_seqlens,
        batch.shape.tokens,
        weights=None,
        behavior_logprobs=None,
        importance_cap=None,
        reduction="sum",
        denominator=None,
        **balance_terms(batch, batch.log_z),
    )
    options = FusedOptions("sum", 0.0, Wanted(True, True, False), True, share)
    with torch.no_grad():
        fused = FusedPass(engine, batch.cu_seqlens, terms, options)
        fused.run(plan_groups(batch.cu_seqlens, batch.shape.tokens, engine.rows_per_chunk))
    total = batch.shape.tokens * batch.shape.vocab_size
    return {
        "columns": engine.kept / total,
        "blocks": engine.blocks / total,
        "sorted_blocks": engine.sorted_blocks / total,
    }


def _rounding(batch: Batch) -> dict[str, float]:
    """Return the errors of the gradients if E' is rounded to bfloat16 and multiplied exactly, with one coefficient."""
    rows = slice(0, min(512, batch.shape.tokens))
    hidden, weight = batch.hidden[rows].double(), batch.head_weight.double()
    gradient = (hidden @ weight.T).softmax(-1)
    gradient.scatter_add_(1, batch.token_ids[rows, None], -torch.ones_like(gradient[:, :1]))
    rounded = gradient.bfloat16().double()
    return {
        "hidden_grad_relative": accuracy.relative_error(rounded @ weight, gradient @ weight),
        "weight_grad_relative": accuracy.relative_error(rounded.T @ hidden, gradient.T @ hidden),
    }


def _own_completions(arguments: Arguments, temperature: float) -> Batch:
    """Sample completions and return their states, divided by the temperature."""
    from transformers import AutoTokenizer

    from paced_fast.config import ModelConfig
    from paced_fast.generation import TransformersGenerator
    from paced_fast.generation.interface import Sampling
    from paced_fast.policy import load_model, smollm2_folder

    folder = str(smollm2_folder(Path("~/.cache/paced_fast").expanduser()))
    model = load_model(ModelConfig(name="smollm2", device="cpu", dtype="float32"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [
        tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False))
        for chat in chats
    ]
    generator = TransformersGenerator(model, stop_ids=[tokenizer.eos_token_id], max_batch_sequences=32)
    sampling = Sampling(
        samples=1,
        max_completion_tokens=arguments.completion_tokens,
        temperature=temperature,
        seed=arguments.seed,
    )
    states, token_ids = [], []
    for prompt, completion in zip(prompts, generator.generate(prompts, sampling), strict=True):
        ids = completion.token_ids[: arguments.tokens - sum(map(len, token_ids))]
        with torch.no_grad():
            found = model.model(input_ids=torch.tensor([[*prompt, *ids]])).last_hidden_state[0, len(prompt) - 1 : -1]
        states.append(found[: len(ids)])
        token_ids.append(ids)
    weight = model.lm_head.weight.detach()
    return _batch(torch.cat(states) / temperature, weight, [ids for ids in token_ids if ids], arguments.seed)


def _toy_batch(arguments: Arguments) -> Batch:
    generator = torch.Generator().manual_seed(arguments.seed)
    hidden, weight = torch.randn(90, 32, generator=generator), torch.randn(700, 32, generator=generator)
    token_ids = torch.multinomial((hidden @ weight.T).softmax(-1), 1, generator=generator)[:, 0].tolist()
    return _batch(hidden, weight, [token_ids[:50], token_ids[50:]], arguments.seed)


def _batch(hidden: Tensor, weight: Tensor, token_ids: list[list[int]], seed: int) -> Batch:
    """Rewards and log Z are drawn; the reference differs from the policy by a little noise."""
    lengths = [len(ids) for ids in token_ids]
    generator = torch.Generator().manual_seed(seed)
    flat = torch.tensor([token for ids in token_ids for token in ids])
    shape = Shape(tokens=len(flat), hidden_size=hidden.shape[1], vocab_size=weight.shape[0])
    batch = Batch(
        shape=shape,
        hidden=hidden,
        head_weight=weight,
        token_ids=flat,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        ref_logprobs=torch.empty(0),
        rewards=torch.randint(0, 2, (len(lengths),), generator=generator).float(),
        log_z=torch.rand(len(lengths), generator=generator) / BETA,
        token_weights=torch.randn(len(flat), generator=generator) / len(flat),
        mean_logprob=math.nan,
    )
    logprobs = torch.cat([part for _, part in chunked_logprobs(batch, torch.float32)])
    noise = LOG_RATIO_NOISE * torch.randn(len(flat), generator=generator)
    return replace(batch, ref_logprobs=logprobs + noise, mean_logprob=float(logprobs.double().mean()))


HEADINGS = (
    "temperature",
    "skipped share",
    "columns kept",
    "blocks kept on a GPU",
    "the same, vocabulary sorted",
    "error of dhidden",
    "error of dweight",
    "full step, processor time",
    "of that without",
)


def table_rows(cell: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of each row as text."""
    rows = []
    base = cell["rows"][0]
    for row in cell["rows"]:
        errors, cpu = row["errors"], row["cpu"]
        kept = [f"{row[name]:.1%}" if name in row else "100.0%" for name in ("columns", "blocks", "sorted_blocks")]
        rows.append(
            (
                f"{cell['temperature']:g}",
                "0" if row["share"] == 0 else f"2^{math.log2(row['share']):.0f}",
                *kept,
                f"{errors['hidden_grad_relative']:.1e}",
                f"{errors['weight_grad_relative']:.1e}",
                f"{cpu['median_ms'] / 1e3:.2f} s ({cpu['p10_ms'] / 1e3:.2f} to {cpu['p90_ms'] / 1e3:.2f})",
                f"{cpu['median_ms'] / base['cpu']['median_ms']:.2f}",
            )
        )
    return rows


def _text(cell: dict[str, Any]) -> str:
    return f"\nmean log-prob {cell['mean_logprob']:.2f}\n{aligned([HEADINGS, *table_rows(cell)])}"
