"""Saving: tensors are copied within the step, and written in the background of the following steps.

Every rank writes, flushes and hashes its own files in one fresh folder; then rank 0 writes the manifest and renames the
folder. So a reader finds all of a checkpoint or none of it, and a save that fails on one rank fails on all. The ranks
use a separate process group, because training communicates at the same time.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor

from paced_fast.data.distributed import ALONE, EVERYWHERE, World
from paced_fast.errors import InputError, TrainingError
from paced_fast.run.checkpoint.commit import commit, flush, fresh, retain
from paced_fast.run.checkpoint.folder import describe, folders, step_folder
from paced_fast.run.checkpoint.random_state import random_state
from paced_fast.run.checkpoint.tensors import HostMemory, HostPart, full_copies, rank_files

logger = logging.getLogger(__name__)

SPREAD = ("policy.", "optimizer.")
"""Prefixes of the names of tensors that may be spread over ranks; the others are the same on every rank."""

WritePolicy = Callable[[Path, dict[str, Tensor]], None]
"""Writes whole tensors to a Hugging Face folder; called on rank 0, concurrently with training."""


@dataclass(frozen=True, slots=True)
class _Job:
    """Data of one rank's part of a checkpoint, on the host."""

    step: int
    part: HostPart
    control: dict[str, Tensor]
    policy: dict[str, Tensor]
    state: str
    random: str

    @property
    def bytes(self) -> int:
        """Approximate size on disk."""
        copies = {copy.data_ptr(): copy for copy in (*self.control.values(), *self.policy.values())}
        return self.part.bytes + sum(copy.nbytes for copy in copies.values()) + len(self.state) + len(self.random)


class Saver:
    """Writes the checkpoints of a run, one at a time."""

    def __init__(
        self, root: Path, *, keep: int, write_policy: WritePolicy, background: bool, world: World = ALONE
    ) -> None:
        """Write checkpoints to `root`, in the background or before `save` returns, and keep the `keep` newest.

        With several ranks all make their saver at the same place, and call each of its methods alike.
        """
        self._root, self._keep, self._write_policy = root, keep, write_policy
        self._train_world, self._world = world, world.beside()
        self._memory = HostMemory()
        self._written: list[int] = []  # steps whose checkpoints are known to be whole
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._pending: Future[str | None] | None = None
        self._stopped: BaseException | None = None  # the exception that asked this rank to end while it wrote

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Tensor],
        model: Mapping[str, Tensor],
        state: Mapping[str, Any],
        last: bool = False,
    ) -> None:
        """Save `tensors` by name, the policy `model` by the names of its state dict, and `state`, plain values.

        Waits for the save before. If the disk cannot take it, this checkpoint is skipped with a warning and training
        continues. The `last` one of a run is on disk when this returns; raises TrainingError if it cannot be written.
        """
        self.wait()
        if step in self._written:
            return  # all of it depends on the step only
        spread = {name: tensor for name, tensor in tensors.items() if name.startswith(SPREAD)}
        alike = {name: tensor for name, tensor in tensors.items() if name not in spread}
        is_rank0 = self._world.is_rank0
        job = _Job(
            step=step,
            part=HostPart(spread, self._world, self._memory),
            control={name: self._memory.copy(name, tensor) for name, tensor in alike.items()} if is_rank0 else {},
            policy=full_copies(model, self._train_world, self._memory),
            state=json.dumps(state, indent=1),
            random=json.dumps(random_state()),
        )
        if self._thread is None:
            failure = self._write(job)
        else:
            self._pending = self._thread.submit(self._write, job)
            failure = self.wait() if last else None
        if last and failure is not None:
            raise _of_all(TrainingError(f"the final checkpoint was not written: {failure}"))

    def wait(self) -> str | None:
        """Wait for the save in the background; returns why it failed, or None.

        Raises its error unless that was one of the disk.
        """
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """Finish writing, whether it succeeds or not: a run that ends with an error keeps its last checkpoint."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._pending is not None and (error := self._pending.exception()) is not None:
            logger.warning("the latest checkpoint was not written: %s", error)

    def _write(self, job: _Job) -> str | None:
        """Write the checkpoint together with the other ranks; returns why that failed, or None, the same on all."""
        is_rank0 = self._world.is_rank0
        partial: Path | None = None
        done = False
        try:
            answers = self._exchange(self._tried(lambda: str(fresh(self._root, job.step)), job) if is_rank0 else {})
            failure = self._failure(answers)
            if failure is None:
                partial = folder = Path(answers[0]["done"])
                answers = self._exchange(self._tried(lambda: self._write_own(job, folder), job))
                failure = self._failure(answers)
            if partial is not None and failure is None:
                folder, files = partial, {k: v for answer in answers for k, v in answer["done"].items()}
                own = self._tried(lambda: str(commit(folder, job.step, files)), job) if is_rank0 else {}
                failure = self._failure(self._exchange(own))
            done = failure is None
        finally:
            if is_rank0 and partial is not None and not done:
                shutil.rmtree(partial, ignore_errors=True)
        if failure is None:
            self._written.append(job.step)
        if is_rank0 and failure is None:
            self._keep_newest(job.step)
        elif is_rank0:
            left = folders(self._root)
            logger.warning(
                "checkpoint of step %d was not written (%s): training continues, and %s",
                job.step,
                failure,
                f"the latest checkpoint is {left[-1].name}" if left else "there is no checkpoint yet",
            )
        return failure

    def _write_own(self, job: _Job, folder: Path) -> dict[str, Any]:
        """Write this rank's files and flush them; returns their manifest entries."""
        self._memory.wait()
        rank = self._world.rank
        job.part.write(folder / "tensors")
        random = folder / "random" / f"rank_{rank:05d}.json"
        random.write_text(job.random)
        own = [random, *rank_files(folder / "tensors", rank)]
        if self._world.is_rank0:
            (folder / "state.safetensors").write_bytes(to_bytes(job.control))
            (folder / "state.json").write_text(job.state)
            self._write_policy(folder / "policy", dict(job.policy))
            policy = (path for path in (folder / "policy").rglob("*") if path.is_file())
            own += [folder / "state.safetensors", folder / "state.json", *policy]
        for path in own:
            flush(path)
        return {path.relative_to(folder).as_posix(): describe(path) for path in own}

    def _keep_newest(self, step: int) -> None:
        try:
            written = (step_folder(self._root, each) for each in self._written)
            retain(self._root, step_folder(self._root, step), self._keep, written)
        except OSError as error:
            logger.warning("an old checkpoint could not be removed: %s", error)

    def _tried(self, act: Callable[[], Any], job: _Job) -> dict[str, Any]:
        """Result of `act`, or the disk's error; any other error is raised on every rank."""
        try:
            return {"done": act()}
        except (OSError, SafetensorError) as error:
            if isinstance(error, SafetensorError) and "os error" not in str(error):
                return {"error": f"{type(error).__name__}: {error}"}
            return {"disk": self._told(error, job)}
        except InputError as error:
            return {"input": str(error)}
        except BaseException as error:  # raised on every rank by _failure; one that ends this rank is told first, too
            logger.exception("a checkpoint could not be written")
            self._stopped = None if isinstance(error, Exception) else error
            return {"error": f"{type(error).__name__}: {error}"}

    def _told(self, error: Exception, job: _Job) -> str:
        path = getattr(error, "filename", None) or self._root
        reason = getattr(error, "strerror", None) or str(error)
        try:
            free = f", and {shutil.disk_usage(self._root).free} bytes are free"
        except OSError:
            free = ""
        return f"{path}: {reason}; the checkpoint needs about {job.bytes} bytes{free}"

    def _exchange(self, own: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self._world.gather_text(json.dumps(own))]

    def _failure(self, answers: list[dict[str, Any]]) -> str | None:
        """Disk error of any rank, or None. Raises any other error on all ranks, and one that ends this rank on it."""
        stopped, self._stopped = self._stopped, None
        if stopped is not None:
            raise stopped
        for kind, raised in (("input", InputError), ("error", TrainingError)):
            if told := self._by_rank(answers, kind):
                raise _of_all(raised(told if kind == "input" else f"a checkpoint could not be written: {told}"))
        return self._by_rank(answers, "disk") or None

    def _by_rank(self, answers: list[dict[str, Any]], kind: str) -> str:
        told = {rank: answer[kind] for rank, answer in enumerate(answers) if kind in answer}
        return "; ".join(text if len(answers) == 1 else f"rank {rank}: {text}" for rank, text in told.items())


def _of_all(error: Exception) -> Exception:
    error.add_note(EVERYWHERE)
    return error
