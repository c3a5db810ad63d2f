"""The benchmark of whole steps: equal prompts and lengths for all, phases that add up, the right rows compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.pages import training
from benchmarks.training import phase_clock, whole_steps
from benchmarks.training.whole_step_methods import CHECKPOINTED, OURS, PACED, TRL
from paced_fast.errors import InputError


def test_prompts_are_of_the_seed_and_no_two_are_alike() -> None:
    many = whole_steps.Arguments(prompts=50)
    found = whole_steps.prompts(many)
    assert found == whole_steps.prompts(many)
    assert len(found) == 50
    assert found != whole_steps.prompts(whole_steps.Arguments(prompts=50, seed=1))
    for text, answer in found.items():
        terms = text.removeprefix("Add the numbers ").partition(" step")[0].split(", ")
        assert sum(map(int, terms)) == int(answer)


def test_wrong_sizes_and_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--prompts x --completions is 12, not a multiple of .* --updates 2"):
        whole_steps.measure(whole_steps.Arguments(prompts=3), tmp_path / "x.json")
    with pytest.raises(InputError, match="'tlr' is unknown"):
        whole_steps.measure(whole_steps.Arguments(methods=("tlr",)), tmp_path / "x.json")
    with pytest.raises(InputError, match="give smollm2 or toy"):
        whole_steps.measure(whole_steps.Arguments(model="gpt"), tmp_path / "x.json")


def test_a_phase_inside_another_stops_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([(0.0, 0.0), (1.0, 0.5), (1.0, 0.5), (4.0, 2.0), (4.0, 2.0), (9.0, 3.0), (9.0, 3.0), (11.0, 4.0)])
    peaks = iter([100, 300, 200, 50, 70])
    clock = phase_clock.PhaseClock(torch.device("cpu"))
    monkeypatch.setattr(clock, "_now", lambda: next(marks, (11.0, 4.0)))
    monkeypatch.setattr(clock, "_peak", lambda: next(peaks))
    clock.begin("update")
    with clock.phase("other"), clock.phase("generate"):
        assert clock.current == "generate"
    found = clock.take()
    assert found["other"] == {"seconds": 3.0 + 2.0, "cpu_seconds": 1.5 + 1.0, "peak_bytes": 300}
    assert found["generate"] == {"seconds": 5.0, "cpu_seconds": 1.0, "peak_bytes": 200}
    assert found["update"] == {"seconds": 1.0, "cpu_seconds": 0.5, "peak_bytes": 100}


def turn(cpu: float, *, peak: int = 10) -> dict:
    phases = {
        "generate": {"seconds": 2 * cpu, "cpu_seconds": cpu, "peak_bytes": peak},
        "update": {"seconds": 6.0, "cpu_seconds": 3.0, "peak_bytes": 2 * peak},
        "head": {"seconds": 1.0, "cpu_seconds": 0.5, "peak_bytes": 1},
        "schedule": {"seconds": 1.0, "cpu_seconds": 0.25, "peak_bytes": 2},
    }
    return {"seconds": 2 * cpu + 8, "cpu_seconds": cpu + 3.75, "phases": phases, "completion_tokens": 64, "updates": 2}


def test_rows_hold_medians_and_other_takes_the_rest() -> None:
    row = whole_steps.row("paced_fast", [turn(1.0), turn(5.0, peak=30), turn(2.0)])
    assert (row["cpu_seconds"], row["least_cpu_seconds"], row["largest_cpu_seconds"]) == (5.75, 4.75, 8.75)
    assert row["phases"]["generate"]["cpu_seconds"] == 2.0
    assert row["phases"]["other"] == {"cpu_seconds": 0.75, "seconds": 2.0, "peak_bytes": 2}
    assert row["phases"]["old_logprobs"]["seconds"] == 0.0
    assert (row["training_cpu_seconds"], row["peak_bytes"]) == (3.0, 60)
    assert row["tokens_per_cpu_second"] == pytest.approx(64 / 5.75)


def test_paced_trainer_is_compared_with_the_trainer_of_its_settings() -> None:
    def row(method: str, seconds: float, training: float, memory: int) -> dict:
        times = {"seconds": seconds, "cpu_seconds": seconds, "training_seconds": training}
        return {"method": method, **times, "training_cpu_seconds": training, "peak_bytes": memory}

    rows = [
        row(OURS, 4.0, 2.0, 10),
        row(TRL, 8.0, 6.0, 40),
        row(PACED, 6.0, 4.0, 20),
        row(TRL + CHECKPOINTED, 9, 8, 30),
    ]
    found = {(one["method"], one["against"]): one for one in whole_steps.compare(rows)}
    assert set(found) == {(OURS, TRL), (OURS, PACED), (OURS, TRL + CHECKPOINTED), (PACED, TRL)}
    assert found[OURS, TRL]["step"] == 2.0
    assert found[PACED, TRL]["training"] == 1.5
    assert found[PACED, TRL]["memory"] == 0.5


@pytest.mark.slow
@pytest.mark.process
def test_whole_steps_of_a_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="needs trl: pip install -e '.[trl]'")
    path = tmp_path / "end_to_end.json"
    words = ["--model", "toy", "--tokens", "6", "--repeats", "1", "--device", "cpu", "--methods", OURS, TRL, PACED]
    run.main(["end_to_end", "--json", str(path), *words])
    result = json.loads(path.read_text())
    assert [row["method"] for row in result["rows"]] == [OURS, TRL, PACED]
    for row in result["rows"]:
        assert row["completion_tokens"] == 4 * 4 * 6  # none ended before
        assert row["updates"] == 2
        assert sum(row["phases"][name]["cpu_seconds"] for name in whole_steps.PHASES) == pytest.approx(
            row["cpu_seconds"], rel=0.2, abs=0.02
        )
        for name in ("generate", "old_logprobs", "update"):
            assert row["phases"][name]["cpu_seconds"] > 0, (row["method"], name)
    # A prompt is a character a token, and is repeated for each of its four completions.
    texts = whole_steps.prompts(whole_steps.Arguments())
    assert result["prompt_tokens"] == 4 * sum(map(len, texts))
    text = training.end_to_end(result)
    assert result["environment"]["commit"] in text
    assert text.count("|") > 30
    assert f"against {TRL}" in text
    assert "processor seconds" in capsys.readouterr().out
