"""Server program of a `WorkerPool`: load a judge once, then fork a worker for each socket received.

    python -P fork_server.py FILE MEMORY_BYTES      # standard input is the pool's control socket

FILE defines `judge(request) -> reply` on JSON values. It may define `prepare()`, called once before the first fork, so
that a new worker is warm and costs only a fork. Runs as a file, without the package: a worker must not import torch.
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
    """Serve until the pool closes its end or dies; the workers end with this process."""
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
        except Exception as error:  # of any kind: the pool reports it
            control.sendall(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode() + b"\n")
            return
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
        control.sendall(b'{"ready": true}\n')
        # Check the parent's id as well as the socket's end: a child of the pool's process may keep the socket open.
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
    """Run a worker: answer requests until the connection ends. Never returns."""
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
        os._exit(0)  # in every case the pool sees the end of the socket


def _memory_bytes() -> tuple[int, int]:
    """Return the virtual and resident size of this process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size, resident = file.read().split()[:2]
    return int(size) * _PAGE_BYTES, int(resident) * _PAGE_BYTES


if __name__ == "__main__":
    main()
