"""First minute on a GPU: is the loss right, how biased are its log-probs, and how fast are its products.

    python -m benchmarks.run visit_smoke

Ours against an oracle at three hidden sizes and in every stage; the mean error of log-probs, which truncating tensor
cores would show; then the four products and whole steps at the shapes of `predictions`. Results are written after each
item. On a CPU the same runs at toy shapes, and is checked in Triton's interpreter and timed in plain PyTorch; results
keep the names of the shapes they stand for.

T = packed tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.loss import accuracy, methods, our_engines, report
from benchmarks.loss.problems import Batch, Shape, make_batch, make_weight, toy_of
from benchmarks.timing import Clock, Failure, Timing, attempt, failure_of, interleave

VOCABULARY = 151936
ACCURACY_SIZES = (1536, 4096, 896)
SPEED_SIZES = (1536, 4096, 896, 2048, 3584)
FAR_OFF = {"token_nats": 1e-2, "hidden_grad_relative": 1e-2, "weight_grad_relative": 1e-2}
"""Errors above which a result is wrong and not merely rounded: twice and more of what bfloat16 gradients differ by."""
EXTRA_STEPS = (
    (Shape(tokens=8192, hidden_size=4096, vocab_size=131072), ("full", "forward")),
    (Shape(tokens=4096, hidden_size=4096, vocab_size=128256), ("full",)),
)
"""Shapes at which other projects publish their own numbers."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Check and time the loss within a minute."""

    device: str = "cuda"
    """cuda, or cpu (toy shapes)."""
    seconds: float = 0.0
    """Seconds after which nothing further starts; 0 means no limit."""
    repetitions: int = 0
    """Timed calls of each product and step; 0 means 10 on a GPU and 1 on a CPU."""
    progress: str = ""
    """File that names the current measurement."""


class Smoke:
    """A run: what it has found so far, where that is written, and its time."""

    def __init__(self, arguments: Arguments, path: Path) -> None:
        self.arguments, self.path = arguments, path
        self.device = environment.choose_device(arguments.device)
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.clock = Clock(self.device)
        self.started = time.perf_counter()
        self.result: dict[str, Any] = {"settings": asdict(arguments), "device": environment.device(self.device)}
        self.result |= {"accuracy": [], "bias": [], "products": [], "steps": [], "failed": [], "not_reached": []}

    def run(self) -> dict[str, Any]:
        """All items, in order of importance; each is written when it is done, and one that fails is named."""
        items: list[tuple[str, Callable[[], None]]] = []
        for size in ACCURACY_SIZES:
            items.append((f"accuracy H{size}", functools.partial(self._accuracy, size)))
        for size in SPEED_SIZES:
            items.append((f"speed H{size}", functools.partial(self._speed, size)))
        for shape, modes in EXTRA_STEPS:
            items.append((f"steps {shape.name}", functools.partial(self._steps, shape, modes)))
        for name, item in items:
            if self.arguments.seconds and time.perf_counter() - self.started > self.arguments.seconds:
                self.result["not_reached"].append(name)
                continue
            if self.arguments.progress:
                Path(self.arguments.progress).write_text(name)
            found = attempt(item, self.clock)
            if isinstance(found, Failure):
                self.result["failed"].append({"name": name, "reason": found.reason})
                print(f"{name} failed: {found.reason}", flush=True)
            if self.on_gpu:
                torch.cuda.empty_cache()
            environment.write_json(self.path, environment.headed("visit_smoke", self.result))
        return self.result

    def _batch(self, shape: Shape) -> Batch:
        here = shape if self.on_gpu else toy_of(shape)
        return make_batch(here, make_weight(here, self.device, self.dtype, 0), "peaked", 1)

    def _accuracy(self, size: int) -> None:
        """Loss, gradients and log-probs of every stage against the oracle, on a few rows."""
        shape = Shape(tokens=2048, hidden_size=size, vocab_size=VOCABULARY)
        batch = self._batch(shape)
        exact = accuracy.oracle("trajectory_balance", batch, accuracy.oracle_dtype(self.device))
        for stage, (config, backend) in our_engines.stages(batch).items():
            ours = methods.Method(
                name="ours",
                balance=methods.our_balance(backend=backend),
                logprobs=methods.our_logprobs(backend=backend),
                thv=methods.fixed_thv(2, 4, 6),
                around=functools.partial(our_engines.planned, config),
                ours=True,
            )
            entry: dict[str, Any] = {"shape": shape.name, "hidden_size": size, "stage": stage}
            try:
                self._compare(entry, ours, batch, exact)
            except Exception as error:  # a stage may fail in any way; its row records how
                entry |= {"verdict": "failed", "reason": failure_of(error).reason}
            self.result["accuracy"].append(entry)
            print(accuracy_line(entry), flush=True)
            if self.on_gpu:
                torch.cuda.synchronize()

    def _compare(self, entry: dict[str, Any], ours: methods.Method, batch: Batch, exact: accuracy.Answer) -> None:
        answer = methods.answer_of("trajectory_balance", ours, batch)
        assert exact.logprobs is not None
        assert ours.logprobs is not None
        with ours.around(), torch.no_grad():
            scored = ours.logprobs(batch.hidden, batch.head_weight, batch.token_ids)
        gap = scored.double() - exact.logprobs
        entry |= accuracy.errors(answer, exact) | {"token_nats": float(gap.abs().max())}
        wrong = [key for key, bound in FAR_OFF.items() if not entry[key] <= bound]  # NaN is wrong too
        entry["verdict"] = f"WRONG: {', '.join(wrong)}" if wrong else "right"
        spread = float(gap.std()) / math.sqrt(len(gap))
        self.result["bias"].append(
            {"hidden_size": entry["hidden_size"], "stage": entry["stage"], "mean_nats": float(gap.mean())}
            | {"standard_error_nats": spread, "largest_nats": float(gap.abs().max())}
        )

    def _speed(self, size: int) -> None:
        """The four products as one chunk of 8192 rows, the whole step, and what it is compared with."""
        shape = Shape(tokens=8192, hidden_size=size, vocab_size=VOCABULARY)
        batch = self._batch(shape)
        plan, _ = our_engines.stages(batch)["table"]
        calls = our_engines.product_calls(batch, plan)
        if size in ACCURACY_SIZES:
            for stage, (config, _) in our_engines.stages(batch).items():
                if stage != "table":
                    calls[f"logits and exp, {stage}"] = our_engines.product_calls(batch, config)["logits and exp"]
        self._record("products", shape, batch, calls, dict.fromkeys(calls, 2.0), "")
        three, thv = methods.ceilings(batch)["ceiling: three GEMMs"]
        others: dict[str, Callable[[int], object]] = {"three GEMMs": lambda turn: three()}
        thvs = {"three GEMMs": thv}
        if size in (1536, 4096):
            naive = methods.torch_makers()["naive"]()
            others["naive"] = functools.partial(_step, naive, batch, "full")
            thvs["naive"] = 6.0
        self._steps(shape, ("full",), batch, others, thvs)

    def _steps(
        self,
        shape: Shape,
        modes: tuple[str, ...],
        batch: Batch | None = None,
        others: dict[str, Callable[[int], object]] | None = None,
        thvs: dict[str, float] | None = None,
    ) -> None:
        batch = batch or self._batch(shape)
        ours = methods.Method(name="ours", balance=methods.our_balance(), thv=methods.fixed_thv(2, 4, 6), ours=True)
        for mode in modes:
            calls: dict[str, Callable[[int], object]] = {"ours": functools.partial(_step, ours, batch, mode)}
            calls |= others or {}
            self._record("steps", shape, batch, calls, {"ours": ours.thv(mode, batch)} | (thvs or {}), mode)

    def _record(
        self,
        table: str,
        shape: Shape,
        batch: Batch,
        calls: dict[str, Callable[[int], object]],
        thvs: dict[str, float],
        mode: str,
    ) -> None:
        """Time calls side by side, and add a row for each."""
        repetitions = self.arguments.repetitions or (10 if self.on_gpu else 1)
        found = interleave(
            calls,
            self.clock,
            repetitions=repetitions,
            min_repetitions=min(3, repetitions),
            seconds=5.0,
            warm_ups=1 if self.on_gpu else 0,
        )
        for name, timing in found.items():
            row: dict[str, Any] = {"shape": shape.name, "name": name, "mode": mode}
            if isinstance(timing, Timing):
                tflops = 1e-9 * batch.shape.operations(thvs[name]) / timing.median_ms
                row |= {**timing.to_json(), "tflops": tflops}
            else:
                row["failed"] = timing.reason
            self.result[table].append(row)
        print(speed_text(table, self.result[table][-len(found) :]), flush=True)


def _step(method: methods.Method, batch: Batch, mode: str, turn: int) -> None:
    del turn
    methods.run_step("trajectory_balance", method, batch, mode)


def accuracy_line(entry: dict[str, Any]) -> str:
    """Format one comparison with the oracle."""
    head = f"H{entry['hidden_size']}, {entry['stage']}: {entry['verdict']}"
    if "reason" in entry:
        return f"{head}: {entry['reason']}"
    return (
        f"{head}; log-probs {entry['token_nats']:.1e} nats, sequences {entry['sequence_max_nats']:.1e} nats, "
        f"dX {entry['hidden_grad_relative']:.1e}, dW {entry['weight_grad_relative']:.1e}"
    )


def speed_text(table: str, rows: list[dict[str, Any]]) -> str:
    """Format products or steps of one shape."""
    lines = [(f"{table}, {rows[0]['shape']} {rows[0]['mode']}".rstrip(), "ms (p10-p90)", "TFLOP/s")]
    for row in rows:
        if "failed" in row:
            lines.append((row["name"], f"failed: {row['failed'][:80]}", ""))
        else:
            spent = f"{row['median_ms']:.2f} ({row['p10_ms']:.2f}-{row['p90_ms']:.2f})"
            lines.append((row["name"], spent, f"{row['tflops']:.3g}"))
    return "\n" + report.aligned(lines)


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Run every item; `path` always holds what is known."""
    return Smoke(arguments, path).run()
