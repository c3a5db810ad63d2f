"""Rank of a run that fails at a given place: `python -m paced_fast.train` with an injected fault.

    PACED_FAULT='{"kind": "kill", "rank": 1, "phase": "reward", "step": 3, "once": FILE}' \
        torchrun --nproc-per-node 2 --max-restarts 3 -m benchmarks.faults.faulty_rank tiny ...

The fault happens once: FILE is created just before it. The package itself has no fault code.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paced_fast import train
from paced_fast.data.distributed import Queue
from paced_fast.generation import TransformersGenerator
from paced_fast.paced.trainer import Trainer
from paced_fast.policy import Policy
from paced_fast.policy.optimizer import PolicyOptimizer
from paced_fast.rewards import Scorer
from paced_fast.run import evaluate_policy
from paced_fast.run.checkpoint import save

PHASES = ("build", "generate", "reward", "update", "evaluate", "save")
KINDS = ("kill", "stop", "raise", "exit")
TAKE = "take"
"""A place inside a phase: right behind the first take of the step from the queue that the ranks share."""


class InjectedError(Exception):
    """Exception that no part of the package expects."""


class Fault:
    """Fault in one phase of one step on one rank."""

    def __init__(self, *, kind: str, rank: int, phase: str, step: int, once: str) -> None:
        self.kind, self.phase, self.step, self.once = kind, phase, step, Path(once)
        self.is_here = int(os.environ.get("RANK", "0")) == rank
        self.now = 0
        """Current step."""
        self.evaluating = False

    def strike(self) -> None:
        """Cause the fault, unless it has already happened."""
        if self.once.exists():
            return
        self.once.write_text(str(time.time()))
        own = os.getpid()
        if self.kind == "kill":
            os.kill(own, signal.SIGKILL)
        elif self.kind == "stop":
            os.kill(own, signal.SIGSTOP)
        elif self.kind == "raise":
            raise InjectedError(f"injected in {self.phase}")
        elif self.kind == "exit":
            sys.exit(0)
        elif self.kind == "hang":
            time.sleep(3600)
        else:
            os.kill(own, signal.Signals[self.kind])
            time.sleep(0.05)  # give the handler's thread time to act

    def before(self, owner: Any, name: str, *phases: str) -> None:
        """Cause the fault at the beginning of a call, if it is the configured place."""
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def call(*arguments: Any, **options: Any) -> Any:
            if self.is_here and self.phase in phases and (self.phase == "build" or self.now == self.step):
                self.strike()
            return original(*arguments, **options)

        setattr(owner, name, call)


def _while_training(fault: Fault, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` such that a fault of a training phase does not happen in an evaluation."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        step, fault.now = fault.now, -1
        try:
            return function(*arguments, **options)
        finally:
            fault.now = step

    return call


def install(fault: Fault) -> None:
    """Inject the fault into the package's functions."""
    step = Trainer.step

    def counted(self: Trainer, number: int, *rest: Any) -> Any:
        fault.now = number
        return step(self, number, *rest)

    Trainer.step = counted
    evaluate_policy.evaluate = _while_training(fault, evaluate_policy.evaluate)
    fault.before(evaluate_policy, "evaluate", "evaluate")
    fault.before(_generator_class(), "generate_taken", "generate")  # which `generate` of transformers calls too
    fault.before(Scorer, "score", "reward")
    fault.before(PolicyOptimizer, "clip_and_step", "update")
    fault.before(Policy, "embed", "build")
    # Rank 0 fails in its writing thread, after the policy is on disk. Only the main thread can exit; a signal comes
    # while it is there, because the thread may write when the last step is under way, which no signal stops.
    if os.environ.get("RANK", "0") == "0" and fault.kind in ("kill", "stop", "raise", "hang"):
        _in_the_writing_thread(fault)
    else:
        fault.before(save.Saver, "save", "save")


def write_takes(fault: Fault, path: Path) -> None:
    """Append what each rank takes from the queues to `path`, a line each; cause the fault behind a take.

    The other rank waits for the faulty one, which would otherwise find the queue empty at times.
    """
    take = Queue.take
    own = {"attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), "rank": int(os.environ.get("RANK", "0"))}

    def taken(self: Queue, most: int, count: int) -> range:
        is_here = fault.phase == TAKE and fault.now == fault.step
        while is_here and not fault.is_here and not fault.once.exists():
            time.sleep(0.01)
        found = take(self, most, count)
        if found:
            line = {**own, "step": fault.now, "queue": self._name, "count": count, "taken": list(found)}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if is_here and fault.is_here:
                fault.strike()
        return found

    Queue.take = taken


def _in_the_writing_thread(fault: Fault) -> None:
    """Cause the fault before a file of the step's checkpoint is hashed; the main thread may be a step ahead."""
    write, describe = save.Saver._write_own, save.describe
    saving: list[int] = []

    def writes(self: Any, job: Any, folder: Path) -> Any:
        saving[:] = [job.step]
        return write(self, job, folder)

    def describes(path: Path) -> Any:
        if fault.is_here and fault.phase == "save" and saving == [fault.step]:
            fault.strike()
        return describe(path)

    save.Saver._write_own = writes
    save.describe = describes


def _generator_class() -> Any:
    return TransformersGenerator


def main() -> None:
    """Train with the fault given in the environment, or without one."""
    torch.set_num_threads(1)
    if described := os.environ.get("PACED_FAULT"):
        options = json.loads(described)
        with Path(options["once"]).with_name("starts").open("a") as file:
            file.write(os.environ.get("RANK", "0"))
        fault = Fault(**options)
        install(fault)
        write_takes(fault, fault.once.with_name("taken"))
    train.main()


if __name__ == "__main__":
    main()
