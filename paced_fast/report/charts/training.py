"""What a chart on the page consists of, and those that show one figure over the steps, seconds, memory and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from paced_fast.report.charts.chart import _COLORS, Chart, gibibytes, share, single
from paced_fast.report.charts.svg import Axis, Line, Size, compact, line_chart, percent, stack_chart, stack_top
from paced_fast.report.read_run import Floats, Record, Run, mapping, number


def health_charts(run: Run) -> list[Chart]:
    """The numbers to look at first when a run goes wrong."""
    r = run.records
    return [
        *single(r, "loss", name="loss", title="Loss"),
        *single(r, "grad_norm", name="grad_norm", title="Gradient norm", ends=(0.0, None)),
        *single(r, "entropy", name="entropy", title="Entropy (nats a token)", ends=(0.0, None)),
        *single(r, "mean_length", name="mean_length", title="Tokens a completion", ends=(0.0, None)),
        *share(r, "truncated_share", name="truncated_share", title="Cut completions"),
        *single(r, "kl", name="kl", title="KL to the old policy (nats)"),
        *single(r, "log_ratio_mean", name="log_ratio_mean", title="Mean log-ratio of a completion"),
        *share(r, "effective_sample_share", name="effective_sample_share", title="Effective sample share"),
        *single(r, "learning_rate", name="learning_rate", title="Learning rate", ends=(0.0, None)),
        *single(r, "head_loss", name="head_loss", title="Loss of the log Z head"),
        *single(r, "head_grad_norm", name="head_grad_norm", title="Gradient norm of the head", ends=(0.0, None)),
        *single(r, "tokens_per_second", name="tokens_per_second", title="Tokens sampled a second", ends=(0.0, None)),
    ]


def generator_charts(run: Run) -> list[Chart]:
    """How far generator and trainer disagree on the same tokens, and the checks of an engine's weights."""
    prefix = "generator_mismatch"
    r = run.records
    charts = [
        *single(r, f"{prefix}_mean", name=f"{prefix}_mean", title="Mean difference (nats a token)", ends=(0.0, None)),
        *single(r, f"{prefix}_max", name=f"{prefix}_max", title="Largest difference (nats)", ends=(0.0, None)),
        *single(
            r,
            f"{prefix}_token_ratio",
            name=f"{prefix}_token_ratio",
            title="Token ratio, minus 1",
            caption="Mean of exp |difference| - 1: 0 when both agree, above 0.05 something is wrong.",
            text=lambda x: compact(x - 1.0),
        ),
        *single(
            r,
            f"{prefix}_sequence_ratio",
            name=f"{prefix}_sequence_ratio",
            title="Sequence ratio, minus 1",
            caption="0 in expectation; well below 0 when a sampling filter is at work.",
            text=lambda x: compact(x - 1.0),
        ),
        *share(r, f"{prefix}_outside_share", name=f"{prefix}_outside_share", title="Tokens outside the band"),
    ]
    for side in ("scored", "sampled"):
        title = f"Parity check, {side} tokens (nats)"
        charts += single(r, "parity", f"{side}_mean", name=f"parity_{side}", title=title, ends=(0.0, None))
    return charts


def reward_charts(run: Run) -> list[Chart]:
    """What the reward functions said: completions by verdict, and those without one."""
    charts = share(run.records, "unscored_share", name="unscored_share", title="Completions without a verdict")
    charts += single(
        run.records,
        "shaping_mean",
        name="shaping_mean",
        title="Mean shaping",
        caption="Added to the rewards of a step's completions, mean over them.",
    )
    counted = [(number(r.get("step")), mapping(r.get("verdicts"))) for r in run.records]
    for reward in dict.fromkeys(name for _, verdicts in counted for name in verdicts):
        steps = [(s, kinds) for s, v in counted if s and (kinds := mapping(v.get(reward)))]
        chart = _stack(
            steps,
            name=f"verdicts_{reward}",
            title=f"Verdicts of {reward}",
            caption="Completions of a step by what became of them.",
            text=compact,
            unit="completions",
        )
        charts += [] if chart is None else [chart]
    return charts


def time_charts(run: Run) -> list[Chart]:
    """Seconds and memory by phase, and tokens a second."""
    steps = [(s, mapping(r.get("seconds"))) for r in run.records if (s := number(r.get("step")))]
    chart = _stack(
        steps,
        name="seconds_by_phase",
        title="Seconds a step, by phase",
        caption="On a GPU a phase is charged for what it launched; on a CPU "
        "it is time of the host. Shares are of the whole run.",
        text=lambda x: f"{compact(x)} s",
        unit="time",
    )
    charts = [] if chart is None else [chart]
    memory = [(s, mapping(r.get("memory"))) for r in run.records if (s := number(r.get("step")))]
    return charts + _memory(memory, on_gpu=run.config.get("model.device") == "cuda")


def _stack(
    steps: Sequence[tuple[float, Record]],
    *,
    name: str,
    title: str,
    caption: str,
    text: Callable[[float], str],
    unit: str,
) -> Chart | None:
    layers = _layers(steps)
    if not layers:
        return None
    if len(layers) > _COLORS:
        small = list(layers)[_COLORS - 1 :]
        rest = np.sum([layers.pop(key) for key in small], axis=0)
        layers["others"] = rest
    x = np.array([s for s, _ in steps], np.float64)
    top = stack_top(np.sum(list(layers.values()), axis=0))
    cut = bool((np.sum(list(layers.values()), axis=0) > top).any())
    caption += " The highest columns are cut off at the top." if cut else ""
    ax, ay = Axis(label="step"), Axis(label=unit, high=top, text=text)
    total = float(sum(layer.sum() for layer in layers.values()))
    shares = {key: float(layer.sum()) / total for key, layer in layers.items()}
    label = f"{title}: " + ", ".join(f"{key} {percent(share)}" for key, share in shares.items())
    rows = [[key, percent(shares[key]), text(float(np.median(layer)))] for key, layer in layers.items()]
    return Chart(
        name=name,
        title=title,
        caption=caption,
        svg=stack_chart(x, list(layers.items()), (ax, ay), label),
        legend=[(f"{key} {percent(shares[key])}", i) for i, key in enumerate(layers)],
        table=(["", "share of the whole", "median step"], rows),
    )


def _layers(steps: Sequence[tuple[float, Record]]) -> dict[str, Floats]:
    """Values by name, those of every step, the largest first; names without any are left out."""
    names = dict.fromkeys(name for _, values in steps for name in values)
    found = {n: np.array([max(0.0, number(v.get(n)) or 0.0) for _, v in steps], np.float64) for n in names}
    return dict(sorted(((n, v) for n, v in found.items() if v.sum() > 0), key=lambda item: -float(item[1].sum())))


def _memory(steps: Sequence[tuple[float, Record]], *, on_gpu: bool) -> list[Chart]:
    layers = _layers(steps)
    if not layers:
        return []
    x = np.array([s for s, _ in steps], np.float64)
    if not on_gpu:  # a process gives nothing back, so its phases differ by nothing that could be seen
        layers = {"process": np.stack(list(layers.values())).max(axis=0)}
    peaks = dict(sorted(((n, float(v.max())) for n, v in layers.items()), key=lambda item: -item[1]))
    known = {n: np.flatnonzero(layers[n] > 0) for n in peaks}
    unit, name = (2**30, "GiB") if max(peaks.values()) >= 2**31 else (2**20, "MiB")
    lines = [Line(name=n, x=x[known[n]], y=layers[n][known[n]] / unit, color=i) for i, n in enumerate(list(peaks)[:8])]
    ax, ay = Axis(label="step"), Axis(low=0.0, text=lambda y: f"{compact(y)} {name}")
    label = "Peak memory: " + ", ".join(f"{n} {gibibytes(v)}" for n, v in peaks.items())
    what = "Most that torch held on the GPU within a phase, and its peak over the run." if on_gpu else ""
    return [
        Chart(
            name="memory_by_phase",
            title="Memory by phase" if on_gpu else "Resident memory of the process",
            caption=what or "By phase it hardly differs on a CPU; metrics.jsonl has every phase.",
            svg=line_chart(lines, ax, ay, label, size=Size(left=64)),
            legend=[(f"{line.name} {gibibytes(peaks[line.name])}", line.color) for line in lines],
            table=(["phase", "peak"], [[n, gibibytes(v)] for n, v in peaks.items()]),
        )
    ]
