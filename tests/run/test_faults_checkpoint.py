"""Kills, damage, forgotten state, planted code, counted: a few of each in `make test`, all of them in `make faults`."""

from __future__ import annotations

import pytest

from benchmarks.faults import checkpoint, resume


@pytest.mark.slow
def test_a_few_kills_and_damages() -> None:
    found = checkpoint.measure_kills(5, seed=1)
    assert (found["kills"], found["kills_of_two_ranks"], found["wrong"]) == (5, 1, [])
    assert found["kills_inside_a_save"] > 0
    found = checkpoint.measure_damage(48, seed=1)
    assert found["wrong"] == []
    assert set(found["by_kind"].values()) == {8}


def test_pieces_of_state_are_told_apart() -> None:
    piece = resume.piece_of
    assert piece("optimizer.3.exp_avg_sq") == "optimizer.exp_avg_sq"
    assert piece("log_z.head.mlp.0.weight") == "log_z.head.mlp"
    assert piece("log_z.head.cursor") == "log_z.head.cursor"
    assert piece("log_z.optimizer.3.step") == "log_z.optimizer.step"
    assert piece("scheduler.tree.weights") == "scheduler.tree"
    assert piece("replay.inserted") == "replay.inserted"


@pytest.mark.faults
def test_all_faults_counted() -> None:
    figures = checkpoint.measure()
    kill, damage, planted = figures["kill"], figures["damage"], figures["planted_code"]
    cuts, ablation = figures["resume"]["cuts"], figures["resume"]["ablation"]
    assert kill["kills"] >= 100
    assert kill["kills_inside_a_save"] > 50
    assert kill["kills_of_two_ranks"] >= 20
    assert kill["acknowledged"] > 50
    assert kill["wrong"] == []
    assert damage["damages"] >= 200
    assert damage["wrong"] == []
    assert planted["code_ran"] == 0
    assert (cuts["cut_points"], cuts["wrong"]) == (5, [])
    assert ablation["pieces"] > 30
    assert ablation["wrong"] == [], "state that a resumed run may forget without becoming another one"
