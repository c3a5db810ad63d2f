"""Checkpoints: all or nothing on any number of ranks, damage is found, the one before is used, nothing is a pickle."""

from __future__ import annotations

import ast
import errno
import itertools
import json
import os
import pickle
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_acts as acts
import numpy as np
import pytest
import tiny_policy
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.ranks import on_ranks
from paced_fast.data.distributed import ALONE
from paced_fast.data.prompts import character_tokenizer
from paced_fast.data.records import PromptRow, PromptTable
from paced_fast.errors import InputError, TrainingError
from paced_fast.policy.optimizer import GuardedAdamW
from paced_fast.run import checkpoint
from paced_fast.run.checkpoint import commit as committing
from paced_fast.run.checkpoint import folder as layout
from paced_fast.run.checkpoint import save as saving
from paced_fast.run.checkpoint.tensors import HostMemory, full_copies

ROOT = Path(__file__).resolve().parents[2]

FILES = [
    *("policy/model.bin", "policy/config.json", "random/rank_00000.json", "state.json", "state.safetensors"),
    "tensors/shard-00001-model-00001-of-00001.safetensors",
]


def save(root: Path, step: int, *, keep: int = 2, mark: int | None = None) -> Path:
    """A checkpoint by a saver of its own; `mark` tells apart those of one step."""
    mark = step if mark is None else mark
    own = acts.saver(root, keep=keep, background=False)
    own.save(step, tensors=acts.whole(mark) | acts.control(mark), model=acts.model(mark), state={"step": step})
    return root / f"step_{step:06d}"


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    into = {name: torch.full_like(tensor, torch.nan) for name, tensor in acts.whole(0).items()}
    found, state, generators = checkpoint.load(folder, into)
    assert generators is not None
    return into, found, state


def assert_of_step(folder: Path, step: int) -> None:
    into, found, _ = load(folder)
    for expected, got in ((acts.whole(step), into), (acts.control(step), found)):
        assert got.keys() == expected.keys()
        assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def newest(root: Path) -> Path:
    found = checkpoint.newest(root)
    assert found is not None
    return found


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 7)
    assert folder.name == "step_000007"
    assert_of_step(folder, 7)
    assert load(folder)[2] == {"step": 7}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(FILES)
    assert (manifest["step"], manifest["format"]) == (7, 2)


@pytest.mark.process
def test_shards_of_two_ranks_are_loaded_whole_and_in_other_shards(tmp_path: Path) -> None:
    on_ranks(2, acts.save_steps, tmp_path, "shards", [3, 4])
    assert names(tmp_path) == ["step_000003", "step_000004"]
    assert sorted(path.name for path in (tmp_path / "step_000004").rglob("*") if path.parent.name == "tensors") == [
        f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)
    ]
    assert_of_step(tmp_path / "step_000004", 4)
    for size, kind in ((3, "shards"), (4, "halves")):
        for rank, (name, tensors, found, state, own) in enumerate(on_ranks(size, acts.loaded, tmp_path, kind)):
            assert (name, state, own) == ("step_000004", {"step": 4}, rank < 2)
            for got, expected in ((tensors, acts.whole(4)), (found, acts.control(4))):
                assert got == acts.as_lists(expected), (size, kind)


@pytest.mark.process
def test_what_several_ranks_hold_whole_is_written_once(tmp_path: Path) -> None:
    on_ranks(2, acts.save_steps, tmp_path, "whole", [5])
    on_ranks(4, acts.save_steps, tmp_path / "halves", "halves", [5])
    for root in (tmp_path, tmp_path / "halves"):
        parts = [load_file(path) for path in (root / "step_000005" / "tensors").iterdir()]
        elements = sum(tensor.numel() for part in parts for tensor in part.values())
        assert elements == sum(tensor.numel() for tensor in acts.whole(5).values())
        assert len(parts) == 2
        assert_of_step(root / "step_000005", 5)


@pytest.mark.process
def test_an_error_on_one_rank_is_one_on_all_and_costs_the_save(tmp_path: Path) -> None:
    for failure, left, second in on_ranks(2, acts.fails_on_one, tmp_path, errno.ENOSPC):
        assert failure is not None
        assert failure.startswith("rank 1: ")
        assert "No space left on device; the checkpoint needs about" in failure
        assert left == ["step_000001"], "the old one, and nothing half"
        assert second is None
    assert names(tmp_path) == ["step_000001", "step_000003"]
    for told, left in on_ranks(2, acts.bug_on_one, tmp_path / "bug"):
        assert told == "TrainingError: a checkpoint could not be written: rank 1: RuntimeError: a mistake"
        assert left == []
    for kind in (SystemExit, KeyboardInterrupt):  # the other rank is told, this one ends as it was asked to
        (told, left), own = on_ranks(2, acts.bug_on_one, tmp_path / kind.__name__, kind)
        assert told == f"TrainingError: a checkpoint could not be written: rank 1: {kind.__name__}: a mistake"
        assert own == (f"{kind.__name__}: a mistake", left)
        assert left == []


@pytest.mark.process
def test_every_rank_has_its_own_generators(tmp_path: Path) -> None:
    drawn = on_ranks(2, acts.generators_of_ranks, tmp_path)
    assert all(first == again for first, again in drawn)
    assert drawn[0] != drawn[1]


@pytest.mark.process
def test_every_rank_goes_on_from_the_same_checkpoint(tmp_path: Path) -> None:
    """Damage that one rank finds passes the checkpoint over on all."""
    on_ranks(2, acts.save_steps, tmp_path, "shards", [3, 4])
    flip_bit(tmp_path / "step_000004" / "random" / "rank_00001.json")
    assert [found[0] for found in on_ranks(2, acts.loaded, tmp_path, "shards")] == ["step_000003"] * 2


@pytest.mark.process
def test_a_file_that_cannot_be_written_costs_the_save_and_the_last_one_is_an_error(tmp_path: Path) -> None:
    """A limit of the kernel, met in the write itself."""
    save(tmp_path, 1)
    [(failure, last)] = on_ranks(1, acts.limited, tmp_path, 10_000)
    assert failure is not None
    assert "File too large; the checkpoint needs about 7" in failure
    assert last.startswith("TrainingError: the final checkpoint was not written: ")
    assert names(tmp_path) == ["step_000001"]


def test_the_newest_are_kept_in_order_of_steps(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_1000000", "step_999999"]
    assert newest(tmp_path).name == "step_1000000"
    assert checkpoint.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_checkpoints_do_not_push_out_the_whole_one(tmp_path: Path, keep: int) -> None:
    save(tmp_path, 50, keep=9)
    (save(tmp_path, 100, keep=9) / "state.json").write_text("{}")
    (save(tmp_path, 150, keep=9) / "state.json").write_text("{}")
    save(tmp_path, 75, keep=keep)
    assert names(tmp_path) == ["step_000050", "step_000075"][-keep:]
    assert newest(tmp_path).name == "step_000075"


def test_a_damaged_earlier_one_does_not_push_out_the_whole_one_before_it(tmp_path: Path) -> None:
    save(tmp_path, 10, keep=9)
    (save(tmp_path, 20, keep=9) / "state.json").write_text("{}")
    save(tmp_path, 30, keep=2)
    assert names(tmp_path) == ["step_000010", "step_000030"]


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(path: Path) -> None:
    """With another file of the checkpoint, of the same size where there is one."""
    others = [other for other in path.parents[path.parent.name != "step_000002"].rglob("*.*") if other.is_file()]
    other = min((o for o in others if o != path), key=lambda o: abs(o.stat().st_size - path.stat().st_size))
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def replace_by_link(path: Path) -> None:
    kept = path.rename(path.parents[path.parent.name != "step_000002"].parent / "elsewhere")
    path.symlink_to(kept)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flip": flip_bit,
    "truncate": truncate,
    "delete": Path.unlink,
    "swap": swap,
    "link": replace_by_link,
    "double": lambda path: shutil.copy(path, path.with_name(f"copy-of-{path.name}")),
    "older": lambda path: shutil.copy(str(path).replace("step_000002", "step_000001"), path),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_damage_is_found_and_the_previous_checkpoint_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copytree(bad, tmp_path / "kept")
    for name in (*FILES, "manifest.json"):
        if damage == "older" and (good / name).read_bytes() == (bad / name).read_bytes():
            continue
        assert newest(tmp_path) == bad
        DAMAGE[damage](bad / name)
        problem = checkpoint.verify(bad)
        assert problem is not None, name
        assert "\n" not in problem
        assert damage == "swap" or Path(name).name in problem or name == "manifest.json", problem
        caplog.clear()
        with caplog.at_level("WARNING"):
            assert newest(tmp_path) == good
        assert str(bad) in caplog.text
        shutil.rmtree(bad)
        shutil.copytree(tmp_path / "kept", bad)


def test_a_folder_under_another_name_is_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    shutil.copytree(folder, tmp_path / "step_000002")
    assert checkpoint.verify(tmp_path / "step_000002") == "it is the checkpoint of step 1 under another name"
    assert newest(tmp_path) == folder


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"format": 2}', '{"format": 3}', "[" * 10**5])
def test_a_manifest_that_names_too_little_is_damage(tmp_path: Path, content: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text(content)
    assert checkpoint.newest(tmp_path) is None


ILL_FORMED: dict[str, dict[str, Any]] = {
    "files a list": {"files": []},
    "files null": {"files": None},
    "entry a number": {"files": {"state.json": 3}},
    "entry without a hash": {"files": {"state.json": {"bytes": 3}}},
    "hash a number": {"files": {"state.json": {"bytes": 3, "sha256": 4}}},
    "bytes true": {"files": {"state.json": {"bytes": True, "sha256": "x"}}},
    "bytes text": {"files": {"state.json": {"bytes": "3", "sha256": "x"}}},
    "no step": {"step": None},
    "step text": {"step": "1"},
    "step true": {"step": True},
    "format text": {"format": "2"},
    "format a list": {"format": [2]},
}


@pytest.mark.parametrize("case", sorted(ILL_FORMED))
def test_an_ill_formed_manifest_with_its_own_hash_is_damage(tmp_path: Path, case: str) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text()) | ILL_FORMED[case]
    (folder / "manifest.json").write_text(layout.manifest_text(manifest))
    assert checkpoint.verify(folder) == "manifest.json has changed"
    assert checkpoint.newest(tmp_path) is None


def test_a_manifest_nested_too_deep_is_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for depth in (100, 300, 900, 3000, 10**5):  # too deep to write comes before too deep to read
        (folder / "manifest.json").write_text('{"format": 2, "step": ' + '{"a": ' * depth + "1" + "}" * (depth + 1))
        problem = checkpoint.verify(folder)
        assert problem is not None
        assert problem.startswith("manifest.json ")
        assert checkpoint.newest(tmp_path) is None


def test_another_format_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text('{"policy/config.json": "00"}')
    assert checkpoint.verify(folder) == "it has format 1, but this version reads format 2"
    with pytest.raises(InputError, match=r"step_000001 has format 1, but .* version of paced_fast that wrote"):
        checkpoint.newest(tmp_path)


def test_one_of_another_format_is_neither_passed_over_nor_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / "checkpoints", step)
    folder = tmp_path / "checkpoints" / "step_000002"
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": layout.FORMAT + 1}
    (folder / "manifest.json").write_text(layout.manifest_text(manifest))
    told = f"{folder} has format 3, but this version reads format 2: use the version of paced_fast that wrote"
    for find in (
        lambda: checkpoint.newest(folder.parent),
        lambda: checkpoint.policy_folder(tmp_path, None),
        lambda: checkpoint.policy_folder(tmp_path, 2),
    ):
        with pytest.raises(InputError) as raised:
            find()
        assert told in str(raised.value)
    save(folder.parent, 3, keep=1)
    assert names(folder.parent) == ["step_000002", "step_000003"]


class Killed(BaseException):
    """Stands for the process dying."""


STAGES = {
    "folder": (saving, "fresh", 1),
    "part": (saving.HostPart, "write", 1),
    "policy": (acts.Path, "write_bytes", 1),
    "control": (saving, "to_bytes", 1),
    "generators": (saving.Path, "write_text", 1),
    "manifest": (saving.Path, "write_text", 4),
    "first flush": (saving, "flush", 1),
    "last flush of a file": (saving, "flush", 6),
    "last flush": (committing, "flush", 5),
    "rename": (saving.Path, "rename", 1),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_save_that_dies_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, after: bool
) -> None:
    save(tmp_path, 1, mark=1)
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
        patch.setattr(saving.shutil, "rmtree", lambda *_, **__: None)  # a dead process tidies nothing
        with pytest.raises(Killed):
            save(tmp_path, 2, mark=2)
    complete = stage == "rename" and after
    assert_of_step(newest(tmp_path), 2 if complete else 1)
    save(tmp_path, 2, mark=3)
    assert_of_step(newest(tmp_path), 3)
    assert names(tmp_path) == ["step_000001", "step_000002"], "no leftovers"


def test_every_file_and_folder_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noting(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1])
    save(tmp_path / "checkpoints", 3)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    expected = {*(Path(name).name for name in FILES), "manifest.json", "policy", "tensors", "random"}
    assert set(before) == expected | {".step_000003.0.partial"}
    last_file = max(i for i, name in enumerate(before) if name in {Path(file).name for file in FILES})
    assert before.index("manifest.json") > last_file, "it promises what is on the disk"
    assert after == ["checkpoints"]


def test_a_removal_that_dies_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is kept: the kill comes while the other is deleted."""
    save(tmp_path, 1, keep=1)

    def dies(path: Path, **_: Any) -> None:
        if Path(path).exists():
            (path / "state.json").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(committing.shutil, "rmtree", dies)
        with pytest.raises(Killed):
            save(tmp_path, 2, keep=1)
    assert names(tmp_path) == [".step_000001.removed", "step_000002"]
    assert_of_step(newest(tmp_path), 2)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step_000003"]


def test_a_leftover_that_cannot_be_removed_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".step_000004.0.partial").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(committing.shutil, "rmtree", lambda *_, **__: None)
        save(tmp_path, 4)
    assert names(tmp_path) == [".step_000004.0.partial", "step_000004"]
    save(tmp_path, 5)
    assert names(tmp_path) == ["step_000004", "step_000005"]


def test_what_dies_in_the_background_comes_up_at_the_next_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = acts.saver(tmp_path)

    def broken(*_: Any) -> None:
        raise RuntimeError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "commit", broken)
        own.save(1, tensors=acts.whole(1), model=acts.model(1), state={})
        with pytest.raises(TrainingError, match="a checkpoint could not be written: RuntimeError: a mistake"):
            own.save(2, tensors=acts.whole(2), model=acts.model(2), state={})
    assert names(tmp_path) == [], "the folder of the failed one is gone"
    own.save(3, tensors=acts.whole(3), model=acts.model(3), state={})
    own.close()
    assert names(tmp_path) == ["step_000003"], "closing finishes it"


def test_one_save_is_in_flight_and_the_step_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, running = threading.Event(), []
    original = saving.commit

    def held(*args: Any) -> Path:
        running.append(1)
        gate.wait(600)
        time.sleep(0.05)
        assert len(running) == 1
        running.clear()
        return original(*args)

    monkeypatch.setattr(saving, "commit", held)
    own = acts.saver(tmp_path)
    own.save(1, tensors=acts.whole(1), model=acts.model(1), state={})
    assert not (tmp_path / "step_000001").exists(), "save came back before it was written"
    gate.set()
    own.save(2, tensors=acts.whole(2), model=acts.model(2), state={})
    assert (tmp_path / "step_000001").exists(), "the second waited for the first"
    own.save(3, tensors=acts.whole(3), model=acts.model(3), state={}, last=True)
    assert names(tmp_path) == ["step_000002", "step_000003"], "the last one is there when save returns"


def test_the_same_step_is_saved_once(tmp_path: Path) -> None:
    own = acts.saver(tmp_path, keep=1)
    for mark in (1, 2):
        own.save(4, tensors=acts.whole(mark), model=acts.model(mark), state={})
    own.close()
    into = acts.whole(0)
    checkpoint.load(tmp_path / "step_000004", into)
    assert torch.equal(into["policy.head"], acts.whole(1)["policy.head"])


def test_a_warning_names_the_path_and_the_bytes_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    own = acts.saver(tmp_path / "file" / "checkpoints")
    with caplog.at_level("WARNING"):
        own.save(1, tensors=acts.whole(1), model=acts.model(1), state={})
        failure = own.wait()
    assert failure is not None
    assert failure.startswith(f"{tmp_path / 'file'}")
    assert "Not a directory; the checkpoint needs about" in failure
    assert [record.message for record in caplog.records] == [
        f"checkpoint of step 1 was not written ({failure}): training continues, and there is no checkpoint yet"
    ]
    with pytest.raises(TrainingError, match="the final checkpoint was not written"):
        own.save(2, tensors=acts.whole(2), model=acts.model(2), state={}, last=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_costs_the_save_and_not_the_checkpoint_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting a small disk is not allowed here")
    try:
        own = acts.saver(disk / "checkpoints")
        big = {"optimizer.big": torch.zeros(500_000)}
        own.save(1, tensors=acts.whole(1), model=acts.model(1), state={})
        own.save(2, tensors=big, model=acts.model(2), state={})
        failure = own.wait()
        assert failure is not None
        assert "No space left on device; the checkpoint needs about 20" in failure
        assert names(disk / "checkpoints") == ["step_000001"]
        own.save(3, tensors=acts.whole(3), model=acts.model(3), state={})
        assert own.wait() is None
        assert names(disk / "checkpoints") == ["step_000001", "step_000003"]
    finally:
        os.system(f"umount {disk}")


# Nothing is a pickle.

MODULES_THAT_UNPICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS_THAT_UNPICKLE = {
    *(
        "torch.load",
        "torch.save",
        "dcp.load",
        "dcp.save",
        "gather_object",
        "all_gather_object",
        "broadcast_object_list",
    ),
    *("scatter_object_list", "send_object_list", "recv_object_list", "FileSystemReader", "FileSystemWriter"),
}


def unpickling(text: str) -> list[str]:
    """Names in a module through which a pickle is read or written."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES_THAT_UNPICKLE]
        elif isinstance(node, ast.ImportFrom):
            whole = [node.module or "", *(alias.name for alias in node.names)]
            found += [n for n in whole if n.split(".")[0] in MODULES_THAT_UNPICKLE or n in CALLS_THAT_UNPICKLE]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.split(".")[-1]
            if name in CALLS_THAT_UNPICKLE or last in CALLS_THAT_UNPICKLE:
                found.append(name)
        elif isinstance(node, ast.Constant) and node.value in (".metadata", ".pt", ".pth", ".bin", ".pkl"):
            found.append(node.value)
    return found


@pytest.mark.parametrize(
    "text",
    [
        *("import pickle", "from pickle import loads", "import cloudpickle as c", "torch.load(p)", "dcp.load(s)"),
        *("dist.all_gather_object(a, b)", "x = FileSystemReader(p)", "from torch.distributed import gather_object"),
        "open(folder / '.metadata')",
    ],
)
def test_the_gate_sees_pickles(text: str) -> None:
    assert unpickling(text)


def test_no_module_unpickles() -> None:
    found = {
        str(path.relative_to(ROOT)): names_
        for folder in ("paced_fast", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if (names_ := unpickling(path.read_text()))
    }
    # TRL's own checkpoints are pickles, which ours lies beside; torch reads it as tensors only.
    assert set(found.pop("paced_fast/integrations/trl_memory.py")) == {"torch.save", "torch.load"}
    assert found == {}


@pytest.mark.process
def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    on_ranks(2, acts.save_steps, tmp_path, "shards", [1])
    policy = tiny_policy.policy()
    own = checkpoint.Saver(
        tmp_path, keep=2, write_policy=lambda f, s: policy.model.save_pretrained(f, state_dict=s), background=False
    )
    own.save(2, tensors=acts.whole(2), model=policy.model.state_dict(), state={})
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "model.bin"]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            load_file(path)


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def forge(folder: Path) -> None:
    """A manifest that fits whatever is in the folder: hashes tell damage, they are no signature."""
    files = {
        path.relative_to(folder).as_posix(): layout.describe(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    text = layout.manifest_text({"format": layout.FORMAT, "step": int(folder.name[5:]), "files": files})
    (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    "name",
    [*FILES, "tensors/.metadata", "tensors/evil.safetensors", "tensors/__0_0.distcp", "policy/training_args.bin"],
)
def test_planted_code_does_not_run(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "it ran"
    folder = save(tmp_path / "checkpoints", 1)
    for payload in (pickle.dumps(Evil(mark)), b"\x80\x02" + pickle.dumps(Evil(mark), 2)):
        (folder / name).write_bytes(payload)
        forge(folder)
        assert checkpoint.verify(folder) is None, "the forged one passes for whole"
        if name.startswith(("policy/", "tensors/.m", "tensors/__0")):
            load(folder)  # nobody looks at it
        else:
            with pytest.raises(InputError) as raised:
                load(folder)
            assert "\n" not in str(raised.value)
    assert not mark.exists()


def test_tensors_that_share_memory_are_saved_and_other_ones_are_refused(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    own = acts.saver(tmp_path, background=False)
    tensors = {"optimizer.a": base[:4], "optimizer.b": base.view(2, 3).T, "c": base.view(2, 3).T, "d": base}
    own.save(1, tensors=tensors, model=acts.model(1), state={})
    into = {"optimizer.a": torch.empty(4), "optimizer.b": torch.empty(3, 2)}
    found, _, _ = checkpoint.load(tmp_path / "step_000001", into)
    for name, tensor in tensors.items():
        assert torch.equal((into | found)[name], tensor), name
    for wrong, told in (
        ({"optimizer.a": torch.empty(4)}, "has an unexpected optimizer.b"),
        (into | {"optimizer.z": torch.empty(1)}, "lacks optimizer.z"),
        (into | {"optimizer.a": torch.empty(2, 2)}, r"optimizer.a has the shape \(4,\) instead of \(2, 2\)"),
    ):
        with pytest.raises(InputError, match=told):
            checkpoint.load(tmp_path / "step_000001", wrong)


def test_many_files_hold_what_one_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paced_fast.run.checkpoint.tensors._FILE_BYTES", 60)
    folder = save(tmp_path, 1)
    assert len(list((folder / "tensors").iterdir())) > 2
    assert_of_step(folder, 1)


def test_whole_tensors_on_the_host_keep_tied_ones_one() -> None:
    model = acts.model(3)
    copies = full_copies(model, ALONE, HostMemory())
    assert copies["head"] is copies["embed"]
    assert copies["embed"].data_ptr() != model["embed"].data_ptr()
    assert all(torch.equal(copies[name], model[name]) for name in model)


def stepped(seed: int) -> tuple[Any, torch.optim.AdamW]:
    policy = tiny_policy.policy(seed=seed)
    optimizer = GuardedAdamW(policy.parameters(), learning_rate=1e-3)
    source = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for parameter in policy.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=source)
        optimizer.step()
    return policy, optimizer


@pytest.mark.parametrize("fresh", [False, True])
def test_the_optimiser_continues_bit_for_bit(tmp_path: Path, fresh: bool) -> None:
    """Also one that has not stepped yet, and so has no state of its own to load into."""
    policy, optimizer = stepped(0)
    saved = {name: value.clone() for name, value in checkpoint.optimizer_tensors(optimizer).items()}
    assert {name.partition(".")[2] for name in saved} == {"step", "exp_avg", "exp_avg_sq"}
    own = acts.saver(tmp_path, background=False)
    own.save(1, tensors=checkpoint.prefixed("optimizer", saved), model=acts.model(1), state={})
    other, second = stepped(1)
    if fresh:
        second = GuardedAdamW(other.parameters(), learning_rate=1e-3)
    for parameter, value in zip(other.parameters(), policy.parameters(), strict=True):
        parameter.data.copy_(value.data)
    second.param_groups[0]["lr"] = 0.125
    checkpoint.load(tmp_path / "step_000001", checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(second)))
    assert second.param_groups[0]["lr"] == 0.125, "settings stay its own"
    second.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    for name, value in checkpoint.optimizer_tensors(second).items():
        assert torch.equal(value, saved[name]), name
    for one, two in zip(policy.parameters(), other.parameters(), strict=True):
        one.grad = torch.ones_like(one)
        two.grad = torch.ones_like(two)
    optimizer.step()
    second.step()
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))


def test_state_made_before_the_first_step_changes_no_step() -> None:
    runs = []
    for early in (False, True):
        policy = tiny_policy.policy(seed=2)
        optimizer = GuardedAdamW(policy.parameters(), learning_rate=1e-3)
        if early:
            assert not any(tensor.any() for tensor in checkpoint.optimizer_tensors(optimizer).values())
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        runs.append([*policy.parameters(), *checkpoint.optimizer_tensors(optimizer).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


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


def test_the_generator_of_the_gpu_is_kept_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: held)
    put: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", put.append)
    checkpoint.restore_random_state(json.loads(json.dumps(checkpoint.random_state())))
    assert [tensor.tolist() for tensor in put] == [held.tolist()]
    assert put[0].dtype == torch.uint8


def test_names_keep_their_owner() -> None:
    together = checkpoint.prefixed("log_z.mlp", {"a.b": torch.zeros(1)}) | checkpoint.prefixed(
        "log_z", {"mlp2.c": torch.ones(1)}
    )
    assert checkpoint.below("log_z.mlp", together).keys() == {"a.b"}
    assert checkpoint.below("log_z", together).keys() == {"mlp.a.b", "mlp2.c"}


def test_a_stray_partial_folder_is_no_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    shutil.copytree(folder, tmp_path / ".step_000009.0.partial")
    shutil.copytree(folder, tmp_path / "step_9 (copy)")
    os.makedirs(tmp_path / "step_000010")
    assert newest(tmp_path) == folder


def table(*prompts: str, answer: str = "2") -> PromptTable:
    return PromptTable(
        rows=tuple(
            PromptRow(prompt=p, token_ids=(1, 2), slice="s", reward="number", columns={"answer": answer})
            for p in prompts
        )
    )


def test_other_data_or_another_tokenizer_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = character_tokenizer("ab~#", pad="~", stop="#")
    now = checkpoint.identity(table("a", "b"), table("c"), tokenizer)
    saved = json.loads(json.dumps({"identity": now, "versions": checkpoint.versions()}))
    checkpoint.check_identity(saved, now, tmp_path)
    assert caplog.text == ""
    tokenizer("ab", padding="max_length", max_length=9, truncation=True)
    assert checkpoint.identity(table("a", "b"), table("c"), tokenizer) == now, "how it was called is no part of it"
    chatty = character_tokenizer("ab~#", pad="~", stop="#")
    chatty.chat_template = "{{ messages }}"
    others = {
        "training prompts": [
            checkpoint.identity(t, table("c"), tokenizer)
            for t in (table("a"), table("b", "a"), table("a", "b", answer="3"))
        ],
        "held-out prompts": [checkpoint.identity(table("a", "b"), table("d"), tokenizer)],
        "tokenizer": [checkpoint.identity(table("a", "b"), table("c"), character_tokenizer("ba~#", pad="~", stop="#"))],
        "chat template": [checkpoint.identity(table("a", "b"), table("c"), chatty)],
    }
    for name, other in itertools.chain.from_iterable(((n, o) for o in found) for n, found in others.items()):
        with pytest.raises(InputError, match=f"--resume auto: the {name} changed since .* then, .* now") as raised:
            checkpoint.check_identity(saved, other, tmp_path)
        assert "\n" not in str(raised.value)
    saved["versions"]["torch"] = "1.0"
    with caplog.at_level("WARNING"):
        checkpoint.check_identity(saved, now, tmp_path)
    assert f"torch 1.0 -> {checkpoint.versions()['torch']}" in caplog.text
