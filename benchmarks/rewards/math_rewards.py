"""Accuracy of the math rewards on labelled answers, and their speed, compared with math-verify called directly.

The table is tests/verdicts/math.jsonl: reference, completion, and a manual label per mode. math-verify is called as in
its documentation: the completion unchanged, and the reference between dollar signs. Rows with `held_out` were written
after the rules were fixed and did not influence them.

Speed is answers per second of one call with a batch, with processes already started. Every batch has its own numbers,
so no result comes from a cache.
"""

from __future__ import annotations

import json
import logging
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from math_verify import parse, verify

from paced_fast.config import RewardConfig
from paced_fast.errors import InputError
from paced_fast.rewards.math.answers import key_text
from paced_fast.rewards.math.reward import MathReward

TABLE = Path(__file__).resolve().parents[2] / "tests" / "verdicts" / "math.jsonl"
DIRECT = "math-verify"
METHODS = {"math_strict": "math_strict", "math": "math", DIRECT: "math", f"{DIRECT}, strict labels": "math_strict"}
"""Methods, and the labels each is compared with."""

Batch = tuple[list[str], list[str]]
"""References and completions."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure errors on the labelled table by mode and kind of answer, and answers per second."""

    answers: int = 512
    """Answers per batch."""
    repeats: int = 7
    """Batches of each kind; the methods alternate."""
    seed: int = 0
    """Seed of the batches."""
    rows: int = 0
    """Rows of the labelled table, evenly spread over it; 0 means all."""


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Return errors and speeds of the two rewards and of math-verify."""
    if arguments.answers < 8 or arguments.repeats < 1:
        raise InputError(
            f"--answers is {arguments.answers} and --repeats is {arguments.repeats}: give 8 or more, and 1 or more"
        )
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    rows = [json.loads(line) for line in TABLE.read_text().splitlines()]
    rows = rows[:: max(1, len(rows) // arguments.rows)] if arguments.rows else rows
    errors = table_errors(rows)
    speeds = throughput(arguments)
    result = {
        "table": {"rows": len(rows), "held_out": sum(row["held_out"] for row in rows), "kinds": kinds(rows, errors)},
        "errors": errors,
        "summary": summary(rows, errors),
        "throughput": speeds,
        "math_verify": metadata.version("math-verify"),
        "sympy": metadata.version("sympy"),
        "load": os.getloadavg()[0],
    }
    show(result)
    return result


def direct(golds: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Return the verdicts of math-verify, in this process, with its own time limits enabled."""
    found = []
    for gold, completion in zip(golds, completions, strict=True):
        found.append(float(verify(parse(f"${gold}$"), parse(completion))))
    return found


def _judged(judge: MathReward) -> Callable[[Sequence[str], Sequence[str]], list[float | None]]:
    return lambda golds, completions: judge(prompts=golds, completions=completions, answer=golds)


def table_errors(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return, per method, the rows whose verdict differs from the label."""
    golds, completions = ([row[key] for row in rows] for key in ("gold", "completion"))
    verdicts: dict[str, Sequence[float | None]] = {}
    for strict in (True, False):
        judge = MathReward(RewardConfig(workers=2, math_seconds=10.0), strict=strict)
        verdicts[judge.name] = _judged(judge)(golds, completions)
        judge.close()
    verdicts[DIRECT] = direct([key_text(gold) for gold in golds], completions)
    verdicts[f"{DIRECT}, strict labels"] = verdicts[DIRECT]
    words = {1.0: "right", 0.0: "wrong", None: "unscored"}
    return {
        method: [
            {**{key: row[key] for key in ("kind", "gold", "completion", "held_out")}, "verdict": words[verdict]}
            for row, verdict in zip(rows, verdicts[method], strict=True)
            if verdict != float(row[label])
        ]
        for method, label in METHODS.items()
    }


def summary(rows: Sequence[dict[str, Any]], errors: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return counts per method: over all rows, and over held-out rows."""
    found: dict[str, Any] = {}
    for method, label in METHODS.items():
        found[method] = {}
        for name, is_counted in (("all", lambda row: True), ("held_out", lambda row: row["held_out"])):
            verdicts = Counter(error["verdict"] for error in errors[method] if is_counted(error))
            labels = Counter(row[label] for row in rows if is_counted(row))
            found[method][name] = {
                "right": labels[True],
                "wrong": labels[False],
                "false_positives": verdicts["right"],
                "failed": sum(error["verdict"] != "right" for error in errors[method] if is_counted(error)),
                "unscored": verdicts["unscored"],
            }
    return found


def kinds(rows: Sequence[dict[str, Any]], errors: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return rows per kind of answer, and `false positives/false negatives` per method."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        found[kind] = {"rows": sum(row["kind"] == kind for row in rows)}
        for method in METHODS:
            verdicts = Counter(error["verdict"] for error in errors[method] if error["kind"] == kind)
            found[kind][method] = [verdicts["right"], verdicts["wrong"]]
    return found


# Ordinary answers: (share, reference, right answer in another form, wrong answer), filled with two random numbers.
_FORMS: tuple[tuple[int, str, str, str], ...] = (
    (8, "{a}", "{a}", "{b}"),
    (2, "{a}", "{a}.0", "{a}.5"),
    (2, "{a}000", "{a},000", "{b},000"),
    (3, r"\frac{{{a}}}{{{p}}}", r"\dfrac{{{a}}}{{{p}}}", r"\frac{{{b}}}{{{p}}}"),
    (2, "{a}/{p}", r"\frac{{{a}}}{{{p}}}", "{b}/{p}"),
    (2, r"\frac{{{a}}}{{8}}", r"{a}/8", "{b}.125"),
    (1, r"{a}\sqrt{{3}}", r"\sqrt{{3}}\cdot {a}", r"{b}\sqrt{{3}}"),
    (1, r"\frac{{{a}\pi}}{{{p}}}", r"\frac{{{a}}}{{{p}}}\pi", r"\frac{{{b}\pi}}{{{p}}}"),
    (1, "{a}x^2+{b}x", "{b}x+{a}x^2", "{a}x^2-{b}x"),
    (1, r"\left({a}, {b}\right)", "({a},{b})", "({b},{a})"),
    (1, r"[{a}, \infty)", r"[{a},\infty)", r"({a}, \infty)"),
)
NO_NUMBERS = range(6, 11)
"""Indices of the forms that are not plain numbers; nearly all of them need a worker process."""


def batch(source: random.Random, num_answers: int, *, group: int = 1, forms: Sequence[int] | None = None) -> Batch:
    """Return references and completions, half of them right; `group` completions per reference, with three answers."""
    chosen = list(forms or range(len(_FORMS)))
    golds: list[str] = []
    completions: list[str] = []
    while len(golds) < num_answers:
        shares = [_FORMS[i][0] for i in chosen]
        _, gold, right, wrong = _FORMS[source.choices(chosen, shares)[0]]
        numbers = {"a": source.randrange(11, 10**6), "b": source.randrange(11, 10**6), "p": source.choice((7, 11, 13))}
        texts = [text.format(**numbers) for text in (gold, right, wrong)]
        for _ in range(group):
            kind = source.randrange(4) if group > 1 else source.randrange(1, 5)
            golds.append(texts[0])
            completions.append(rf"Adding up, the result is $\boxed{{{texts[(kind + 1) // 2 if kind else 0]}}}$.")
    return golds[:num_answers], completions[:num_answers]


def throughput(arguments: Arguments) -> dict[str, Any]:
    """Measure answers per second of each method on each kind of batch, interleaved."""
    cores = len(os.sched_getaffinity(0))
    judges = {
        f"{name}, {workers} worker{'s' if workers > 1 else ''}": MathReward(
            RewardConfig(workers=workers, math_seconds=10.0), strict=name == "math_strict"
        )
        for workers in sorted({1, cores})
        for name in ("math", "math_strict")
    }
    methods: dict[str, Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]] = {
        **{name: _judged(judge) for name, judge in judges.items()},
        DIRECT: direct,
    }
    source = random.Random(arguments.seed)
    cases: dict[str, dict[str, Any]] = {
        "ordinary answers": {},
        "groups of 8 completions": {"group": 8},
        "answers that are no plain numbers": {"forms": NO_NUMBERS},
    }
    found: dict[str, Any] = {}
    for judge in judges.values():
        judge.warm()
        _judged(judge)(*batch(source, 64))
    for case, settings in cases.items():
        rates: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(arguments.repeats):
            golds, completions = batch(source, arguments.answers, **settings)
            for name, method in methods.items():
                started = time.perf_counter()
                method(golds, completions)
                rates[name].append(len(golds) / (time.perf_counter() - started))
        found[case] = {
            name: {"median": statistics.median(rate), "least": min(rate), "largest": max(rate)}
            for name, rate in rates.items()
        }
    for judge in judges.values():
        judge.close()
    return {"answers": arguments.answers, "repeats": arguments.repeats, "cores": cores, "cases": found}


def show(result: dict[str, Any]) -> None:
    """Print both tables."""
    print(f"{'kind':<18}{'rows':>5}  " + "".join(f"{method:>28}" for method in METHODS))
    for kind, row in result["table"]["kinds"].items():
        print(f"{kind:<18}{row['rows']:>5}  " + "".join(f"{'{}/{}'.format(*row[method]):>28}" for method in METHODS))
    print("each cell: false positives/false negatives\n")
    for method, counts in result["summary"].items():
        print(method, counts["all"], "held out:", counts["held_out"])
    for case, speeds in result["throughput"]["cases"].items():
        print(f"\n{case}")
        for name, speed in speeds.items():
            print(f"  {name:<26}{speed['median']:>9.0f} answers/s ({speed['least']:.0f} to {speed['largest']:.0f})")
