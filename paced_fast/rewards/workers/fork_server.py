"""The program behind a `WorkerPool`: loads a judge once, then forks a worker for each socket it is handed.

    python -P fork_server.py FILE MEMORY_BYTES      # its standard input is the pool's control socket

FILE defines `judge(request) -> reply` on JSON values, and may define `prepare()`, called once before the first fork, so
that a new worker is warm and costs a fork. Run as a file, without the package: a worker must not import torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import sys
from typing import Any

_SET_PDEATHSIG = 1
_REPLIES_BETWEEN_LOOKS = 32
_PAGE_BYTES = resource.getpagesize()


def main() -> None:
    """Serves until the pool closes its end or is gone; the workers end with this process."""
    path, memory_bytes = sys.argv[1], int(sys.argv[2])
    pool = os.getppid()
    with socket.socket(fileno=0) as control:
        try:
            spec = importlib.util.spec_from_file_location("judge", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            getattr(module, "prepare", lambda: None)()
        except Exception as error:  # whatever it is, the pool has to say it
            control.sendall(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode() + b"\n")
            return
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
        control.sendall(b'{"ready": true}\n')
        # The parent's id beside the end of the socket: a child of the pool's process may hold that open.
        while os.getppid() == pool:
            if not select.select([control], [], [], 1.0)[0]:
                continue
            data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not data:
                return
            if os.fork() == 0:
                control.detach()
                _work(module.judge, socket.socket(fileno=descriptors[0]), memory_bytes)
            os.close(descriptors[0])


def _work(judge: Any, connection: socket.socket, memory_bytes: int) -> None:
    """The life of a worker: never returns."""
    try:
        server = os.getppid()
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            return
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        size, resident = _memory_bytes()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = size + memory_bytes if hard == resource.RLIM_INFINITY else min(size + memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        connection.sendall(json.dumps({"pid": os.getpid()}).encode() + b"\n")
        lines = connection.makefile("rb")
        for count, line in enumerate(lines, start=1):
            connection.sendall(json.dumps({"reply": judge(json.loads(line))}).encode() + b"\n")
            if count % _REPLIES_BETWEEN_LOOKS == 0 and _memory_bytes()[1] > resident + memory_bytes // 4:
                connection.sendall(b'{"retired": true}\n')
                return
    finally:
        os._exit(0)  # the pool sees the end of the socket, whatever happened here


def _memory_bytes() -> tuple[int, int]:
    """Virtual and resident size of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size, resident = file.read().split()[:2]
    return int(size) * _PAGE_BYTES, int(resident) * _PAGE_BYTES


if __name__ == "__main__":
    main()
