"""Stage 3 among the measured methods and in the sweep: there where it can run, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.loss import methods, our_engines
from benchmarks.loss.problems import TOY_SHAPE, make_batch, make_weight
from paced_kernels import _backend
from paced_kernels._loss import engine

CPU = torch.device("cpu")
NAME = "stage 3, ping-pong"


def toy_batch() -> Any:
    return make_batch(TOY_SHAPE, make_weight(TOY_SHAPE, CPU, torch.bfloat16, 0), "peaked", 1)


def test_it_is_neither_measured_nor_swept_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not our_engines.has_pingpong(CPU, torch.bfloat16)
    monkeypatch.setattr(_backend, "HAS_CUTLASS", True)
    assert not our_engines.has_pingpong(CPU, torch.bfloat16)  # still no GPU
    assert NAME not in our_engines.sweep_configs(toy_batch())
    assert all("stage 3" not in method.name for method in methods.our_methods("logprobs", CPU, torch.bfloat16))


def test_where_it_can_run_it_is_measured_at_every_shape_by_its_own_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(our_engines, "has_pingpong", lambda *_: True)
    for case in ("trajectory_balance", "logprobs"):
        (found,) = (m for m in methods.our_methods(case, CPU, torch.bfloat16) if m.name == "ours, stage 3")
        assert not found.first_only
        assert found.ours

    asked: list[str] = []
    monkeypatch.setattr(our_engines, "resolve_backend", lambda name, _: name)
    monkeypatch.setattr(engine, "make_engine", lambda *arguments: asked.append(arguments[-1]))
    batch = toy_batch()
    config = our_engines.sweep_configs(batch)[NAME]
    assert [our_engines.stage_of(each) for each in (config, None)] == [3, 1]
    with our_engines.planned(config):
        our_engines.make_engine(batch, {"backend": "triton"})
    our_engines.make_engine(batch, {"backend": "triton"})
    assert asked == ["pingpong", "triton"]
