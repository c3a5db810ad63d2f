"""The shares of a step's phases on steps made up by hand."""

from __future__ import annotations

import pytest

from benchmarks.training import share_of_phases


def test_shares_are_of_each_steps_own_total() -> None:
    steps = [{"generate": 9.0, "head": 1.0}, {"generate": 1.0, "replay": 1.0}, {"generate": 96.0, "schedule": 4.0}]
    result = share_of_phases.summarise(steps)
    assert result["phases"]["generate"]["median_share"] == pytest.approx(0.9)
    assert result["phases"]["head"]["median_seconds"] == 0.0
    assert result["phases"]["head"]["largest_share"] == pytest.approx(0.1)
    assert result["median_step_seconds"] == 10.0
    assert result["paced_share"] == pytest.approx(0.1)
    assert result["largest_paced_share"] == pytest.approx(0.5)
    assert "schedule + replay + head: 10.00% of a step (median), 50.00% at most" in share_of_phases.table(result)


def test_skipping_every_step_is_refused() -> None:
    with pytest.raises(share_of_phases.InputError, match="--skip is 3 and --steps is 3: give fewer to skip"):
        share_of_phases.measure(share_of_phases.Arguments(steps=3, skip=3), None)
