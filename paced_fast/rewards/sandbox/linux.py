"""Calls to the Linux kernel that Python has no function for, by ctypes. Runs inside the sandbox as well as outside."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import struct
from collections.abc import Iterable

NEWTIME, NEWNS, NEWCGROUP, NEWUTS = 0x80, 0x20000, 0x2000000, 0x4000000
NEWIPC, NEWUSER, NEWPID, NEWNET = 0x8000000, 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 1024, 2048, 4096, 16384, 1 << 18, 1 << 21
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 36, 38, 22
_SECCOMP_MODE_FILTER = 2

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
_LANDLOCK_VERSION = 1
TRUNCATION = 3
"""Version of Landlock from which on truncating a file is a right of its own."""
NOBODY = 65534
"""The user and group without rights."""
_READ = 1 << 2 | 1 << 3  # files, directories
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
# What a program may do below its scratch folder: read, write, remove, make folders, files and links, rename, truncate.
_SCRATCH = _READ | _WRITE_FILE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13 | _TRUNCATE
_NET, _SCOPES = 0b11, 0b11  # bind and connect by TCP; abstract sockets and signals


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """A function of the C library; OSError with its name when it returns -1."""
    result = getattr(_libc(), name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def _syscall(name: str, number: int, *arguments: object) -> int:
    plain = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    try:
        return call("syscall", ctypes.c_long(number), *plain)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None


def unshare(flags: int) -> None:
    """Leave namespaces of the caller; new process ids begin with its next child."""
    call("unshare", flags)


def join_pid_namespace(descriptor: int) -> None:
    """Children are born in the namespace of `descriptor` again."""
    call("setns", descriptor, NEWPID)


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    try:
        call("mount", *words, ctypes.c_ulong(flags), data.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"mount {target}") from None


def bind_read_only(source: str, target: str) -> None:
    """Show the file or folder `source` at `target`, not to be written."""
    mount(source, target, None, MS_BIND | MS_REC)
    # In a user namespace flags that the mount has already must be given again; those of statvfs are those of mount(2),
    # relatime aside.
    old = os.statvfs(target).f_flag
    kept = old & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME) | (MS_RELATIME if old & 4096 else 0)
    is_device = target.startswith("/dev/")
    wanted = MS_NOSUID | (0 if is_device else MS_RDONLY | MS_NODEV)
    mount("none", target, None, MS_BIND | MS_REMOUNT | wanted | kept)


def pivot_root(new: str, old: str) -> None:
    """`new` becomes the root, what was the root is then at `old`."""
    _syscall("pivot_root", _PIVOT_ROOT[platform.machine()], new.encode(), old.encode())


def detach(target: str) -> None:
    """Unmount with everything below."""
    call("umount2", target.encode(), _MNT_DETACH)


def become_subreaper() -> None:
    """Orphans below become children of the caller instead of process 1's."""
    call("prctl", _PR_SET_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """SIGKILL when the thread that forked this process ends."""
    call("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)


def drop_capabilities() -> None:
    """No capability left, and none to be had again."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    call("capset", header, ctypes.create_string_buffer(24))


def forbid_new_privileges() -> None:
    """No setuid program helps from here on; Landlock and seccomp ask for this."""
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def hide_memory() -> None:
    """No core dump, and no process of the same user may look into this one."""
    call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def use_one_arena() -> None:
    """Threads share malloc's arena: one of their own reserves 64 MiB of address space, which is limited."""
    with contextlib.suppress(AttributeError):  # another C library
        _libc().mallopt(-8, 1)


def apply_filter(program: bytes) -> None:
    """Install a seccomp program for the calling thread and all that it starts."""
    code = ctypes.create_string_buffer(program, len(program))
    pointer = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer, 0, 0)


def has_seccomp() -> bool:
    """Whether the kernel takes seccomp filters: a null program is a bad address to one that does."""
    try:
        call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    except OSError as error:
        return error.errno == 14
    return False


def landlock_abi() -> int:
    """Version of Landlock; 0 where the kernel has none or it is switched off."""
    try:
        return _syscall("landlock", _LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION)
    except OSError:
        return 0


def restrict_files(abi: int, readable: Iterable[str], writable: Iterable[str]) -> None:
    """Landlock: only these paths may be read or written from here on, no TCP, no signals out (as `abi` allows)."""
    handled = (1 << 13 if abi < 2 else 1 << 14 if abi < 3 else 1 << 15 if abi < 5 else 1 << 16) - 1
    attributes = struct.pack("=QQQ", handled, _NET, _SCOPES)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _syscall("landlock", _LANDLOCK_CREATE, attributes, len(attributes), 0)
    for paths, access in ((readable, _READ), (writable, _SCRATCH)):
        for path in paths:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # what is not there need not be allowed
            # Only rights of files may be given to one.
            is_folder = os.path.isdir(path)
            allowed = access & handled & (-1 if is_folder else 1 << 2 | _WRITE_FILE | _TRUNCATE)
            rule = struct.pack("=Qi", allowed, descriptor)
            _syscall("landlock", _LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(descriptor)
    _syscall("landlock", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)
