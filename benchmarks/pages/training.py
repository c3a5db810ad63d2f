"""Sections on runs, steps and other trainers, as Markdown, from the results of their cases."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.words import environment_line, wrapped
from benchmarks.training import sampling, whole_steps


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
        error of {summary["value_ece"]:.3f} ({environment_line(result)})."""
    return wrapped(text)


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
        weights), and memory of trainer and engine together, less that of an idle process. `load_weights` is called
        once per parameter, as in TRL. After the updates the log-probs of both sides differ by up to
        {max(row["largest_difference"] for row in result["modes"].values()):.1e}.
        {environment_line(result)}."""
    runs = ["| run of `tiny` | seed | generate s | train s | sync s | reward, last steps | accuracy after |"]
    runs.append("|---|---|---|---|---|---|---|")
    for row in result.get("runs", ()):
        seconds = " | ".join(f"{row[key]:.3f}" for key in ("generate", "train", "sync"))
        name = f"{row['name']} | {row['seed']}"
        runs.append(f"| {name} | {seconds} | {row['reward']:.3f} | {row['accuracy_after']:.3f} |")
    return "\n".join([*lines, "", wrapped(note), *(["", *runs] if result.get("runs") else [])])


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
        {environment_line(result)}."""
    return "\n".join([*lines, "", wrapped(note)])


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
        {environment_line(result)}."""
    return "\n".join([*lines, "", wrapped(note)])


def end_to_end(result: dict[str, Any]) -> str:
    """Format whole steps of ours, of TRL and of PacedTrainer as Markdown."""
    given, first = result["arguments"], result["rows"][0]
    waited = ", ".join(f"{row['method']} {row['seconds']:.1f} s" for row in result["rows"])
    note = f"""
        {given["prompts"]} prompts ({result["prompt_tokens"]} tokens with each completion's) x {given["completions"]}
        completions of {given["tokens"]} tokens, {given["updates"]} optimiser steps, {given["model"]}, threads:
        {given["threads"]}. Seconds of the processor, median (smallest to largest) of {first["turns"]} steps that take
        turns; tokens are those of completions per second of the processor; memory above the imported libraries. By the
        clock, with whatever else the machine did: {waited}. {environment_line(result)}."""
    return "\n".join([*whole_steps.table(result), "", wrapped(note)])


def sampled(result: dict[str, Any]) -> str:
    """Format our sampling beside that of transformers as Markdown."""
    given = result["arguments"]
    note = f"""
        {given["prompts"]} prompts of {given["prompt_tokens"]} tokens x {given["completions"]} completions of
        {given["tokens"]} tokens, float32, threads: {given["threads"]}; seconds of the processor, median (smallest to
        largest) of {given["repeats"]} calls that alternate. {environment_line(result)}."""
    return "\n".join([*sampling.table(result), "", wrapped(note)])
