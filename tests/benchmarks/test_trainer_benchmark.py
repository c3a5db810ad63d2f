"""The benchmark of the training phase: fixed rollouts, processes that take turns, figures that add up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import options, run
from benchmarks.pages import training
from benchmarks.training import integrations, phase_beside_trl
from benchmarks.turns import Process
from benchmarks.visit import parts
from paced_fast.errors import InputError

GIVEN = phase_beside_trl.Arguments(model="toy", prompts=2, completions=4, sequences=4, repeats=1, threads=("1",))


def test_rollouts_come_from_the_seed_and_spread_evenly_on_a_logarithmic_scale() -> None:
    many = phase_beside_trl.Arguments(prompts=60, completions=20, shortest=16, longest=128)
    batch = phase_beside_trl.record(many, 1000)
    assert batch == phase_beside_trl.record(many, 1000)
    lengths = [len(ids) for ids in batch.completions]
    assert 16 <= min(lengths) < 18
    assert 120 < max(lengths) <= 128
    # Half of them are shorter than the geometric mean of 16 and 128; of a plain uniform spread a quarter would be.
    share = sum(length < math.sqrt(16 * 128) for length in lengths) / len(lengths)
    assert share == pytest.approx(0.5, abs=0.05)
    assert all(batch.prompts[i] == batch.prompts[i - i % 20] for i in range(len(lengths)))


def test_batches_that_make_no_whole_steps_are_refused(tmp_path: Path) -> None:
    wrong = phase_beside_trl.Arguments(prompts=3, completions=4, sequences=8)
    with pytest.raises(InputError, match=r"--prompts x --completions is 12, not a multiple of .* --updates 2"):
        phase_beside_trl.measure(wrong, tmp_path / "x.json")
    with pytest.raises(InputError, match="'tlr' is unknown"):
        phase_beside_trl.measure(phase_beside_trl.Arguments(methods=("tlr",)), tmp_path / "x.json")


def test_ours_is_compared_at_equal_threads() -> None:
    def row(method: str, threads: int, seconds: float, memory: int) -> dict:
        return {"method": method, "threads": threads, "median_seconds": seconds, "peak_bytes": memory}

    rows = [
        row("paced_fast", 1, 2.0, 30),
        row("trl", 1, 5.0, 40),
        row("paced_fast", 2, 1.0, 30),
        row("trl", 2, 4.0, 60),
    ]
    assert phase_beside_trl.compare(rows) == [
        {"against": "trl", "threads": 1, "speed": 2.5, "memory": 0.75},
        {"against": "trl", "threads": 2, "speed": 4.0, "memory": 0.5},
    ]


@pytest.mark.slow
def test_a_process_that_dies_says_why() -> None:
    with pytest.raises(InputError, match=r"nobody: .*KeyError: 'nobody'"):
        Process("nobody", "benchmarks.training.phase_beside_trl", ["nobody", "{}"])


@pytest.mark.slow
def test_both_trainers_make_their_updates_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="needs trl: pip install -e '.[trl]'")
    path = tmp_path / "trainer.json"
    words = ["--model", "toy", "--prompts", "2", "--completions", "4", "--sequences", "4", "--repeats", "1"]
    words += ["--threads", "1", "--device", "cpu", "--methods", "paced_fast", "trl"]
    run.main(["trainer", "--json", str(path), *words])
    result = json.loads(path.read_text())
    ours, theirs = result["rows"]
    assert (ours["method"], theirs["method"]) == ("paced_fast", "trl")
    lengths = [len(ids) for ids in phase_beside_trl.record(GIVEN, 64).completions]
    for row in result["rows"]:
        assert row["tokens"] == sum(lengths)
        assert row["padded_tokens"] == 8 * max(lengths)
        assert row["updates"] == 2
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["median_seconds"])
        assert row["peak_bytes"] > 0
        assert row["weights"] == "drawn"
    assert result["environment"]["commit"] in training.trainer(result)
    assert result["comparisons"][0]["speed"] == pytest.approx(theirs["median_seconds"] / ours["median_seconds"])
    assert "trl" in capsys.readouterr().out


def test_the_table_says_what_was_measured() -> None:
    row = {
        "method": "paced_fast",
        "threads": 1,
        "turns": 3,
        "median_seconds": 2.0,
        "least_seconds": 1.9,
        "largest_seconds": 2.2,
        "tokens_per_second": 500.0,
        "peak_bytes": 2**30,
        "tokens": 1000,
        "padded_tokens": 2000,
        "weights": "SmolLM2-135M-Instruct",
        "precision": "float32",
    }
    rows = [row, {**row, "method": "trl", "median_seconds": 5.0, "peak_bytes": 2**31}]
    where = {"date": "d", "commit": "c", "cpu": "x", "cores": 2, "versions": {"torch": "2", "transformers": "5"}}
    result = {
        "arguments": vars_of(GIVEN),
        "rows": rows,
        "comparisons": phase_beside_trl.compare(rows),
        "environment": where,
    }
    text = " ".join(training.trainer(result).split())
    assert "| paced_fast | 1 | 2.00 (1.90 to 2.20) | 500 | 1,024 MiB | |" in text
    assert "| trl | 1 | 5.00 (1.90 to 2.20) | 500 | 2,048 MiB | 2.50 x the speed, 0.50 x the memory |" in text
    assert "1,000 in all, 2,000 with padding" in text


def vars_of(arguments: phase_beside_trl.Arguments) -> dict:
    return json.loads(json.dumps(phase_beside_trl.asdict(arguments)))


def test_a_visit_to_a_gpu_measures_the_trainer_too() -> None:
    *_, trainer = parts.parts_of("b")
    assert (trainer.name, trainer.case) == ("trainer", "trainer")
    options.parse(phase_beside_trl.Arguments, [*trainer.options, "--device", "cuda"], "trainer")
    *_, rehearsed = parts.parts_of("b", rehearse=True)
    assert rehearsed.options[:2] == ("--model", "toy")


def test_the_losses_take_turns_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="multiple of 8"):
        integrations.measure(integrations.Arguments(tokens=12), tmp_path / "x.json")
