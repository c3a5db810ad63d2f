"""Charts over the steps: health, generator against trainer, rewards and their outcomes, time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from paced_fast.report.charts.chart import (
    COLORS,
    TIME,
    Axis,
    Chart,
    Line,
    Stack,
    Unit,
    gibibytes,
    percent,
    share,
    single,
)
from paced_fast.report.read_run import Floats, Record, Run, mapping, number

STEP = Axis(label="step", whole=True)
BYTES = Unit(text=gibibytes, scales=((2.0**30, "GiB"), (2.0**20, "MiB")))


def health_charts(run: Run) -> list[Chart]:
    """Charts to look at first when a run goes wrong."""
    r = run.records
    zero = (0.0, None)
    return [
        *single(r, "loss", title="Loss"),
        *single(r, "grad_norm", title="Gradient norm", ends=zero),
        *single(r, "entropy", title="Entropy (nats per token)", ends=zero),
        *single(r, "mean_length", title="Tokens per completion", ends=zero),
        *share(r, "truncated_share", title="Completions cut at the length limit", rare=True),
        *single(r, "kl", title="KL to the old policy (nats per completion)", rare=True),
        *single(r, "log_ratio_mean", title="Mean log-ratio (nats per completion)", rare=True),
        *share(r, "effective_sample_share", title="Effective sample share"),
        *single(r, "learning_rate", title="Learning rate", ends=zero),
        *single(r, "head_loss", title="Loss of the log Z head"),
        *single(r, "head_grad_norm", title="Gradient norm of the head", ends=zero),
        *single(r, "tokens_per_second", title="Tokens sampled per second", ends=zero),
    ]


def generator_charts(run: Run) -> list[Chart]:
    """Charts of the disagreement of generator and trainer on the same tokens, and of checks of engine weights."""
    prefix = "generator_mismatch"
    r = run.records
    charts = [
        *single(r, f"{prefix}_mean", title="Mean difference (nats per token)", ends=(0.0, None)),
        *single(r, f"{prefix}_max", title="Largest difference (nats)", ends=(0.0, None)),
        *single(
            r,
            f"{prefix}_token_ratio",
            title="Token ratio, minus 1",
            caption="Mean over tokens of exp |difference|, minus 1: 0 if both agree; above 0.05 something is wrong.",
            above=1.0,
        ),
        *single(
            r,
            f"{prefix}_sequence_ratio",
            title="Sequence ratio, minus 1",
            caption="Expected to be 0; clearly below 0 if a sampling filter is active.",
            above=1.0,
        ),
        *share(r, f"{prefix}_outside_share", title="Tokens with a ratio outside the band", rare=True),
    ]
    for side in ("scored", "sampled"):
        title = f"Parity check, {side} tokens (nats)"
        charts += single(r, "parity", f"{side}_mean", name=f"parity_{side}", title=title, ends=(0.0, None))
    return charts


def reward_charts(run: Run) -> list[Chart]:
    """Charts of rewards: completions by outcome, including unscored ones."""
    charts = share(run.records, "unscored_share", title="Unscored completions", rare=True)
    charts += single(
        run.records,
        "shaping_mean",
        title="Mean shaping term",
        caption="Mean over the step's completions of what shaping adds to the reward.",
        rare=True,
    )
    counted = [(number(r.get("step")), mapping(r.get("verdicts"))) for r in run.records]
    for reward in dict.fromkeys(name for _, verdicts in counted for name in verdicts):
        steps = [(s, kinds) for s, v in counted if s and (kinds := mapping(v.get(reward)))]
        title, caption = f"Verdicts of {reward}", "Completions per step, by verdict."
        charts += _stack(steps, Axis(label="completions"), name=f"verdicts_{reward}", title=title, caption=caption)
    return charts


def time_charts(run: Run) -> list[Chart]:
    """Charts of seconds and memory per phase."""
    steps = [(s, mapping(r.get("seconds"))) for r in run.records if (s := number(r.get("step")))]
    memory = [(s, mapping(r.get("memory"))) for r in run.records if (s := number(r.get("step")))]
    caption = "On a GPU: time of the kernels that a phase launched; on a CPU: wall time. Shares are of the whole run."
    title = "Seconds per step, by phase"
    charts = _stack(steps, Axis(label="time", unit=TIME), name="seconds_by_phase", title=title, caption=caption)
    return charts + _memory(memory, on_gpu=run.config.get("model.device") == "cuda")


def stack_top(total: Floats) -> float:
    """Upper end of a stack: the highest column, unless a few high columns would flatten the others."""
    high = float(np.quantile(total, 0.97))
    most = float(total.max())
    return 1.05 * (most if most <= 1.5 * high else high) or 1.0


def _stack(steps: Sequence[tuple[float, Record]], y: Axis, *, name: str, title: str, caption: str) -> list[Chart]:
    layers = _by_name(steps)
    if not layers:
        return []
    if len(layers) > COLORS:
        small = list(layers)[COLORS - 1 :]
        rest = np.sum([layers.pop(key) for key in small], axis=0)
        layers["others"] = rest
    height = np.sum(list(layers.values()), axis=0)
    y = replace(y, high=stack_top(height))
    if (height > y.high).any():
        caption += " The highest columns are cut off at the top."
    shares = {key: percent(float(layer.sum() / height.sum())) for key, layer in layers.items()}
    rows = [[key, shares[key], y.write(float(np.median(layer)))] for key, layer in layers.items()]
    return [
        Chart(
            name=name,
            title=title,
            caption=caption,
            x=STEP,
            y=y,
            words=f"{title}: " + ", ".join(f"{key} {part}" for key, part in shares.items()),
            stack=Stack(x=np.array([s for s, _ in steps], np.float64), layers=layers),
            legend=[(f"{key} {part}", i) for i, (key, part) in enumerate(shares.items())],
            table=(["", "share of the run", "median per step"], rows),
        )
    ]


def _by_name(steps: Sequence[tuple[float, Record]]) -> dict[str, Floats]:
    """Return values per step by name, largest first; names without values are left out."""
    names = dict.fromkeys(name for _, values in steps for name in values)
    found = {n: np.array([max(0.0, number(v.get(n)) or 0.0) for _, v in steps], np.float64) for n in names}
    return dict(sorted(((n, v) for n, v in found.items() if v.sum() > 0), key=lambda item: -float(item[1].sum())))


def _memory(steps: Sequence[tuple[float, Record]], *, on_gpu: bool) -> list[Chart]:
    layers = _by_name(steps)
    if not layers:
        return []
    x = np.array([s for s, _ in steps], np.float64)
    if not on_gpu:  # a CPU process returns no memory, so its phases look the same
        layers = {"process": np.stack(list(layers.values())).max(axis=0)}
    peaks = dict(sorted(((n, float(v.max())) for n, v in layers.items()), key=lambda item: -item[1]))
    known = {n: layers[n] > 0 for n in peaks}
    lines = [Line(name=n, x=x[known[n]], y=layers[n][known[n]], color=i) for i, n in enumerate(list(peaks)[:COLORS])]
    written = [(n, gibibytes(peak)) for n, peak in peaks.items()]
    what = (
        "Largest amount that torch allocated on the GPU in each phase; the legend has the run's peak." if on_gpu else ""
    )
    return [
        Chart(
            name="memory_by_phase",
            title="Memory by phase" if on_gpu else "Resident memory of the process",
            caption=what or "On a CPU the phases hardly differ; metrics.jsonl has each of them.",
            x=STEP,
            y=Axis(label="memory", low=0.0, unit=BYTES),
            words="Peak memory: " + ", ".join(f"{n} {peak}" for n, peak in written),
            lines=lines,
            legend=[(f"{n} {peak}", i) for i, (n, peak) in enumerate(written[:COLORS])],
            table=(["phase", "peak"], written),
        )
    ]
