"""Nothing on the way of a step turns a tensor into a Python number: on a GPU each of those would make the host wait.

`tests/gpu` proves the same with torch's own debug mode and by capturing a graph. Here the operators that torch runs are
looked at, on a CPU; `tolist` is not among them, and `test_repo_rules.py` looks for its name instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_policy
import tiny_run
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from paced_fast.config import LogZConfig, ReplayConfig, SchedulerConfig
from paced_fast.config.resolve import resolve_log_z
from paced_fast.data import packing
from paced_fast.paced import update
from paced_fast.paced.log_z import LogZ
from paced_fast.paced.replay import ReplayBuffer
from paced_fast.paced.scheduler import PromptScheduler
from paced_fast.policy import micro_batches
from paced_kernels import PriorityTree, _checks, linear_logprobs, segment_sum, trajectory_balance_loss
from paced_kernels._loss import fused_pass, torch_rows

# A value on the host, or a shape that only a value can tell.
WAITING = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees take the operators of a device: on the host they are compiled."""
    made = PriorityTree.__init__

    def init(tree: PriorityTree, *args: Any, **options: Any) -> None:
        made(tree, *args, **{"backend": "reference"} | options)

    monkeypatch.setattr(PriorityTree, "__init__", init)


def waiting_operators(function: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    events = profiler.events()
    assert len({event.name for event in events}) > 5
    return {event.name for event in events if event.name in WAITING and not inside_optimizer(event)}


def inside_optimizer(event: Any) -> bool:
    """On a CPU the fused step reads its learning rate, which is on the host; on a GPU it takes the address."""
    while event is not None:
        if event.name == "aten::_fused_adamw_":
            return True
        event = event.cpu_parent
    return False


def test_the_tree_never_waits() -> None:
    tree = PriorityTree(500, seed=0)
    weights, idx = torch.rand(500), torch.randint(0, 500, (40,))
    start = torch.tensor(490)

    def operations() -> None:
        tree.rebuild(weights)
        tree.update(idx, weights[:40])
        tree.write_range(start, weights[:40])
        for mode in ("systematic", "stratified", "iid"):
            tree.sample(16, mode)
        for method in ("first", "race"):
            tree.sample_distinct(16, method)
        tree.check()
        tree.total()

    assert waiting_operators(operations) == set()
    # What would be found: a number, a condition, a shape that depends on values.
    for broken in (lambda: int(tree.total()), lambda: 1 if tree.check() else 0, lambda: tree.leaf[tree.leaf > 0]):
        assert waiting_operators(lambda broken=broken: [tree.sample(4), broken()])


def test_replay_inserts_and_chooses_without_waiting() -> None:
    config = ReplayConfig(capacity=16, insert_per_step=8, draw_per_step=4, max_age=4)
    ring = ReplayBuffer(config, max_completion_tokens=6, seed=0, device=torch.device("cpu"))
    batch = tiny_policy.rollouts([3, 5, 1, 2, 4, 1], rewards=[1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    values, accuracy = torch.rand(10), torch.rand(6)

    def operations() -> None:
        ring.insert(batch, values, accuracy)
        ring.choose(len(values), torch.tensor(2))

    operations()
    assert ring.inserted == 4
    assert waiting_operators(operations) == set()


def test_the_scheduler_weighs_draws_and_observes_without_waiting() -> None:
    device = torch.device("cpu")
    for rule in ("tree", "greedy", "mopps", "history", "uniform"):
        config = SchedulerConfig(rule=rule, warmup_steps=0, max_visits=2)
        scheduler = PromptScheduler(50, config, seed=0, device=device)
        values, step = torch.rand(50), torch.tensor(3)

        def operations(scheduler: PromptScheduler = scheduler, values: Tensor = values, step: Tensor = step) -> None:
            index = scheduler.draw(8, step, values)
            scheduler.observe(index, values[index], torch.full((8,), 4))
            scheduler.draw(70, step, values)

        assert waiting_operators(operations) == set()


def test_the_head_scores_and_fits_without_waiting() -> None:
    settings = resolve_log_z(LogZConfig(scored_per_step=20), remembers=True)
    head = LogZ(torch.randn(50, 8), settings, seed=0, bounded=True)
    index, target = torch.arange(12), torch.rand(12)

    def operations() -> None:
        head.score()
        head.rescore(index)
        head.observe(index, target, target, target)
        head.fit(index, target, groups=3)

    assert waiting_operators(operations) == set()


class HostWatch(TorchFunctionMode):
    """Stands for a device: notes calls of torch's Python interface that would make the host wait for one.

    Numbers asked of a tensor, shapes that depend on values, and tensors made of Python numbers. What C++ asks for by
    itself it cannot see; `waiting_operators` does. `pause` marks the crossings, where the host may do as it likes.
    """

    NUMBERS: ClassVar = {
        *("item", "tolist", "cpu", "numpy", "equal", "allclose", "is_nonzero"),
        *("__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "__format__"),
    }
    SHAPES: ClassVar = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"}
    COPIES: ClassVar = {"tensor", "as_tensor", "from_numpy", "pin_memory", "new_tensor"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0
        self.paused = 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if not self.paused:
            self.calls += 1
            if name in self.NUMBERS | self.SHAPES | self.COPIES:
                self.found.append(name)
            if name in ("__getitem__", "__setitem__") and self.depends_on_host(args[1]):
                self.found.append(f"{name} by a list or a mask")
            given = kwargs or {}
            if name == "repeat_interleave" and isinstance(args[1], Tensor) and "output_size" not in given:
                self.found.append("repeat_interleave without output_size")
            if name == "where" and len(args) == 1 and not given:
                self.found.append("where of one argument")
        return func(*args, **(kwargs or {}))

    @staticmethod
    def depends_on_host(index: Any) -> bool:
        parts = index if isinstance(index, tuple) else (index,)
        return any(
            isinstance(p, list)
            or (isinstance(p, Tensor) and p.dtype in (torch.bool, torch.uint8))
            or (isinstance(p, slice) and any(isinstance(end, Tensor) for end in (p.start, p.stop, p.step)))
            for p in parts
        )


def test_the_watch_sees_what_would_wait() -> None:
    x = torch.arange(4.0)
    seeded: list[Callable[[], object]] = [
        lambda: float(x[0]),
        lambda: x.tolist(),
        lambda: bool(x.sum() > 1),
        lambda: x.max().item(),
        lambda: x[x > 1],
        lambda: x[[0, 2]],
        lambda: x.nonzero(),
        lambda: torch.tensor([1.0]),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: 1 if x.sum() else 0,
        lambda: x.repeat_interleave(torch.ones(4, dtype=torch.int64)),
        lambda: torch.equal(x, x),
        lambda: torch.allclose(x, x),
        lambda: 1.0 in x,
        lambda: f"{x.sum():.3f}",
        lambda: torch.where(x > 1),
        lambda: x[: torch.ones((), dtype=torch.int64)],
        lambda: x.new_tensor([1.0]),
    ]
    for call in seeded:
        with HostWatch() as watch:
            call()
        assert watch.found, call
    with HostWatch() as watch:
        x[torch.tensor(0) if False else 0] + x.sum()
        with watch.pause():
            x.tolist()
    assert not watch.found
    assert watch.calls


@pytest.mark.parametrize("algorithm", ["paced", "tb_group", "flowrl", "grpo"])
def test_a_whole_step_meets_the_host_at_its_crossings_only(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but generation, rewards and the crossings runs under the watch; offsets of the loss are the host's."""
    monkeypatch.setattr(_checks, "check_value", lambda *_: None)  # asynchronous on a GPU
    monkeypatch.setattr(_checks, "check_token_values", lambda *_: None)
    settings = tiny_run.config(tiny_run.write_rewards(tmp_path), algorithm, mismatch__mode="token_mask")
    stepper = tiny_run.build(settings, tmp_path / "run").stepper
    trainer = stepper.trainer
    watch = HostWatch()
    crossings: list[str] = []

    def allow(owner: Any, name: str, counts: bool = False) -> None:
        original = getattr(owner, name)

        def allowed(*args: Any, **options: Any) -> Any:
            if counts:
                crossings.append(name)
            with watch.pause():
                return original(*args, **options)

        monkeypatch.setattr(owner, name, allowed)

    for module in ("paced.trainer", "run.record.step_figures"):
        allow(importlib.import_module(f"paced_fast.{module}"), "to_host", counts=True)
    for module in ("paced.collect", "data.packing", "policy.micro_batches", "paced.replay", "paced.update"):
        allow(importlib.import_module(f"paced_fast.{module}"), "to_device")
    allow(trainer.collector.generator, "generate")
    allow(trainer.collector.scorer, "score")
    allow(importlib.import_module("paced_fast.run.checkpoint"), "random_state")  # of generators on the host
    # Lengths and plans are the host's own; so are the offsets that the loss is given.
    for owner, name in ((micro_batches, "_layout"), (packing, "token_positions"), (packing, "cu_seqlens")):
        allow(owner, name)
    allow(importlib.import_module("paced_kernels._loss.operators"), "plan_groups")
    allow(update, "_minibatches")
    for _ in range(4):
        stepper.step()
        crossings.clear()
        with watch:
            record = stepper.step().record
        assert crossings == ["to_host", "to_host"], "D1 and D3"
    assert record.trained_sequences > 16 or algorithm != "paced"
    assert watch.calls > 1000
    assert watch.found == []


@pytest.mark.parametrize("has_weights", [False, True])
def test_the_loss_never_waits(has_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With offsets that the host must not read and without the checks of values, which are asynchronous on a GPU."""
    monkeypatch.setattr(_checks, "check_value", lambda *_: None)
    monkeypatch.setattr(_checks, "check_token_values", lambda *_: None)
    monkeypatch.setattr(fused_pass, "plan_groups", unread_offsets)
    monkeypatch.setattr("paced_kernels._loss.operators.plan_groups", unread_offsets)
    monkeypatch.setattr(torch_rows, "_is_known_true", lambda values: False)  # as of values on a device
    hidden = torch.randn(30, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    log_z = torch.zeros(3, requires_grad=True)
    token_ids, offsets = torch.randint(0, 50, (30,)), torch.tensor([0, 10, 10, 30])

    def step() -> None:
        out = trajectory_balance_loss(
            hidden,
            weight,
            token_ids,
            offsets,
            rewards=torch.ones(3),
            log_z=log_z,
            beta=0.1,
            ref_logprobs=torch.zeros(30),
            weights=torch.ones(3) if has_weights else None,
            behavior_logprobs=torch.zeros(30),
            importance_cap=2.0,
            return_entropy=True,
            workspace_bytes=50 * 4 * 12,
        )
        out.loss.backward()
        logprobs = linear_logprobs(hidden, weight, token_ids)
        segment_sum(logprobs, offsets).sum().backward()

    assert waiting_operators(step) == set()


def unread_offsets(cu_seqlens: torch.Tensor, num_rows: int, rows_per_chunk: int) -> list[fused_pass.SequenceGroup]:
    """The plan for offsets on a device: one group."""
    del rows_per_chunk
    return [fused_pass.SequenceGroup(slice(0, cu_seqlens.shape[0] - 1), slice(0, num_rows))]
