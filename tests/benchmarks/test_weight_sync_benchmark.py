"""The benchmark of weight synchronisation: its tables, and the committed result they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.training import weight_sync

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "weight_sync.json"


def test_the_case_is_known() -> None:
    assert run.CASES["weight_sync"] == ("training.weight_sync", ())


def test_tables_show_megabytes_and_seconds() -> None:
    row = {
        "bytes": 2e6,
        "median_seconds": 0.25,
        "resident_bytes": 3e6,
        "peak_bytes": 5e6,
        "largest_difference": 2e-5,
        "weights_bytes": 1.5e6,
    }
    lines = weight_sync.table({"push": row}).splitlines()
    assert lines[1].split() == ["push", "2.0", "0.2500", "3.0", "5.0", "2.0e-05"]
    assert "one copy of the weights: 1.5 MB" in lines[2]
    done = {"name": "shared", "seed": 1, "generate": 0.5, "train": 1.5, "sync": 0.001, "reward": 0.25}
    done["accuracy_after"] = 0.3
    assert weight_sync.run_table([done]).splitlines()[1].split() == [
        "shared",
        "1",
        "0.500",
        "1.500",
        "0.0010",
        "0.250",
        "0.300",
    ]


def test_the_committed_result_holds_one_copy_where_weights_are_shared() -> None:
    if not RESULT.is_file():
        pytest.skip("benchmarks/results/weight_sync.json is not there")
    modes = json.loads(RESULT.read_text())["modes"]
    shared, pushed = modes["shared"], modes["push"]
    assert shared["bytes"] == 0
    assert pushed["bytes"] == pushed["weights_bytes"]
    saved = pushed["resident_bytes"] - shared["resident_bytes"]
    assert saved == pytest.approx(shared["weights_bytes"], rel=0.05), "a second copy is the whole difference"
    for row in modes.values():
        assert row["largest_difference"] < 1e-3
