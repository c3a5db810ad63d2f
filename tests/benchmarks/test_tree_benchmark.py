"""The benchmark of the priority tree: its columns see broken samplers, what is missing is named, losses are printed.

N = leaves, B = elements of a call.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import run, timing
from benchmarks.tree import measure as priority_tree
from benchmarks.tree import quality, report
from benchmarks.tree import timing as tree_timing
from benchmarks.tree.peers import MODES, FlatScan, Multinomial, Ours, Peer, TorchrlSampler, TorchrlTree, peer_makers
from paced_fast.errors import InputError
from paced_kernels._grid import is_interpreted
from paced_kernels._tree import host

CPU = torch.device("cpu")
SMALL = {"num_draws": 6000, "num_updates": 4, "repeats": 3}


class Honest(FlatScan):
    """The int64 scan, which the broken ones below are made of."""

    def __init__(self, capacity: int = 400) -> None:
        super().__init__(capacity, CPU, 0, torch.int64)


class DrawsWeightless(Honest):
    """A search that stops one leaf early once in a hundred draws."""

    def sample(self, num_draws: int, mode: str) -> Tensor:
        idx = super().sample(num_draws, mode)
        idx[::100] = self.capacity - 1
        return idx


class DrawsOutside(Honest):
    """Indices of the leaf behind the last one."""

    def sample(self, num_draws: int, mode: str) -> Tensor:
        idx = super().sample(num_draws, mode)
        idx[0] = self.capacity
        return idx


class Drifts(Honest):
    """A float32 sum that is kept by differences."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = torch.zeros((), dtype=torch.float32)

    def rebuild(self, w: Tensor) -> None:
        super().rebuild(w)
        self.sum = w.sum()

    def update(self, idx: Tensor, w: Tensor) -> None:
        for i, value in zip(idx.tolist(), w, strict=True):
            self.sum = self.sum + (value - (self.weights[i] / 2**27).float())
            self.weights[i] = (value.double() * 2**27).round().long()

    def total(self) -> float:
        return self.sum.item()


class FirstWriterWins(Honest):
    """Duplicates in the wrong order."""

    def update(self, idx: Tensor, w: Tensor) -> None:
        super().update(idx.flip(0), w.flip(0))


class Unrepeatable(Honest):
    """Different draws in every run."""

    runs = 0

    def sample(self, num_draws: int, mode: str) -> Tensor:
        Unrepeatable.runs += 1
        return super().sample(num_draws, mode).roll(Unrepeatable.runs)


def examine(make: Callable[[], Peer]) -> dict:
    return quality.examine(make, **SMALL)


def test_an_exact_sampler_has_nothing_to_answer_for() -> None:
    found = examine(Honest)
    assert set(found["zero_draws"].values()) == set(found["outside"].values()) == {0}
    assert set(found["zero_draws"]) == set(MODES)
    assert (found["drift"], found["residue"]) == (0.0, 0.0)
    assert max(found["frequency_error"].values()) < 1.5 * found["chance"] < 1.0
    assert found["last_writer_wins"]
    assert found["distinct_results"] == 1


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_our_trees_have_nothing_to_answer_for(backend: str) -> None:
    if backend == "triton" and not is_interpreted():
        pytest.skip("runs kernels in Triton's interpreter")
    found = quality.examine(lambda: Ours(40, CPU, 0, backend), num_draws=300, num_updates=2, repeats=2)
    assert set(found["zero_draws"].values()) == set(found["outside"].values()) == {0}
    assert (found["drift"], found["residue"], found["last_writer_wins"]) == (0.0, 0.0, True)
    assert found["distinct_results"] == 1


def test_draws_of_weight_zero_are_counted() -> None:
    assert examine(DrawsWeightless)["zero_draws"] == dict.fromkeys(MODES, 60)
    found = report.quality_cells({"name": "x", **examine(DrawsWeightless)})
    assert found[1] == "60 of 6000"


def test_draws_outside_are_counted_apart() -> None:
    found = examine(DrawsOutside)
    assert found["outside"] == dict.fromkeys(MODES, 1)
    assert set(found["zero_draws"].values()) == {0}
    assert report.quality_cells({"name": "x", **found})[1] == "0 of 6000, 1 outside"


def test_drift_shows_and_what_it_leaves() -> None:
    found = examine(Drifts)
    assert found["drift"] > 1e-9
    assert found["residue"] > 1e-9
    assert report.quality_cells({"name": "x", **found})[3] == f"{found['drift']:.1e}"
    assert report.quality_cells({"name": "x", **found | {"drift": 0.0}})[3] == "0"
    assert report.quality_cells({"name": "x", **found | {"drift": None}})[3] == "hidden"


def test_wrong_frequencies_show() -> None:
    heavy = quality.known_weights(400, 0)[1]

    class Twice(Honest):
        """One heavy leaf gets the draws of another as well."""

        def sample(self, num_draws: int, mode: str) -> Tensor:
            idx = super().sample(num_draws, mode)
            return torch.where(idx == heavy[1], heavy[0], idx)

    errors = examine(Twice)["frequency_error"]
    assert all(value == pytest.approx(1.0, abs=0.35) for value in errors.values())


def test_the_order_of_duplicates_and_changing_bits_show() -> None:
    assert not examine(FirstWriterWins)["last_writer_wins"]
    found = examine(Unrepeatable)
    assert found["distinct_results"] == 3
    assert report.quality_cells({"name": "x", **found})[-1] == "NO, 3 in 3"


# What is missing


def test_what_cannot_run_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchrl._torchrl", None)
    monkeypatch.setattr(host, "IS_BUILT", False)
    given = priority_tree.Arguments(device="cpu", repetitions=2, exclude=("numpy",), operations=("update random",))
    cell = priority_tree.Measurement(given).cell(100, 8, True, lambda _: None)
    rows = {row["name"]: row for row in cell["rows"]}
    assert "torchrl" in rows["TorchRL tree, CPU"]["reason"]
    assert "torchrl" in rows["TorchRL sampler, CPU"]["reason"]
    assert rows["numpy"]["reason"] == "excluded from this run"
    assert rows["ours"]["reason"] == "the package was built without a C compiler"
    skipped = {name for name, row in rows.items() if row["status"] == "skipped"}
    assert skipped == {"ours", "numpy", "TorchRL tree, CPU", "TorchRL sampler, CPU"}
    text = report.cell_text(cell)
    assert all(f"skipped {name}: {rows[name]['reason']}" in text for name in skipped)
    assert rows["ours, flat rescan"]["operations"]["update random"]["wall"]["repetitions"] == 2


class FakeExtension:
    """Stands in for TorchRL's extension: a flat array with its names."""

    class SumSegmentTreeFp32:
        def __init__(self, capacity: int) -> None:
            self.values = torch.zeros(capacity)

        def __setitem__(self, idx: Tensor, value: Tensor) -> None:
            self.values[idx] = value

        def __getitem__(self, idx: Tensor) -> Tensor:
            return self.values[idx]

        def query(self, start: int, stop: int) -> float:
            return self.values[start:stop].sum().item()

        def scan_lower_bound(self, mass: Tensor) -> Tensor:
            return torch.searchsorted(self.values.cumsum(0), mass, right=True)


def test_torchrl_is_driven_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Samplers:
        class PrioritizedSampler:
            def __init__(self, capacity: int, alpha: float, beta: float) -> None:
                assert (alpha, beta) == (1.0, 1.0)
                self._sum_tree = FakeExtension.SumSegmentTreeFp32(capacity)

            def update_priority(self, idx: Tensor, w: Tensor) -> None:
                self._sum_tree[idx] = w

            def sample(self, storage: object, num: int) -> tuple[Tensor, dict]:
                assert len(storage) == 400  # type: ignore[arg-type]
                return self._sum_tree.scan_lower_bound(torch.rand(num) * self._sum_tree.query(0, 400)), {}

    real = importlib.import_module
    modules = {"torchrl._torchrl": FakeExtension, "torchrl.data.replay_buffers.samplers": Samplers}
    monkeypatch.setattr(importlib, "import_module", lambda name: modules.get(name) or real(name))
    for cls in (TorchrlTree, TorchrlSampler):
        found = examine(lambda cls=cls: cls(400, CPU, 0, CPU))
        assert set(found["zero_draws"].values()) == {0}
        assert found["last_writer_wins"]
        assert set(found["zero_draws"]) == set(cls.modes)


def test_a_peer_that_fails_has_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Honest):
        def update(self, idx: Tensor, w: Tensor) -> None:
            raise RuntimeError("no updates today")

    def no_set_up(*_: object) -> Peer:
        raise KeyError("set-up")

    def makers(_: torch.device) -> dict:
        made = peer_makers(CPU)
        return {name: made[name] for name in ("ours, flat rescan", "torch.multinomial")} | {
            "broken": lambda capacity, *_: Broken(capacity),
            "unmade": no_set_up,
        }

    monkeypatch.setattr(priority_tree, "peer_makers", makers)
    given = priority_tree.Arguments(device="cpu", repetitions=2, operations=("pair", "stratified"))
    cell = priority_tree.Measurement(given).cell(100, 8, True, lambda _: None)
    text = report.cell_text(cell)
    assert "failed: RuntimeError: no updates today" in text
    assert "failed: KeyError: 'set-up'" in text
    assert "skipped torch.multinomial: has no such draw" in text
    rows = {row["name"]: row for row in cell["rows"]}
    assert "wall" in rows["broken"]["operations"]["sample stratified"]
    assert set(priority_tree.Measurement(given).quality(100)["rows"][-1]) == {"name", "failed"}


def test_multinomial_ends_at_2_to_the_24() -> None:
    with pytest.raises(RuntimeError, match="2\\^24"):
        Multinomial(2**24 + 1, CPU, 0, torch.float32).sample(1, "iid")


# Times and reports


def _row(name: str, **times: float) -> dict:
    entry = {measure: {"median_ms": ms, "p10_ms": ms, "p90_ms": ms, "repetitions": 3} for measure, ms in times.items()}
    ours = name.startswith("ours")
    return {"name": name, "ours": ours, "status": "ok", "reason": "", "operations": {"pair": entry}}


def _cell(*rows: dict) -> dict:
    return {"name": "N10-B2", "capacity": 10, "batch": 2, "partial": False, "rows": list(rows)}


def test_a_loss_is_printed_as_one() -> None:
    cell = _cell(_row("ours", graph=0.004, wall=0.03), _row("fast", wall=0.01), _row("slow", graph=0.008, wall=0.04))
    text = report.cell_text(cell)
    assert "N10-B2 pair, wall: LOSS, ours 0.33 x the speed of fast" in text
    assert "N10-B2 pair, graph: win, ours 2.00 x the speed of slow" in text
    summary = report.summary_text({"cells": [cell], "not_reached": ["N7-B1"], "limits": []})
    assert "1 of 2 comparisons with the fastest peer won" in summary
    assert summary.count("LOSS") == 1
    assert "not reached: N7-B1" in summary


def test_our_rescan_stands_in_where_the_kernels_do_not_run_and_never_for_a_peer() -> None:
    cell = _cell({**_row("ours"), "status": "skipped"}, _row("ours, flat rescan", wall=2.0), _row("peer", wall=1.0))
    assert report.comparison(cell, "pair", "wall") == (0.5, "peer", "ours, flat rescan")
    cell = _cell(_row("ours", wall=2.0), _row("ours, flat rescan", wall=1.0))
    assert report.comparison(cell, "pair", "wall") is None


def test_each_call_does_what_its_name_says() -> None:
    inputs = priority_tree.make_inputs(64, 32, CPU, 0)
    assert len(inputs.duplicates[0].unique()) <= 2
    peer = Ours(64, CPU, 0, "reference")
    calls = {name: priority_tree.call_of(name, peer, inputs, 32) for name in priority_tree.OPERATIONS}
    calls["rebuild"](1)
    torch.testing.assert_close(peer.leaves().float(), inputs.weights[1])
    calls["update contiguous"](2)
    at = (inputs.starts[2] + torch.arange(32)) % 64
    torch.testing.assert_close(peer.leaves()[at].float(), inputs.values[2])
    steps = peer.tree.step.item()
    assert [len(calls[name](0)) for name in ("pair", "distinct", "sample iid")] == [32, 32, 32]
    assert peer.tree.step.item() == steps + 3
    assert priority_tree.call_of("update contiguous", peer, priority_tree.make_inputs(64, 65, CPU, 0), 65) == (
        "needs more leaves"
    )
    assert priority_tree.call_of("distinct", peer, inputs, 33) == "needs more leaves"
    assert len(calls["rebuild and draw"](0)) == 32
    torch.testing.assert_close(peer.leaves().float(), inputs.weights[0])
    assert peer.tree.step.item() == steps + 4
    calls["rebuild from values"](1)
    wanted = torch.exp(-50 * (inputs.estimates[1] - 0.5).square())
    torch.testing.assert_close(peer.leaves().float(), wanted, rtol=1e-5, atol=2.0**-27)
    assert len(calls["schedule"](2).unique()) == 32
    torch.testing.assert_close(
        peer.leaves().float(), torch.exp(-50 * (inputs.estimates[2] - 0.5).square()), rtol=1e-5, atol=2.0**-27
    )


def test_a_peer_schedules_by_the_same_mixture() -> None:
    inputs = priority_tree.make_inputs(64, 8, CPU, 0)
    kept: list[torch.Tensor] = []

    class Recorder(Peer):
        has_distinct = True

        def rebuild(self, w: torch.Tensor) -> None:
            kept.append(w)

        def sample_distinct(self, num_draws: int) -> torch.Tensor:
            return torch.arange(num_draws)

    call = priority_tree.call_of("schedule", Recorder(64, CPU, 0), inputs, 8)
    assert not isinstance(call, str)
    call(0)
    bell = torch.exp(-50 * (inputs.estimates[0] - 0.5).square())
    wanted = 0.9 * bell / bell.sum() + 0.1 / 64
    torch.testing.assert_close(kept[0] / kept[0].sum(), wanted)


def test_cells_are_read_and_those_of_one_size_stay_together() -> None:
    given = priority_tree.Arguments(cells=("N10-B2", "N30-B4", "N10-B8"))
    assert priority_tree.plan(given) == [(10, 2), (10, 8), (30, 4)]
    every = priority_tree.plan(priority_tree.Arguments())
    assert [sum(n == capacity for n, _ in every) for capacity in (10**4, 10**5, 10**6, 10**7)] == [4, 4, 4, 2]
    with pytest.raises(InputError, match="--cells '1000': write a cell like N1000000-B1024"):
        priority_tree.plan(priority_tree.Arguments(cells=("1000",)))


def test_host_time_ends_when_the_call_returns_and_wall_time_when_the_device_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(tree_timing.time, "perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += 0.002

    for cls, expected in ((tree_timing.HostClock, 2.0), (tree_timing.WallClock, 7.0)):
        clock = cls(CPU)
        monkeypatch.setattr(clock, "synchronize", lambda: now.__setitem__(0, now[0] + 0.005))
        assert clock.time_ms(work) == pytest.approx(expected)
    assert issubclass(tree_timing.GraphClock, timing.Clock)


def test_a_run_from_the_command_line_can_be_resumed(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tree.json"
    words = ["--json", str(path), "--device", "cpu", "--quick", "--cells", "N100-B8", "N100-B16", "--only", "rescan"]
    words += ["cumsum", "--operations", "pair", "rebuild", "--draws", "100", "--progress", str(tmp_path / "now")]
    run.main(["priority_tree", *words, "--seconds", "1e-9"])
    kept = json.loads(path.read_text())
    assert kept["not_reached"] == ["N100-B8", "N100-B16", "N100 draws"]
    run.main(["priority_tree", *words])
    kept = json.loads(path.read_text())
    assert [cell["name"] for cell in kept["cells"]] == ["N100-B8", "N100-B16"]
    assert [list(cell["rows"][0]["operations"]) for cell in kept["cells"]] == [
        ["pair", "rebuild", "rebuild from values", "rebuild and draw"],
        ["pair"],
    ]
    assert len(kept["quality"][0]["rows"]) == 4
    assert (tmp_path / "now").read_text() == "torch.cumsum int64 (N100, draws)"
    capsys.readouterr()
    kept["cells"][0]["seconds"] = 7.5
    path.write_text(json.dumps(kept))
    run.main(["priority_tree", *words, "--resume"])
    assert json.loads(path.read_text())["cells"][0]["seconds"] == 7.5
    assert "N100-B8 pair, wall:" in capsys.readouterr().out
