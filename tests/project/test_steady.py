"""Helpers of tests: waits say when they met their limit, limits hold for the best try, kept results are found again."""

from __future__ import annotations

from pathlib import Path

import kept
import pytest
from steady import takes_less, wait_for


def test_a_wait_ends_with_its_event_and_says_when_it_met_its_limit() -> None:
    left = [False, False, True]
    wait_for(lambda: left.pop(0))
    assert left == []
    with pytest.raises(AssertionError, match=r"limit of time met: not so after 0\.02 s"):
        wait_for(lambda: False, 0.02)


def test_a_limit_holds_for_the_best_of_a_few_tries() -> None:
    now, costs = [0.0], [5.0, 3.0, 0.5, 9.0]

    def work() -> None:
        now[0] += costs.pop(0)

    assert takes_less(1.0, work, lambda: now[0])
    assert costs == [9.0]
    costs = [2.0, 1.0, 1.5]
    assert not takes_less(1.0, work, lambda: now[0], tries=3)


def test_a_kept_result_is_found_again_when_a_source_or_the_choice_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    kernel, test = tmp_path / "kernel.py", tmp_path / "test.py"
    kernel.write_text("a")
    test.write_text("b")
    monkeypatch.setattr(kept, "KERNELS", [kernel])
    versions = {"torch": "1", "triton": "1"}
    monkeypatch.setattr(kept.metadata, "version", versions.__getitem__)
    found: list[int] = []

    def find() -> list[int]:
        found.append(len(found))
        return list(found)

    for times in range(2):
        assert kept.kept("x", [test], "all", find) == [0], times
    assert kept.kept("x", [test], "some", find) == [0, 1]
    kernel.write_text("c")
    assert kept.kept("x", [test], "some", find) == [0, 1, 2]
    test.write_text("d")
    assert kept.kept("x", [test], "some", find) == [0, 1, 2, 3]
    versions["triton"] = "2"
    assert kept.kept("x", [test], "some", find) == [0, 1, 2, 3, 4]
    assert kept.kept("x", [test], "some", find) == [0, 1, 2, 3, 4]
