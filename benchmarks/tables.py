"""Write the tables of the READMEs from the committed results: `python -m benchmarks.tables`.

The learning curves are drawn too. `--check` only compares. `--stale` lists the tables whose code has changed since they
were measured. A section is the text between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; it is left unchanged if its
result file is missing. The tables of sample_efficiency are made from the files of its runs, and say which have none.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import pictures, run, stale
from benchmarks.loss import compile_kernels, peaked, report
from benchmarks.rewards import sandbox as sandbox_case
from benchmarks.training import sampling, whole_steps
from benchmarks.training.efficiency import sections, suites, table
from benchmarks.training.efficiency.sections import RunFiles
from benchmarks.training.efficiency.summary import Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


_PAGES = (
    *("data-and-rewards", "evaluation", "model-types", "other-trainers", "results"),
    *("scaling-and-reliability", "vllm"),
)
READMES = (ROOT / "README.md", ROOT / "kernels" / "README.md", *(ROOT / "docs" / f"{name}.md" for name in _PAGES))
"""Pages with generated sections."""


def _environment(result: dict[str, Any]) -> str:
    where = result["environment"]
    versions = where["versions"]
    parts = [where["date"], f"commit {where['commit']}", where["cpu"], f"{where['cores']} cores"]
    parts += [f"{name} {versions[name]}" for name in ("torch", "transformers", "trl") if versions.get(name)]
    return ", ".join(parts)


def train_run(result: dict[str, Any]) -> str:
    """Describe one run of a preset in a sentence."""
    summary = result["summary"]

    def rise(key: str) -> str:
        return f"{summary[f'{key}_before']:.3f} to {summary[f'{key}_after']:.3f}"

    warm_start = "with a cached warm start" if result["warm_start_cached"] else "warm start included"
    found = summary["value_rank_correlation"]  # None where all prompts are solved equally often
    correlation = "-" if found is None else f"{found:.2f}"
    text = f"""
        Held-out accuracy goes from {rise("accuracy")} and pass@8 from {rise("pass_at_8")} with {summary["rollouts"]:,}
        rollouts in {summary["train_seconds"]:.0f} s of training. The whole command took
        {result["wall_seconds"]:.0f} s, {warm_start}. At the end the value has a rank correlation of
        {correlation} with the measured accuracy of held-out prompts and a calibration
        error of {summary["value_ece"]:.3f} ({_environment(result)})."""
    return _wrapped(text)


KERNEL_COLUMNS = (
    "method",
    "full step",
    "no gradient",
    "frozen head",
    "peak memory",
    "error of a sequence's log-prob",
    "error of dhidden",
    "error of dweight",
)


def kernels(result: dict[str, Any]) -> str:
    """Format the first cell of a comparison with peers, of the trajectory-balance loss or of log-probs, as Markdown."""
    cell = result["cells"][0]
    lines = [f"| {' | '.join(KERNEL_COLUMNS)} |", "|" + "---|" * len(KERNEL_COLUMNS)]
    lines += [f"| {' | '.join(_kernel_cells(row))} |" for row in report.ordered(cell) if not row["ceiling"]]
    verdicts = [report.speedup(cell, mode) for mode in report.SHOWN_MODES]
    words = ("The full step", "Without a gradient ours", "With a frozen head ours")
    against = [
        f"{word} runs at {found[0]:.2f} x the speed of the fastest other method ({found[1]})"
        for word, found in zip(words, verdicts, strict=True)
        if found is not None
    ]
    shape, device = cell["shape"], result["device"]
    where = device.get("gpu") or f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}"
    skipped = sorted(f"{row['name']} ({row['reason']})" for row in cell["rows"] if row["status"] == "skipped")
    left_out = f"Not measured: {'; '.join(skipped)}." if skipped else ""
    what = "Log-probs" if result["case"] == "logprobs" else "Trajectory-balance loss"
    note = f"""
        {what} of {shape["tokens"]} tokens, hidden size {shape["hidden_size"]}, vocabulary
        {shape["vocab_size"]}, {cell["dtype"]}, {where}. Times: median (10th to 90th percentile) of interleaved runs;
        memory: in addition to the inputs; errors: against {cell["oracle"]}. {". ".join(against)}. {left_out}
        {_environment(result)}."""
    return "\n".join(["\n".join(lines), "", _wrapped(note)])


def _kernel_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of one method; a failure is shown in place of its time."""
    times = []
    for mode in report.SHOWN_MODES:
        timing = row["modes"].get(mode, {})
        if "median_ms" in timing:
            unit, scale, digits = ("s", 1e-3, 2) if timing["median_ms"] >= 1000 else ("ms", 1.0, 1)
            median, low, high = (scale * timing[key] for key in ("median_ms", "p10_ms", "p90_ms"))
            times.append(f"{median:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f})")
        else:
            times.append("failed" if "failed" in timing or row["status"] == "failed" else "")
    peak, errors = row.get("peak_bytes"), row.get("accuracy", {})
    keys = ("sequence_max_nats", "hidden_grad_relative", "weight_grad_relative")
    return [
        row["name"],
        *times,
        "" if peak is None else f"{peak / 2**20:,.0f} MiB",
        *(report.format_error(errors.get(key)) for key in keys),
    ]


def peaked_policies(result: dict[str, Any]) -> str:
    """Format what leaving out columns of E' saves as Markdown."""
    lines = [f"| {' | '.join(peaked.HEADINGS)} |", "|" + "---|" * len(peaked.HEADINGS)]
    notes = []
    for cell in result["cells"]:
        lines += [f"| {' | '.join(row)} |" for row in peaked.table_rows(cell)]
        first, shape = cell["rows"][0], cell["shape"]
        rounding = first["rounding"]
        notes.append(
            f"at temperature {cell['temperature']:g} {shape['tokens']} tokens of mean log-prob "
            f"{cell['mean_logprob']:.2f}, the forward pass alone is {_share_of_forward(first):.0%} of the step without "
            f"it, and rounding E' to bfloat16 gives errors of {rounding['hidden_grad_relative']:.1e} and "
            f"{rounding['weight_grad_relative']:.1e}"
        )
    shape = result["cells"][0]["shape"]
    note = f"""
        Trajectory-balance loss, hidden size {shape["hidden_size"]}, vocabulary {shape["vocab_size"]}, float32, one
        thread; completions are sampled at the temperature of the loss: {"; ".join(notes)}. Columns and blocks: share
        of the elements of E' that the products take, on a CPU and on a GPU. Times: median (10th to 90th percentile) of
        interleaved steps; errors: against float64. {_environment(result)}."""
    return "\n".join([*lines, "", _wrapped(note)])


def _share_of_forward(row: dict[str, Any]) -> float:
    return row["forward"]["cpu"]["median_ms"] / row["cpu"]["median_ms"]


def weight_sync(result: dict[str, Any]) -> str:
    """Format the methods to update an engine's weights, and short runs with each, as Markdown."""
    lines = [
        "| weights | MB copied | seconds (smallest to largest) | MB resident | MB at the peak |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["modes"].items():
        seconds = f"{row['median_seconds']:.3f} ({row['least_seconds']:.3f} to {row['largest_seconds']:.3f})"
        sizes = [f"{row[key] / 1e6:,.0f}" for key in ("bytes", "resident_bytes", "peak_bytes")]
        lines.append(f"| {name} | {sizes[0]} | {seconds} | {sizes[1]} | {sizes[2]} |")
    shared = result["modes"]["shared"]
    note = f"""
        Time of one update of {result["model"]} in {result["dtype"]} ({shared["weights_bytes"] / 1e6:,.0f} MB of
        weights), and memory of trainer and engine together, in addition to an idle process. `load_weights` is called
        once per parameter, as in TRL. After the updates the log-probs of both sides differ by up to
        {max(row["largest_difference"] for row in result["modes"].values()):.1e}.
        {_environment(result)}."""
    runs = ["| run of `tiny` | seed | generate s | train s | sync s | reward, last steps | accuracy after |"]
    runs.append("|---|---|---|---|---|---|---|")
    for row in result.get("runs", ()):
        seconds = " | ".join(f"{row[key]:.3f}" for key in ("generate", "train", "sync"))
        name = f"{row['name']} | {row['seed']}"
        runs.append(f"| {name} | {seconds} | {row['reward']:.3f} | {row['accuracy_after']:.3f} |")
    return "\n".join([*lines, "", _wrapped(note), *(["", *runs] if result.get("runs") else [])])


def math_rewards(result: dict[str, Any]) -> str:
    """Format errors of the math rewards on the labelled table, and their speed, as Markdown."""
    table, speeds = result["table"], result["throughput"]
    columns = ["judged by", "wrong answers passed", "right answers failed", "both, on held-out rows only"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for method, counts in result["summary"].items():
        cells = [
            [f"{part['false_positives']} of {part['wrong']}", f"{part['failed']} of {part['right']}"]
            for part in (counts["all"], counts["held_out"])
        ]
        lines.append(f"| {method} | {' | '.join(cells[0])} | {', '.join(cells[1])} |")
    cases = list(speeds["cases"])
    rates = [f"| answers per second | {' | '.join(cases)} |", "|" + "---|" * (1 + len(cases))]
    for method in speeds["cases"][cases[0]]:
        cells = (speeds["cases"][case][method] for case in cases)
        rates.append(
            f"| {method} | "
            + " | ".join("{median:,.0f} ({least:,.0f} to {largest:,.0f})".format(**c) for c in cells)
            + " |"
        )
    note = f"""
        Judged were {table["rows"]} pairs of answer key and completion, of {len(table["kinds"])} kinds, labelled by hand
        for each mode (`tests/verdicts/math.jsonl`); {table["held_out"]} of them (held-out) were written after the rules
        were fixed. math-verify {result["math_verify"]} reads the raw completion and is compared with the labels of
        `math` and with those of `math_strict`. Speed: median (smallest to largest) of {speeds["repeats"]} interleaved
        batches of {speeds["answers"]} answers, half of them right; math-verify in one process; load average
        {result["load"]:.1f} on {speeds["cores"]} cores. {_environment(result)}."""
    return "\n".join([*lines, "", *rates, "", _wrapped(note)])


def compiled(result: dict[str, Any]) -> str:
    """Format the compiler's figures of every kernel as Markdown."""
    where = result["environment"]
    note = f"Compiled without a GPU, {where['date']}, commit {where['commit']}, triton {where['versions']['triton']}."
    lines = [*compile_kernels.table(result["rows"]), ""]
    if any("tile" in row for row in result["rows"]):
        words = "Instructions of one warp for a tile, and those of them that take the half-rate ALU pipe:"
        lines += [words, "", *compile_kernels.tile_table(result["rows"]), ""]
    return "\n".join([*lines, note])


def sandbox(result: dict[str, Any]) -> str:
    """Format isolation and cost of each sandbox as Markdown."""
    rows = result["rows"]
    ways = "; ".join(row["strength"] for row in rows.values() if row["strength"])
    note = f"""
        Time from start to end of a program that prints its input: {result["runs"]} programs per sandbox, one at a time;
        programs/s: one program per core at once. Isolation: {ways}. {_environment(result)}."""
    return "\n".join([*sandbox_case.table(rows), "", _wrapped(note)])


def model_types(result: dict[str, Any]) -> str:
    """List exact and refused model types as Markdown."""
    rows = result["rows"]
    counts = Counter(row["outcome"] for row in rows)
    order = ("exact", "wrong", "refused", "not built")
    lines = ["; ".join(f"{counts[name]} {name}" for name in order if counts[name]) + f", of {len(rows)} types.", ""]
    lines += ["| type | outcome | layouts | sampling | largest error, nats |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (order.index(row["outcome"]), row["type"])):
        if row["outcome"] in ("exact", "wrong"):
            error = "-" if row["error"] is None else f"{row['error']:.0e}"
            cells = (row["type"], row["outcome"], row["layout"], row["sampling"], error)
        else:
            cells = (row["type"], f"{row['outcome']}: {row['why']}", "", "", "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _wrapped(f"{_environment(result)}.")])


def integrations(result: dict[str, Any]) -> str:
    """Format the loss-and-gradient comparison of TRL and ours as Markdown."""
    given = result["arguments"]
    lines = ["| loss and gradients | seconds | peak memory |", "|---|---|---|"]
    for row in result["rows"]:
        seconds = f"{row['median_seconds']:.1f}"
        if "least_seconds" in row:
            seconds += f" ({row['least_seconds']:.1f} to {row['largest_seconds']:.1f})"
        lines.append(f"| {row['method']} | {seconds} | {row['peak_bytes'] / 2**20:,.0f} MiB |")
    note = f"""
        {given["tokens"]} completion tokens, vocabulary {given["vocabulary"]}, hidden size {given["hidden"]},
        {given["layers"]} layers, float32, threads: {result["rows"][0]["threads"]}; median (smallest to largest) of
        {given["repeats"]} passes; one process per method,
        {"taking turns" if result.get("interleaved") else "one after the other"}; memory in addition to model and batch.
        {_environment(result)}."""
    return "\n".join([*lines, "", _wrapped(note)])


def trainer(result: dict[str, Any]) -> str:
    """Format the comparison of the training phase in TRL and ours as Markdown."""
    given, rows = result["arguments"], result["rows"]
    lines = [
        "| training phase | threads | seconds | completion tokens per second | peak memory | ours in comparison |",
        "|---|---|---|---|---|---|",
    ]
    compared = {
        (c["against"], c["threads"]): f"{c['speed']:.2f} x the speed, {c['memory']:.2f} x the memory"
        for c in result["comparisons"]
    }
    for row in rows:
        seconds = f"{row['median_seconds']:.2f} ({row['least_seconds']:.2f} to {row['largest_seconds']:.2f})"
        cells = [row["method"], row["threads"] or "GPU", seconds, f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{row['peak_bytes'] / 2**20:,.0f} MiB", compared.get((row["method"], row["threads"]), "")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    first = rows[0]
    note = f"""
        {given["updates"]} optimiser steps on
        {given["prompts"]} prompts x {given["completions"]} completions of {given["shortest"]} to {given["longest"]}
        tokens ({first["tokens"]:,} in all, {first["padded_tokens"]:,} with padding; lengths uniform on a logarithmic
        scale), weights of {first["weights"]}, {first["precision"]}; TRL with its defaults in micro-batches of
        {given["sequences"]} sequences, ours in micro-batches of as many tokens. Median (smallest to largest) of
        {first["turns"]} turns.
        {_environment(result)}."""
    return "\n".join([*lines, "", _wrapped(note)])


def end_to_end(result: dict[str, Any]) -> str:
    """Format whole steps of ours, of TRL and of PacedTrainer as Markdown."""
    given, first = result["arguments"], result["rows"][0]
    waited = ", ".join(f"{row['method']} {row['seconds']:.1f} s" for row in result["rows"])
    note = f"""
        {given["prompts"]} prompts ({result["prompt_tokens"]} tokens with each completion's) x {given["completions"]}
        completions of {given["tokens"]} tokens, {given["updates"]} optimiser steps, {given["model"]}, threads:
        {given["threads"]}. Seconds of the processor, median (smallest to largest) of {first["turns"]} steps that take
        turns; tokens are those of completions per second of the processor; memory above the imported libraries. By the
        clock, with whatever else the machine did: {waited}. {_environment(result)}."""
    return "\n".join([*whole_steps.table(result), "", _wrapped(note)])


def sampled(result: dict[str, Any]) -> str:
    """Format our sampling beside that of transformers as Markdown."""
    given = result["arguments"]
    note = f"""
        {given["prompts"]} prompts of {given["prompt_tokens"]} tokens x {given["completions"]} completions of
        {given["tokens"]} tokens, float32, threads: {given["threads"]}; seconds of the processor, median (smallest to
        largest) of {given["repeats"]} calls that alternate. {_environment(result)}."""
    return "\n".join([*sampling.table(result), "", _wrapped(note)])


def faults(result: dict[str, Any]) -> str:
    """Format the injected faults and their outcomes as Markdown."""
    found, processes = result["checkpoint"], result["processes"]
    kill, damage, planted = found["kill"], found["damage"], found["planted_code"]
    cuts, ablation = found["resume"]["cuts"], found["resume"]["ablation"]
    kinds = len({outcome["cell"].split("/")[0] for outcome in processes["outcomes"]})
    phases = len({outcome["cell"].split("/")[1] for outcome in processes["outcomes"]})
    slowest = ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in processes["slowest_seconds"].items())
    lines = [
        "| injected fault | times | result |",
        "|---|---|---|",
        f"| process killed, {kill['kills_inside_a_save']} times during a save | {kill['kills']} | "
        f"{len(kill['wrong'])} of {kill['acknowledged']} acknowledged checkpoints lost |",
        f"| checkpoint damaged: {', '.join(damage['by_kind'])} | {damage['damages']} | "
        f"{len(damage['wrong'])} loaded silently |",
        f"| code planted in a checkpoint file | {planted['slots']} | ran {planted['code_ran']} times |",
        f"| run killed and resumed | {cuts['cut_points']} | "
        f"{len(cuts['wrong'])} differ from an uninterrupted run in any bit |",
        f"| part of the state left out on resume | {ablation['pieces']} | {len(ablation['wrong'])} not noticed, "
        f"{len(ablation['idle'])} without effect on the run |",
        f"| one of two ranks fails: {kinds} faults in {phases} phases | {processes['cells']} | "
        f"{processes['recovered_equal_and_clean']} recover bit-equal and leave nothing behind |",
    ]
    note = f"""Longest time from a fault to the end of the run: {slowest}. The whole matrix takes
        {result["seconds"]:.0f} s.
        {_environment(result)}."""
    return "\n".join([*lines, "", _wrapped(note)])


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), width=120, break_long_words=False, break_on_hyphens=False)


def comparison(found: dict[str, list[Row]]) -> str:
    """Format the short comparison of the algorithms, with the learning curves of the first suite that has a picture."""
    text, path = table.short(found), pictures.first(found)
    return text if path is None else f"{text}\n\n![learning curves]({path.relative_to(ROOT).as_posix()})"


@dataclass(frozen=True)
class Section:
    """Part of a README that is generated from the result of a case."""

    case: str
    """Case of `benchmarks.run` that measures it."""
    make: Callable[[dict[str, Any]], str]
    """Function from the result to Markdown."""
    file: str = ""
    """Name of the committed result; empty = name of the case."""

    @property
    def path(self) -> Path:
        """Path of the committed result."""
        return RESULTS / (self.file or f"{self.case}.json")

    @property
    def module(self) -> str:
        """Module whose code makes the section stale when it changes."""
        return f"benchmarks.{run.CASES[self.case][0]}"

    def commits(self) -> list[str]:
        """Commits at which it was measured; none while there is no result."""
        return [json.loads(self.path.read_text())["environment"]["commit"]] if self.path.is_file() else []

    def text(self) -> str | None:
        """Markdown of the section; None while there is no result."""
        return self.make(json.loads(self.path.read_text())) if self.path.is_file() else None


SECTIONS: dict[str, Section | RunFiles] = {
    "sample_efficiency": RunFiles(suites.NAMES, comparison),
    **{f"sample_efficiency_{name}": RunFiles((name,), sections.suite_table) for name in suites.NAMES},
    "tiny": Section("train_tiny", train_run),
    "kernels": Section("trajectory_balance", kernels),
    "logprobs": Section("logprobs", kernels),
    "peaked": Section("peaked", peaked_policies),
    "compile": Section("compile", compiled),
    "weight_sync": Section("weight_sync", weight_sync),
    "math_rewards": Section("math_rewards", math_rewards),
    "sandbox": Section("sandbox", sandbox),
    "model_types": Section("model_types", model_types),
    "integrations": Section("integrations", integrations),
    "trainer": Section("trainer", trainer),
    "trainer_longer": Section("trainer", trainer, "trainer_longer.json"),
    "end_to_end": Section("end_to_end", end_to_end),
    "sampling": Section("sampling", sampled),
    "faults": Section("faults", faults),
}
"""Sections by the name in their marks."""


def render(text: str) -> str:
    """Return `text` with every generated section replaced."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = text.partition(begin)
        made = section.text() if found else None
        if made is not None:
            text = f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"
    return text


def stale_lines() -> list[str]:
    """Return a line for each section whose code has changed since its measurement, or whose commit is unknown."""
    lines = []
    for name, section in SECTIONS.items():
        for commit in section.commits():
            changed = stale.changed_since(commit, section.module)
            if changed is None:
                lines.append(f"{name}: measured at {commit}, which is not in this clone")
            elif changed:
                shown = ", ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")
                lines.append(f"{name}: files changed since {commit}: {len(changed)}: {shown}")
    return lines


def main() -> None:
    """Entry point; exit status 1 if `--check` finds an outdated README."""
    unknown = set(sys.argv[1:]) - {"--check", "--stale"}
    if unknown:
        sys.stderr.write(f"error: unknown option {min(unknown)!r}: the options are --check and --stale\n")
        raise SystemExit(2)
    if "--stale" in sys.argv:
        print("\n".join(stale_lines()) or "every table was measured with the present code")
        return
    if "--check" not in sys.argv:
        pictures.draw_all()
    is_current = True
    for path in READMES:
        old = path.read_text()
        new = render(old)
        is_current = is_current and old == new
        if "--check" not in sys.argv:
            path.write_text(new)
    if "--check" in sys.argv:
        raise SystemExit(not is_current)


if __name__ == "__main__":
    main()
