"""What a person sees of a run while it goes on: lines, the live line, waits, samples, the settings that differ."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType

from paced_fast import train
from paced_fast.config import flatten
from paced_fast.config.presets import preset
from paced_fast.config.presets.changed import changed_settings
from paced_fast.run.record import terminal
from paced_fast.run.record.progress import Progress, Waiting, cut_middle, printable, sample_lines
from paced_fast.run.record.summary import summarise


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _progress(num_steps: int, clock: Clock, **options: Any) -> Progress:
    return Progress(num_steps, console=Console(file=io.StringIO()), clock=clock, interval_s=5.0, **options)


def test_progress_without_a_terminal_logs_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO, "paced_fast"), _progress(10, clock) as progress:
        for step in range(1, 11):
            clock.now += 2
            record: dict[str, object] = {"step": step, "reward_mean": 0.5, "mixed_group_share": 0.25}
            progress.update(record | ({"eval": {"accuracy": 0.125 * step}} if step == 3 else {}))
    steps = [message.split(",")[0] for message in caplog.messages]
    assert steps == ["step 1/10", "step 3/10", "step 6/10", "step 9/10", "step 10/10"]
    assert caplog.messages[1] == "step 3/10, reward 0.500, accuracy 0.375, mixed groups 25%, eta 0:00:14"


def test_a_slice_that_falls_is_a_warning_once_also_after_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    first = {"accuracy": 0.75, "prompt_slices": ["easy"] * 40 + ["hard"] * 40, "prompt_accuracy": [1.0, 0.5] * 40}
    fallen = {"accuracy": 0.5, "prompt_accuracy": [0.5, 0.0] * 20 + [1.0, 0.5] * 20}
    nearly = {"accuracy": 0.74, "prompt_accuracy": [0.0, 0.5] + [1.0, 0.5] * 39}  # within the noise, and not back
    words = "forgetting: slice easy fell from 75.0% to 25.0% (-50.0 to -50.0 points) since the first evaluation; lower"
    for before in ((), (first,)):
        caplog.clear()
        with _progress(9, Clock(), evaluations=before) as progress:
            for step, evaluation in enumerate((first, fallen, nearly, fallen, first, nearly, fallen)):
                if not (before and step == 0):
                    progress.update({"step": step, "eval": evaluation})
        warned = [message for message in caplog.messages if "forgetting" in message]
        assert [message.split(",")[0] for message in warned] == ["step 1", "step 6"]
        assert words in warned[0]
        assert "hard" not in warned[0]
    caplog.clear()
    with _progress(9, Clock(), evaluations=(first, fallen)) as progress:
        progress.update({"step": 3, "eval": fallen})
    assert not [message for message in caplog.messages if "forgetting" in message], "it was told before the resume"


def test_a_slow_run_logs_each_step_and_a_resumed_one_knows_its_pace(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO, "paced_fast"), _progress(104, clock, start_step=100) as progress:
        for step in (101, 102):
            clock.now += 30
            progress.update(
                {"step": step, "value_brier": 0.1, "value_rank_correlation": None, "tokens_per_second": 1e4}
            )
    assert [m.rsplit("eta ", 1)[1] for m in caplog.messages] == ["0:01:30", "0:01:00"]
    assert caplog.messages[1].startswith("step 102/104, value brier 0.100, 10,000 tokens/s")


def test_progress_on_a_terminal_draws_the_last_record_and_logs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "paced_fast")
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Progress(4, console=console, clock=Clock()) as progress:
        progress.update({"status": "warm start 3/9"})
        progress.update({"step": 0, "eval": {"accuracy": 0.1}})
        progress.update({"step": 2, "reward_mean": 0.75, "eval": {"accuracy": 0.2}})
    assert caplog.messages == []
    assert "step 2/4" in out.getvalue()
    assert "reward 0.750  accuracy 0.200 (first 0.100)" in out.getvalue()


def test_the_time_left_is_that_of_ordinary_steps_and_of_the_evaluations_so_far() -> None:
    clock = Clock()
    with _progress(20, clock) as progress:
        for step in range(1, 11):
            clock.now += 2 if step != 7 else 500  # the machine slept
            record: dict[str, object] = {"step": step}
            if step % 5 == 0:
                clock.now += 10
                record["eval"] = {"accuracy": 0.5}
            progress.update(record)
    # Ten steps of 2 s, and two evaluations of 10 s as in the first ten.
    assert progress.line().endswith("eta 0:00:40")


def test_a_slow_step_tells_its_phases(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO, "paced_fast"), _progress(3, clock) as progress:
        progress.phase("generate")
        clock.now += 10
        progress.phase("head")
        progress.phase("reward")
        clock.now += 30
        progress.phase("update")
        clock.now += 5
        progress.update({"step": 1})
    assert caplog.messages == ["step 1/3, updating the policy, 0:00:40 into the step", "step 1/3, eta 0:01:30"]


def _terminal(width: int = 120) -> tuple[io.StringIO, Console]:
    out = io.StringIO()
    return out, Console(file=out, force_terminal=True, width=width, _environ={"TERM": "xterm"})


def test_the_live_line_shows_the_phase_beside_its_time_in_the_last_step() -> None:
    clock = Clock()
    out, console = _terminal()
    with Progress(4, console=console, clock=clock) as progress:
        clock.now += 60
        progress.update({"step": 1, "seconds": {"generate": 40.0, "update": 0.2}})
        progress.phase("generate")
        clock.now += 12
        console.print(progress._render())
        progress.phase("update")
        assert progress._under_way() == "updating the policy 0:00:00"
    assert "generating 0:00:12 of about 0:00:40" in out.getvalue()
    assert "eta 0:02:48" in out.getvalue(), "three steps of a minute, of which 12 s have passed"


def test_a_resumed_run_shows_its_own_first_accuracy() -> None:
    with _progress(9, Clock(), start_step=4, evaluations=[{"accuracy": 0.192}, {"accuracy": 0.3}]) as progress:
        progress.update({"step": 5, "eval": {"accuracy": 0.31}})
    assert "accuracy 0.310 (first 0.192)" in progress.line()


def test_a_wait_tells_how_far_it_is_and_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO, "paced_fast"), Waiting(Console(file=io.StringIO()), clock=clock) as waiting:
        for step in range(1, 9):
            clock.now += 4
            waiting.update(f"warm start: step {step} of 8", step, 8)
    assert caplog.messages == [
        "warm start: step 4 of 8, 0:00:12 left",
        "warm start: step 7 of 8, 0:00:03 left",
        "warm start: step 8 of 8, done after 0:00:28",
    ]


def test_a_wait_on_a_terminal_draws_and_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    out, console = _terminal()
    with caplog.at_level(logging.INFO, "paced_fast"), Waiting(console, clock=clock) as waiting:
        waiting.update("warm start: step 1 of 4", 1, 4)
        clock.now += 5
        waiting.update("warm start: step 2 of 4", 2, 4)
        console.print(waiting._render())
    assert caplog.messages == []
    assert "warm start: step 2 of 4" in out.getvalue()
    assert "0:00:05 left" in out.getvalue()


def test_a_sample_is_three_lines_without_control_characters() -> None:
    row = {
        "step": 25,
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1=?"}],
        "completion": "a\n\x1b[31mred \u202e " + "x" * 200 + " so the answer is 2",
        "reward": 1.0,
        "value": 0.625,
        "slice": "k2",
    }
    lines = sample_lines(row, 80)
    assert lines[0] == "sample of step 25: reward 1, estimated accuracy 0.62, slice k2"
    assert lines[1] == "  prompt      1+1=?"
    assert lines[2].startswith("  completion  a\\n\\x1b[31mred \\u202e xx")
    assert lines[2].endswith(" so the answer is 2")
    assert [cell_len(line) <= 80 for line in lines] == [True] * 3
    assert sample_lines({"prompt": "p", "completion": "c", "reward": None, "value": None}, 80) == [
        "sample of step ?: no reward",
        "  prompt      p",
        "  completion  c",
    ]


@given(st.text(), st.integers(1, 40))
def test_what_is_cut_fits_and_prints(text: str, width: int) -> None:
    shown = printable(text)
    assert shown.isprintable() or not shown
    assert cell_len(cut_middle(shown, width)) <= width
    if cell_len(shown) <= width:
        assert cut_middle(shown, width) == shown


def _text(table: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_settings_of_an_own_model_are_told_too() -> None:
    """`own` is no preset with a task, and a run that begins there changes settings all the same."""
    config = preset("own")
    config = dataclasses.replace(config, generation=dataclasses.replace(config.generation, prompts_per_step=2))
    changed, _ = changed_settings(flatten(config))
    assert changed == {"generation.prompts_per_step": (16, 2)}


def test_the_table_of_settings_holds_what_differs_from_the_preset() -> None:
    # Where a run is kept and whether it goes on are no differences between it and its preset.
    config = dataclasses.replace(preset("tiny"), steps=7, run_dir="elsewhere", resume="auto", seed=5)
    changed, decided = changed_settings(flatten(config))
    assert changed == {"steps": (150, 7), "seed": (0, 5)}
    assert decided == {}
    shown = _text(terminal.settings_table(changed, preset="tiny")).splitlines()
    assert [line.split() for line in shown if "steps" in line or "seed" in line] == [
        ["steps", "7", "150"],
        ["seed", "5", "0"],
    ]
    assert len(shown) < 8
    assert "none" in _text(terminal.settings_table({}, preset="tiny"))
    assert changed_settings({"preset": "of another version"}) == ({}, {})


def test_a_run_says_what_it_does_and_shows_a_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = io.StringIO()
    settings = tiny_run.config(
        tiny_run.write_rewards(tmp_path),
        steps=4,
        warm_start__first__steps=2,
        run__show_sample_every=2,
        run_dir=str(tmp_path / "run"),
    )
    caplog.set_level(logging.INFO, "paced_fast")
    train.run(settings, Console(file=out, width=100))
    place = _places(caplog.messages)
    order = [
        place("reading and tokenizing"),
        place("40 prompts to train on, 12 held out"),
        place("loading the model tiny"),
        place("warm start: step 2 of 2, phase 1, loss"),
        place("embedding 52 prompts"),
        place("evaluating the policy before training: 12 prompts, 2 completions each"),
        place("step 4/4"),
    ]
    assert order == sorted(order)
    shown = out.getvalue()
    assert "sample of step 2: reward" in shown
    assert "sample of step 4: reward" in shown
    assert "sample of step 3" not in shown
    assert "optimizer.learning_rate" in shown, "a setting that differs"
    assert "optimizer.eps" not in shown
    caplog.clear()
    train.run(dataclasses.replace(settings, steps=6, resume="auto"), tiny_run.quiet())
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["eval"]["accuracy"]
    assert any(f"(first {first:.3f})" in message for message in caplog.messages), "the run's own first accuracy"


def _places(messages: list[str]) -> Callable[[str], int]:
    def place(text: str) -> int:
        (found, *_) = [i for i, message in enumerate(messages) if text in message]
        return found

    return place


def test_the_summary_names_the_slices_that_fell(tmp_path: Path) -> None:
    names = ["trivial"] * 9
    lines = [
        {"step": 0, "eval": {"accuracy": 0.9, "prompt_accuracy": [0.9] * 9, "prompt_slices": names}},
        {"step": 1, "mixed_group_share": 0.5, "eval": {"accuracy": 0.5, "prompt_accuracy": [0.5] * 9}},
    ]
    for line in lines:
        line |= {"rollouts": 0, "train_seconds": 0.0}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (fall,) = summarise(tmp_path, preset("tiny"))["forgetting"]
    assert fall["slice"] == "trivial"
    assert (fall["before"], fall["after"]) == pytest.approx((0.9, 0.5))
    assert fall["high"] < 0
