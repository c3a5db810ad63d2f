"""`PacedTrainer` makes the updates of our own trainer when FSDP or ZeRO split its model over processes.

The processes are gloo's on a CPU, and FSDP and DeepSpeed are the real ones; `tiny_trl_sharded` says what stands in for
a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs trl: pip install -e '.[trl]'")

import tiny_trl_sharded
from trl_beside_ours import assert_same, launch, our_parameters

pytestmark = [pytest.mark.slow, pytest.mark.process]

SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
FSDP2: dict[str, Any] = {**SPLIT, "sharding": {"version": 2}}
FSDP1: dict[str, Any] = {**SPLIT, "sharding": {"version": 1, "sync_module_states": False}}
ALONE = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "Linear"]}

# By their names: the runs whose updates are those of our trainer, which are all that need no more than rollouts.
FSDP_RUNS: dict[str, dict[str, Any]] = {
    "fsdp2": FSDP2,
    "fsdp2, log-probs": {**FSDP2, "fused": False},
    "fsdp2, tied": {**FSDP2, "is_tied": True},
    "fsdp2, tied, log-probs": {**FSDP2, "is_tied": True, "fused": False},
    "fsdp2, head alone": {**FSDP2, "sharding": ALONE},  # not one unit with the norm, whose call would bring it
    "fsdp1": FSDP1,  # the head belongs to the root
    "fsdp1, log-probs": {**FSDP1, "fused": False},
    "fsdp1, tied": {**FSDP1, "is_tied": True},
}

# Runs that are compared with DDP's: two updates on each rollout, so that the second is off the policy; adapters; and
# prompts drawn by the scheduler, whose groups have rewards at their mean, where Adam steps on rounding errors.
OTHERS: dict[str, dict[str, Any]] = {
    "paced": {**SPLIT, "prompt_sampling": "paced"},
    "twice": {**SPLIT, "num_iterations": 2, "max_steps": 4},
    "lora": {**SPLIT, "has_lora": True},
    "lora, log-probs": {**SPLIT, "has_lora": True, "fused": False},
}

ZERO_RUNS: dict[str, dict[str, Any]] = {
    **{f"zero {stage}": {**SPLIT, "stage": stage} for stage in (1, 2, 3)},
    **{f"zero {stage}, log-probs": {**SPLIT, "stage": stage, "fused": False} for stage in (1, 2, 3)},
    "zero 3, tied": {**SPLIT, "stage": 3, "is_tied": True},
}


# What `make test` runs of those: each version of FSDP, each loss, each kind of weights, each stage that splits more.
SAMPLED = ("fsdp2", "fsdp2, tied, log-probs", "fsdp1, tied", "twice", "lora, log-probs", "zero 2", "zero 3, tied")


def marked(runs: dict[str, Any]) -> list[Any]:
    """The names of `runs`, those that are not sampled for `make test-all` only."""
    return [name if name in SAMPLED else pytest.param(name, marks=pytest.mark.exhaustive) for name in runs]


def chosen(request: pytest.FixtureRequest) -> set[str]:
    """The names of the runs that the tests look at."""
    here = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    return {item.callspec.params["name"] for item in here}


@pytest.fixture(scope="module")
def fsdp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("peft", reason="needs peft: pip install -e '.[trl]'")
    names = chosen(request)
    runs = {name: changes for name, changes in FSDP_RUNS.items() if name in names}
    runs["learned"] = {**FSDP2, "log_z": "learned"}
    for name in OTHERS.keys() & names:
        runs |= {f"{name}, ddp": OTHERS[name], f"{name}, fsdp2": {**OTHERS[name], "sharding": {"version": 2}}}
    return launch(tmp_path_factory.mktemp("fsdp"), program="tiny_trl_sharded.py", runs=runs)


@pytest.fixture(scope="module")
def zero(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install deepspeed")
    names = chosen(request)
    runs = {name: changes for name, changes in ZERO_RUNS.items() if name in names}
    runs |= {"learned": {**SPLIT, "stage": 2, "log_z": "learned"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        return launch(tmp_path_factory.mktemp("zero"), program="tiny_trl_sharded.py", runs=runs)


def assert_ours(first: dict[str, Any], second: dict[str, Any], *, is_tied: bool) -> None:
    """Three steps moved the parameters, on both processes to where our trainer moves them."""
    assert len(first["batches"]) == 3
    for name, value in first["state"].items():
        assert torch.equal(second["state"][name], value), name
    state, before = first["state"], dict(tiny_trl_sharded.model(is_tied=is_tied).named_parameters())
    assert max(float((value - before[name].detach()).abs().max()) for name, value in state.items()) > 9e-3
    pairs = zip(first["batches"], second["batches"], strict=True)
    steps: list[list[dict[str, Tensor]]] = [list(pair) for pair in pairs]
    assert_same(state, our_parameters(steps, tiny_trl_sharded.model(is_tied=is_tied)))


@pytest.mark.parametrize("name", marked(FSDP_RUNS))
def test_fsdp_makes_the_updates_of_our_trainer(fsdp: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in fsdp)
    assert any(unit.endswith("model.layers.1") for unit in first["units"])
    assert ("lm_head" in first["units"]) == name.startswith("fsdp2")
    assert_ours(first, second, is_tied="tied" in name)


@pytest.mark.parametrize("name", marked(OTHERS))
def test_fsdp_makes_the_updates_of_ddp(fsdp: list[dict[str, Any]], name: str) -> None:
    for rank in fsdp:
        found, expected = rank[f"{name}, fsdp2"], rank[f"{name}, ddp"]
        for ours, theirs in zip(found["batches"], expected["batches"], strict=True):
            assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
            assert ("old_per_token_logps" in ours) == ("old_per_token_logps" in theirs)
        assert "model.layers.1" in " ".join(found["units"])
        assert not expected["units"]
        assert_same(found["state"], expected["state"])


@pytest.mark.parametrize("name", marked(ZERO_RUNS))
def test_zero_makes_the_updates_of_our_trainer(zero: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in zero)
    assert_ours(first, second, is_tied="tied" in name)


def test_a_learned_log_z_is_refused_where_the_optimizer_has_no_group_for_it(fsdp: list[dict[str, Any]]) -> None:
    for rank in fsdp:
        assert "DeepSpeed and FSDP do not take: use 'group'" in rank["learned"]["refused"]


def test_a_learned_log_z_is_refused_by_zero(zero: list[dict[str, Any]]) -> None:
    for rank in zero:
        assert "DeepSpeed and FSDP do not take: use 'group'" in rank["learned"]["refused"]
