"""Nothing on the way of a step turns a tensor into a Python number: on a GPU each of those would make the host wait.

`tests/gpu` proves the same with torch's own debug mode and by capturing a graph. Here the operators that torch runs are
looked at, on a CPU; `tolist` is not among them, and `test_repo_rules.py` looks for its name instead.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

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
