"""The plan of a visit to a GPU: its parts, their time, and what was predicted of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu_visit
from benchmarks.loss import our_engines, precompile
from benchmarks.loss.problems import Shape, make_batch, make_weight, toy_of
from benchmarks.visit import parts, predictions, processes
from paced_fast.errors import InputError


@pytest.mark.parametrize("visit", ["a", "b"])
def test_a_visit_takes_no_longer_than_it_may(visit: str) -> None:
    """If every part takes all it may, each still gets its least, and the end comes in time to pack."""
    left = started = 60 * parts.MINUTES[visit] - processes.GRACE_S
    for at, part in enumerate(parts.VISITS[visit]):
        limit = parts.limit_of(part, parts.VISITS[visit][at + 1 :], left)
        assert limit >= part.least > processes.GRACE_S or part.least == 0 < limit
        left -= limit
    assert 0 <= left < started
    assert parts.MINUTES == {"a": 6.0, "b": 5.0}


def test_parts_and_shapes_are_those_that_were_asked_for() -> None:
    a, b = (parts.parts_of(visit) for visit in ("a", "b"))
    assert [part.name for part in a] == ["machine", "precompile", "smoke", "counters", "sweep"]
    assert [part.name for part in b] == [
        *("precompile", "tests", "trajectory_balance", "logprobs", "priority_tree", "trainer"),
    ]
    sweep, table = a[-1].options, b[2].options
    assert sweep[sweep.index("--shapes") + 1] == "T8192-H1536-V151936"
    at = table.index("--shapes") + 1
    assert table[at : at + 4] == (
        *("T8192-H1536-V151936", "T16384-H4096-V151936", "T8192-H2048-V151936", "T8192-H896-V151936"),
    )
    assert b[2].exclude == ("ours, backend reference",)
    only = parts.parts_of("b", only=("ours",))
    assert [part.name for part in only if part.options[-2:] == ("--only", "ours")] == [
        *("trajectory_balance", "logprobs", "priority_tree"),
    ]


def test_heads_that_are_compiled_for_the_smoke_test_exist() -> None:
    names = [job.name for job in precompile.jobs()]
    assert set(parts.SMOKE_HEADS) <= set(names)
    assert len(parts.SMOKE_HEADS) == 4


def test_a_stage_that_only_a_name_takes_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = toy_of(Shape.parse("T8192-H1536-V151936"))
    batch = make_batch(shape, make_weight(shape, torch.device("cpu"), torch.float32, 0), "peaked", 1)
    table = our_engines.sweep_configs(batch)
    shipped = next(iter(table.values()))
    assert our_engines.stages(batch) == {"table": (shipped, "triton"), "stage 1": (None, "triton")}
    monkeypatch.setattr(our_engines, "sweep_configs", lambda batch: table | {"stage 3, ping-pong": "third"})
    assert our_engines.stages(batch)["stage 3"] == ("third", "pingpong")


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    for given, message in (
        (gpu_visit.Arguments(parts=("tets",), rehearse=True), "--parts 'tets': the parts of visit a are machine, pre"),
        (gpu_visit.Arguments(visit="c", rehearse=True), "--visit 'c': the visits are a and b"),
        (gpu_visit.Arguments(packages="/nowhere", rehearse=True), "--packages /nowhere: there is no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            gpu_visit.measure(given, tmp_path / "x.json")
    with pytest.raises(InputError, match="gpu_visit has no folder for its results: give --out DIR"):
        gpu_visit.default_path(gpu_visit.Arguments())


# The predictions


def test_formulas_give_the_numbers_that_were_written_down() -> None:
    """Within what rounding and the waves of the library's kernel at H 1536 leave."""
    computed = [made for made in predictions.PREDICTIONS if made.computed is not None]
    assert len(computed) == 5 * 8 + 3 + 2 + 4 * 2
    for made in computed:
        assert made.computed == pytest.approx(made.value, rel=0.065), made.name
    assert all(made.formula and made.value for made in predictions.PREDICTIONS)
    names = [made.name for made in predictions.PREDICTIONS]
    assert len(names) == len(set(names))


def test_sums_of_predictions_add_up() -> None:
    for size, stated in predictions.STATED.items():
        whole = stated.logits + stated.hidden + stated.weight + stated.other
        assert whole == pytest.approx(stated.total, abs=0.16)
        thv = 8192 * size * 151936
        assert 6e-9 * thv / stated.total == pytest.approx(stated.tflops, rel=0.007)
        assert 2e-9 * thv / stated.logits == pytest.approx(stated.logits_tflops, rel=0.007)
    for (project, _, _), (theirs, ours, ratio) in predictions.THEIRS.items():
        assert theirs / ours == pytest.approx(ratio, abs=0.02), project


def test_what_was_not_measured_is_said_so(tmp_path: Path) -> None:
    rows = predictions.compared(tmp_path, "b")
    assert {row["measured"] for row in rows} == {None}
    assert predictions.text(rows).count("not measured") == len(rows)


def test_toy_shapes_differ_where_those_that_they_stand_for_do() -> None:
    names = {name for given in parts.SHAPES.values() for name in given}
    names |= {f"T8192-H{size}-V151936" for size in predictions.STATED} | {name for _, name, _ in predictions.THEIRS}
    assert len({toy_of(Shape.parse(name)).name for name in names}) == len(names)
