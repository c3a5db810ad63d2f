"""Run torchrun many times without importing torch each time: one process loads everything and forks.

    python -m benchmarks.faults.fork_launcher   # a job per line of stdin, an answer per line of stdout

A job is {"id", "arguments", "env", "cwd", "log"}: torchrun's command line, additions to the environment, working
folder and output file. The answers are {"id", "pid"} when it has started and {"id", "status"} when it has ended. The
elastic agent is torch's own; the only difference is that ranks are forked from it instead of executed.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import benchmarks.faults.faulty_rank  # noqa: F401  (what every rank needs, loaded once)


class Forked(subprocess.Popen[bytes]):
    """Forked rank with the interface of a process started by the agent."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.args, self.returncode, self._child_created = words, None, True
        self.stdin = self.stdout = self.stderr = None
        self._waitpid_lock = threading.Lock()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(words, env)


def _become(words: list[str], env: dict[str, str]) -> None:
    """Run `python -u -m MODULE ARGUMENTS` in this process; never returns."""
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        at = words.index("-m")
        sys.argv = words[at + 1 :]
        runpy.run_module(words[at + 1], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # any exception: like an executed rank, print it and fail
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _popen(self: Any, args: tuple[str, ...], env: dict[str, str]) -> Forked:
    return Forked(list(args), env)


def _launch(job: dict[str, Any]) -> int:
    """Fork a process that runs torchrun and return its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for descriptor, source in ((0, null), (1, log), (2, log)):
            os.dup2(source, descriptor)
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        subprocess_handler.SubprocessHandler._popen = _popen  # type: ignore[method-assign]
        run.main(job["arguments"])
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Serve until standard input ends."""
    running: dict[int, str] = {}
    pending, is_open = b"", True
    while is_open or running:
        if is_open and select.select([0], [], [], 0.05)[0]:
            data = os.read(0, 1 << 16)
            is_open = bool(data)
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                job = json.loads(line)
                pid = _launch(job)
                running[pid] = job["id"]
                _answer({"id": job["id"], "pid": pid})
        elif not is_open:
            time.sleep(0.05)
        for pid in list(running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                _answer({"id": running.pop(pid), "status": os.waitstatus_to_exitcode(status)})


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
