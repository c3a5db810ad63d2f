"""Nothing on the way of a step turns a tensor into a Python number: on a GPU each of those would make the host wait.

`tests/gpu` proves the same with torch's own debug mode and by capturing a graph. Here the operators that torch runs are
looked at, on a CPU; `tolist` is not among them, and `test_repo_rules.py` looks for its name instead.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_policy
import torch
from torch.profiler import ProfilerActivity, profile

from paced_fast.config import ReplayConfig, SchedulerConfig
from paced_fast.replay import ReplayBuffer
from paced_fast.scheduler import PromptScheduler
from paced_kernels import PriorityTree, _checks, _fused, linear_logprobs, segment_sum, trajectory_balance_loss

# A value on the host, or a shape that only a value can tell.
WAITING = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}


def waiting_operators(function: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    names = {event.name for event in profiler.events()}
    assert len(names) > 5
    return names & WAITING


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
    values, priority = torch.rand(10), torch.rand(6)

    def operations() -> None:
        ring.insert(batch, priority, priority)
        ring.choose(values, 2)

    operations()
    assert ring.inserted == 4
    assert waiting_operators(operations) == set()


def test_the_scheduler_weighs_draws_and_observes_without_waiting() -> None:
    device = torch.device("cpu")
    for rule in ("tree", "history"):
        scheduler = PromptScheduler(50, SchedulerConfig(rule=rule, warmup_steps=0), seed=0, device=device)
        values = torch.rand(50)

        def operations(scheduler: PromptScheduler = scheduler, values: torch.Tensor = values) -> None:
            index = scheduler.draw(8, 3, values)
            scheduler.observe(index, values[index])

        assert waiting_operators(operations) == set()


@pytest.mark.parametrize("has_weights", [False, True])
def test_the_loss_never_waits(has_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With offsets that the host must not read and without the checks of values, which are asynchronous on a GPU."""
    monkeypatch.setattr(_checks, "check_value", lambda *_: None)
    monkeypatch.setattr(_checks, "check_token_values", lambda *_: None)
    monkeypatch.setattr(_fused, "plan_groups", unread_offsets)
    monkeypatch.setattr("paced_kernels._ops.plan_groups", unread_offsets)
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


def unread_offsets(cu_seqlens: torch.Tensor, num_rows: int, rows_per_chunk: int) -> list[_fused.Group]:
    """The plan for offsets on a device: one group."""
    del rows_per_chunk
    return [_fused.Group(slice(0, cu_seqlens.shape[0] - 1), slice(0, num_rows))]
