"""Server process that starts and reaps programs, one at a time; it holds neither tests nor programs itself.

Its standard input is a socket. A request is one JSON object with five descriptors: the program's input, output and
errors, and the two of the harness. The reply is a pidfd of the new process and, when that has ended, its status.

Kinds: `fork` (a fork of this process, with Python's library already loaded), `bwrap` and `plain` (a new interpreter).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import select
import signal
import socket
import sys
from typing import Any

from paced_fast.rewards.sandbox import harness, linux, seccomp

# Path of this package for a program's own interpreter: its real path may be hidden and need not be known.
_PACKAGE = "/harness"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SCRATCH_FLAGS = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
_MAX_FILES = 1000
_PRELOADED = (
    *("array", "ast", "base64", "bisect", "calendar", "cmath", "collections", "contextlib", "copy", "dataclasses"),
    *("datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "io", "itertools", "json", "math"),
    *("operator", "pprint", "queue", "random", "re", "statistics", "string", "textwrap", "threading", "time"),
    *("traceback", "typing", "unittest", "uuid"),
)


def main() -> None:
    """Serve until the other end of the socket closes. The settings are the last argument, as JSON."""
    settings = json.loads(sys.argv.pop())
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    try:
        served = Keeper(settings, channel)
        hello = {"layers": served.layers, "missing": served.missing}
    except OSError as error:
        _send(channel, {"failed": f"{error.filename or 'start'}: {error.strerror}"})
        return
    _send(channel, hello)
    served.serve()


class Keeper:
    """State of the server: its settings, and the layers of isolation that are active or missing."""

    def __init__(self, settings: dict[str, Any], channel: socket.socket) -> None:
        self.settings, self.channel = settings, channel
        self.kind: str = settings["kind"]
        self.package: str = settings["package"]
        self.missing: list[str] = []
        self.layers: dict[str, Any] = {"namespaces": False, "uid": None, "landlock": 0, "seccomp": False}
        self._pid_namespace = -1
        self._filter = -1
        linux.become_subreaper()
        if self.kind == "plain":
            return
        self.layers["landlock"] = linux.landlock_abi()
        self.layers["seccomp"] = seccomp.has_table() and linux.has_seccomp()
        if not self.layers["landlock"]:
            self.missing.append("Landlock (Linux 5.13 or newer with the security module landlock)")
        if not self.layers["seccomp"]:
            self.missing.append(f"seccomp filters (for {platform.machine()})")
        if os.geteuid() == 0:
            self.layers["uid"] = settings["uid"]
        if self.kind == "fork":
            linux.use_one_arena()
            harness.add_packages(settings["packages"])
            for name in (*_PRELOADED, *settings["modules"]):
                importlib.import_module(name)
            try:
                self._isolate()
                self.layers["namespaces"] = True
            except OSError as error:
                self.missing.append(f"namespaces ({error.filename}: {error.strerror})")
                if 0 < self.layers["landlock"] < linux.TRUNCATION:
                    self.missing.append(f"Landlock {linux.TRUNCATION} (Linux 6.2), which is needed without them")
            gc.collect()
            gc.freeze()
        else:
            self.layers["namespaces"] = True
            if os.geteuid() == 0:
                # bubblewrap runs as another user, who may lack access to the folders above the interpreter.
                _named("unshare", linux.unshare, linux.NEWNS)
                linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
                _new_root([*settings["binds"], settings["bwrap"], "/proc"], settings["links"], self.package)
                self.package = _PACKAGE
            self._filter = os.memfd_create("filter")
            os.write(self._filter, seccomp.starting_filter() if self.layers["seccomp"] else b"")

    def _isolate(self) -> None:
        """Leave the machine's namespaces and file system: children cannot see what the keeper cannot see."""
        uid, gid = os.geteuid(), os.getegid()
        flags = linux.NEWNS | linux.NEWNET | linux.NEWUTS | linux.NEWIPC | linux.NEWPID
        proc = os.open("/proc", os.O_PATH)
        if uid == 0:
            _named("unshare", linux.unshare, flags)
        else:
            _named("unshare of a user namespace", linux.unshare, flags | linux.NEWUSER)
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                _write_at(proc, f"self/{name}", text)
        first = os.fork()  # process 1 of the new namespace: everything in it ends with this one
        if first:
            self.channel.close()
            _, status = os.waitpid(first, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 255)
        linux.die_with_parent()
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        _new_root(self.settings["binds"], self.settings["links"])
        os.close(proc)

    def serve(self) -> None:
        """Serve requests, one program after another."""
        while True:
            message, descriptors, _, _ = socket.recv_fds(self.channel, 1 << 16, 5)
            if not message:
                return
            request = json.loads(message)
            pid = self._start(request, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            pidfd = os.pidfd_open(pid)
            socket.send_fds(self.channel, [b"started\n"], [pidfd])
            self._wait(pid, pidfd)

    def _wait(self, pid: int, pidfd: int) -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(self.channel, select.POLLHUP)
        while not any(descriptor == pidfd for descriptor, _ in poll.poll()):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # the client is gone
            poll.unregister(self.channel)
        os.close(pidfd)
        _, status, usage = os.wait4(pid, 0)
        self._reap()
        cpu = usage.ru_utime + usage.ru_stime
        _send(self.channel, {"status": os.waitstatus_to_exitcode(status), "cpu": cpu, "peak_kib": usage.ru_maxrss})

    def _reap(self) -> None:
        """Kill and reap the processes that a program left behind: orphans become children of this process."""
        while True:
            if self.kind == "plain":
                for child in _children():
                    os.kill(child, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return

    def _start(self, request: dict[str, Any], descriptors: list[int]) -> int:
        inner = {
            "limits": request["limits"],
            "restricted": self.kind != "plain",
            "landlock": self.layers["landlock"],
            "seccomp": self.layers["seccomp"],
            "readable": [*self.settings["binds"], *DEVICES],
            "scratch": self.layers["namespaces"],
            "packages": self.settings["packages"],
            "others": 0,  # tasks of the same user, added to the thread limit so that they do not use it up
        }
        if self.kind == "fork" and self.layers["namespaces"]:
            linux.unshare(linux.NEWPID)
            inner["others"] = 0 if self.layers["uid"] else 2  # the keeper and its parent, in their user namespace
        elif self.kind != "bwrap":  # the user namespace of bwrap has its own count
            inner["others"] = _tasks_of(self.layers["uid"] or os.geteuid())
        pid = os.fork()
        if pid == 0:
            try:
                self._become(inner, descriptors)
            except BaseException as error:
                os.write(harness.ANSWERS, f"failed: {type(error).__name__}: {error}\n".encode())
            os._exit(1)
        if self.kind == "fork" and self.layers["namespaces"]:
            linux.join_pid_namespace(self._pid_namespace)
        return pid

    def _become(self, inner: dict[str, Any], descriptors: list[int]) -> None:
        """Become the program, in the child. Never returns."""
        # Duplicate the descriptors above 0 to 4 first, then move them there.
        high = [os.dup(descriptor) for descriptor in descriptors]
        for target, descriptor in enumerate(high):
            os.dup2(descriptor, target, inheritable=True)
        os.setsid()
        if self.kind == "fork":
            os.closerange(5, 1 << 16)
            if self.layers["namespaces"]:
                linux.unshare(linux.NEWNS | linux.NEWIPC)
                _mount_scratch(inner["limits"]["file_mib"])
                os.chdir(harness.SCRATCH)
            self._drop_uid()
            harness.lock(inner)
            harness.run()
        python = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", self.settings["boot"]]
        if self.kind == "plain":
            os.closerange(5, 1 << 16)
            os.chdir("/")
            os.execve(python[0], [*python, "harness", self.settings["package"], json.dumps(inner)], {})
        self._drop_uid()
        os.lseek(self._filter, 0, os.SEEK_SET)
        os.set_inheritable(self._filter, True)
        words = self._bubblewrap(inner["limits"]["file_mib"])
        os.execve(words[0], [*words, *python, "harness", _PACKAGE, json.dumps(inner)], {})

    def _drop_uid(self) -> None:
        uid = self.layers["uid"]
        if uid is not None:
            os.setgroups([])
            os.setresgid(linux.NOBODY, linux.NOBODY, linux.NOBODY)
            os.setresuid(uid, uid, uid)

    def _bubblewrap(self, scratch_mib: int) -> list[str]:
        """Return the command line of bubblewrap."""
        words = [
            self.settings["bwrap"],
            "--unshare-user",
            "--unshare-all",
            "--die-with-parent",
            "--new-session",
            "--as-pid-1",
        ]
        words += ["--clearenv", "--uid", str(linux.NOBODY), "--gid", str(linux.NOBODY), "--hostname", "sandbox"]
        for path in self.settings["binds"]:
            words += ["--ro-bind", path, path]
        words += ["--ro-bind", self.package, _PACKAGE]
        for link, target in self.settings["links"].items():
            words += ["--symlink", target, link]
        for path in DEVICES:
            words += ["--dev-bind", path, path]
        words += ["--size", str(scratch_mib << 20), "--tmpfs", harness.SCRATCH, "--remount-ro", "/"]
        words += ["--cap-add", "CAP_SYS_ADMIN"]  # in its user namespace, until the scratch folder is limited
        words += ["--chdir", harness.SCRATCH]
        if self.layers["seccomp"]:
            words += ["--seccomp", str(self._filter)]
        return [*words, "--"]


def inside() -> None:
    """Run one program in a new interpreter; its entry point. Never returns."""
    settings = json.loads(sys.argv.pop())
    try:
        os.closerange(5, 1 << 16)
        linux.use_one_arena()
        harness.add_packages(settings["packages"])
        if settings["restricted"]:
            linux.mount("none", harness.SCRATCH, None, linux.MS_REMOUNT | _SCRATCH_FLAGS, f"nr_inodes={_MAX_FILES}")
        harness.lock(settings)
    except BaseException as error:
        os.write(harness.ANSWERS, f"failed: {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    harness.run()


def _new_root(binds: list[str], links: dict[str, str], package: str | None = None) -> None:
    """Replace the file system by one with only these paths and this package, read-only."""
    linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755,size=1m")
    os.mkdir("/tmp/old")
    linux.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    if package is not None:
        os.mkdir(_PACKAGE)
        linux.bind_read_only(f"/old{package}", _PACKAGE)
    for path in (*binds, *DEVICES):
        if os.path.isdir(f"/old{path}"):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
        if path == "/proc":
            linux.mount("/old/proc", path, None, linux.MS_BIND | linux.MS_REC)
        else:
            linux.bind_read_only(f"/old{path}", path)
    for link, target in links.items():
        os.symlink(target, link)
    os.mkdir(harness.SCRATCH)
    linux.detach("/old")
    os.rmdir("/old")
    linux.mount("none", "/", None, linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV)


def _mount_scratch(mib: int) -> None:
    data = f"mode=1777,size={mib}m,nr_inodes={_MAX_FILES}"
    linux.mount("tmpfs", harness.SCRATCH, "tmpfs", _SCRATCH_FLAGS, data)


def _named(name: str, function: Any, *arguments: Any) -> None:
    try:
        function(*arguments)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None


def _write_at(folder: int, name: str, text: str) -> None:
    descriptor = os.open(name, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(word) for word in file.read().split()]


def _tasks_of(uid: int) -> int:
    """Return the number of a user's tasks (processes and threads), which share one limit; 0 if it is not visible."""
    total = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                total += len(os.listdir(f"/proc/{entry.name}/task"))
        except OSError:
            continue  # it ended
    return total


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")
