"""Checkpoints: all or nothing, damage is found, the previous one is used, and no file is a pickle."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_policy
import torch
from safetensors.torch import load_file
from torch import Tensor

from paced_fast import checkpoint
from paced_fast.errors import InputError
from paced_fast.update import make_optimizer

TENSORS = {"optimizer.0.step": torch.tensor(3.0), "replay.lengths": torch.arange(4)}


def save(root: Path, step: int, *, keep: int = 2, mark: float = 0.0) -> Path:
    def save_policy(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.bin").write_bytes(b"weights" * 100)

    tensors = TENSORS | {"mark": torch.tensor([mark])}
    return checkpoint.save(root, step, save_policy=save_policy, tensors=tensors, state={"step": step}, keep=keep)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 7, mark=0.25)
    assert folder.name == "step_000007"
    tensors, state = checkpoint.load(folder)
    assert state == {"step": 7}
    assert tensors.keys() == TENSORS.keys() | {"mark"}
    assert torch.equal(tensors["replay.lengths"], torch.arange(4))
    assert tensors["optimizer.0.step"].shape == ()
    assert set(json.loads((folder / "manifest.json").read_text())) == {
        "policy/model.bin",
        "state.json",
        "state.safetensors",
    }


def test_the_newest_are_kept_in_order_of_steps(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_1000000", "step_999999"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.name == "step_1000000"
    assert checkpoint.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_checkpoints_do_not_push_out_the_whole_one(tmp_path: Path, keep: int) -> None:
    save(tmp_path, 50, keep=9)
    (save(tmp_path, 100, keep=9) / "state.json").write_text("{}")
    (save(tmp_path, 150, keep=9) / "state.json").write_text("{}")
    save(tmp_path, 75, keep=keep)
    assert names(tmp_path) == ["step_000050", "step_000075"][-keep:]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.name == "step_000075"


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], Any]] = {"flip": flip_bit, "truncate": truncate, "delete": Path.unlink}


@pytest.mark.parametrize("name", ["policy/model.bin", "state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_damage_is_found_and_the_previous_checkpoint_is_used(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == bad
    DAMAGE[damage](bad / name)
    problem = checkpoint.verify(bad)
    assert problem is not None
    assert name.partition("/")[0] in problem or name == "manifest.json"
    with caplog.at_level("WARNING"):
        assert checkpoint.newest(tmp_path) == good
    assert str(bad) in caplog.text
    with pytest.raises(InputError, match="is damaged") as raised:
        checkpoint.load(bad)
    assert "\n" not in str(raised.value)
    replaced = save(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == replaced


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"state.json": "x"}'])
def test_a_manifest_that_names_too_little_is_damage(tmp_path: Path, content: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text(content)
    assert checkpoint.newest(tmp_path) is None


class Killed(BaseException):
    """Stands for the process dying."""


STAGES = {
    "policy": (checkpoint.Path, "mkdir", 2),
    "tensors": (checkpoint, "save_file", 1),
    "state": (checkpoint.Path, "write_text", 1),
    "manifest": (checkpoint.Path, "write_text", 2),
    "first flush": (checkpoint, "_fsync", 1),
    "last flush": (checkpoint, "_fsync", 5),
    "rename": (checkpoint.Path, "rename", 1),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_save_that_dies_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, after: bool
) -> None:
    save(tmp_path, 1, mark=1.0)
    owner, name, count = STAGES[stage]
    original, calls = getattr(owner, name), []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == count and not after:
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == count:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            save(tmp_path, 2, mark=2.0)
    complete = stage == "rename" and after
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert float(checkpoint.load(newest)[0]["mark"]) == (2.0 if complete else 1.0)
    save(tmp_path, 2, mark=3.0)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert float(checkpoint.load(newest)[0]["mark"]) == 3.0
    assert names(tmp_path) == ["step_000001", "step_000002"], "no leftovers"


def test_every_file_and_folder_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, rename = checkpoint._fsync, Path.rename
    monkeypatch.setattr(checkpoint, "_fsync", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1])
    save(tmp_path / "checkpoints", 3)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert sorted(before) == sorted(
        ["policy", "model.bin", "state.safetensors", "state.json", "manifest.json", ".step_000003.partial"]
    )
    assert after == ["checkpoints"]


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    policy = tiny_policy.policy()
    folder = checkpoint.save(
        tmp_path, 1, save_policy=policy.model.save_pretrained, tensors=TENSORS, state=checkpoint.random_state(), keep=1
    )
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            load_file(path)
        assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"PK")


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    folder = checkpoint.save(
        tmp_path,
        1,
        save_policy=lambda _: None,
        tensors={"a": base[:4], "b": base.view(2, 3).T},
        state={},
        keep=1,
    )
    tensors, _ = checkpoint.load(folder)
    assert torch.equal(tensors["a"], base[:4])
    assert torch.equal(tensors["b"], base.view(2, 3).T)


def stepped(seed: int) -> tuple[Any, torch.optim.AdamW]:
    policy = tiny_policy.policy(seed=seed)
    optimizer = make_optimizer(policy, tiny_policy.settings().optimizer)
    source = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for parameter in policy.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=source)
        optimizer.step()
    return policy, optimizer


def test_the_optimiser_continues_bit_for_bit(tmp_path: Path) -> None:
    policy, optimizer = stepped(0)
    saved = {name: value.clone() for name, value in checkpoint.optimizer_tensors(optimizer).items()}
    assert {name.partition(".")[2] for name in saved} == {"step", "exp_avg", "exp_avg_sq"}
    folder = checkpoint.save(tmp_path, 1, save_policy=lambda _: None, tensors=saved, state={}, keep=1)
    other, fresh = stepped(1)
    for parameter, value in zip(other.parameters(), policy.parameters(), strict=True):
        parameter.data.copy_(value.data)
    fresh.param_groups[0]["lr"] = 0.125
    checkpoint.load_optimizer_tensors(fresh, checkpoint.load(folder)[0])
    assert fresh.param_groups[0]["lr"] == 0.125, "settings stay its own"
    fresh.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    for name, value in checkpoint.optimizer_tensors(fresh).items():
        assert torch.equal(value, saved[name]), name
    for one, two in zip(policy.parameters(), other.parameters(), strict=True):
        one.grad = torch.ones_like(one)
        two.grad = torch.ones_like(two)
    optimizer.step()
    fresh.step()
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))


def test_the_ambient_generators_continue() -> None:
    def draw() -> tuple[float, float, float, Tensor]:
        return random.gauss(0, 1), random.random(), float(np.random.standard_normal()), torch.rand(3)

    draw()  # leaves half a pair behind in each gaussian generator
    state = json.loads(json.dumps(checkpoint.random_state()))
    first = draw()
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    checkpoint.restore_random_state(state)
    again = draw()
    assert again[:3] == first[:3]
    assert torch.equal(again[3], first[3])


def test_names_keep_their_owner() -> None:
    together = checkpoint.prefixed("log_z.mlp", {"a.b": torch.zeros(1)}) | checkpoint.prefixed(
        "log_z", {"mlp2.c": torch.ones(1)}
    )
    assert checkpoint.below("log_z.mlp", together).keys() == {"a.b"}
    assert checkpoint.below("log_z", together).keys() == {"mlp.a.b", "mlp2.c"}


def test_a_stray_partial_folder_is_no_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    shutil.copytree(folder, tmp_path / ".step_000009.partial")
    os.makedirs(tmp_path / "step_000010")
    assert checkpoint.newest(tmp_path) == folder
