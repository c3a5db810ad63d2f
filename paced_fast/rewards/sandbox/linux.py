"""Linux system calls for which Python has no function, by ctypes. Used both inside and outside the sandbox."""

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
"""First version of Landlock in which truncating a file is a separate right."""
NOBODY = 65534
"""User and group id without rights."""
_READ = 1 << 2 | 1 << 3  # files, directories
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
# Rights of a program below its scratch folder: read, write, remove, make folders, files and links, rename, truncate.
_SCRATCH = _READ | _WRITE_FILE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13 | _TRUNCATE
_NET, _SCOPES = 0b11, 0b11  # bind and connect by TCP; abstract sockets and signals


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library. Raise OSError with its name if it returns -1."""
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
    """Move the caller to new namespaces; a new process-id namespace begins with its next child."""
    call("unshare", flags)


def join_pid_namespace(descriptor: int) -> None:
    """Start the caller's future children in the process-id namespace of `descriptor` again."""
    call("setns", descriptor, NEWPID)


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Call mount(2); an OSError names the target."""
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    try:
        call("mount", *words, ctypes.c_ulong(flags), data.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"mount {target}") from None


def bind_read_only(source: str, target: str) -> None:
    """Bind-mount the file or folder `source` at `target`, read-only (devices stay writable)."""
    mount(source, target, None, MS_BIND | MS_REC)
    # In a user namespace, flags that the mount already has must be repeated. statvfs and mount(2) use the same bits,
    # except for relatime.
    old = os.statvfs(target).f_flag
    kept = old & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME) | (MS_RELATIME if old & 4096 else 0)
    is_device = target.startswith("/dev/")
    wanted = MS_NOSUID | (0 if is_device else MS_RDONLY | MS_NODEV)
    mount("none", target, None, MS_BIND | MS_REMOUNT | wanted | kept)


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root and move the old root to `old`."""
    _syscall("pivot_root", _PIVOT_ROOT[platform.machine()], new.encode(), old.encode())


def detach(target: str) -> None:
    """Unmount `target` with everything below it."""
    call("umount2", target.encode(), _MNT_DETACH)


def become_subreaper() -> None:
    """Make orphaned descendants children of the caller instead of process 1."""
    call("prctl", _PR_SET_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel send SIGKILL to this process when the thread that forked it ends."""
    call("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)


def drop_capabilities() -> None:
    """Drop all capabilities for good."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    call("capset", header, ctypes.create_string_buffer(24))


def forbid_new_privileges() -> None:
    """Deny setuid programs any new privileges from now on; Landlock and seccomp require this."""
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def hide_memory() -> None:
    """Disable core dumps, and deny other processes of the same user access to this one's memory."""
    call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def use_one_arena() -> None:
    """Make all threads share one malloc arena: others would each reserve 64 MiB of the limited address space."""
    with contextlib.suppress(AttributeError):  # another C library
        _libc().mallopt(-8, 1)


def apply_filter(program: bytes) -> None:
    """Install a seccomp program for the calling thread and all its descendants."""
    code = ctypes.create_string_buffer(program, len(program))
    pointer = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer, 0, 0)


def has_seccomp() -> bool:
    """Return True if the kernel supports seccomp filters; if so, a null program gives EFAULT."""
    try:
        call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    except OSError as error:
        return error.errno == 14
    return False


def landlock_abi() -> int:
    """Return the version of Landlock; 0 if the kernel lacks it or it is disabled."""
    try:
        return _syscall("landlock", _LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION)
    except OSError:
        return 0


def restrict_files(abi: int, readable: Iterable[str], writable: Iterable[str]) -> None:
    """Restrict this process by Landlock to these paths; no TCP, no signals to outside (as far as `abi` supports)."""
    handled = (1 << 13 if abi < 2 else 1 << 14 if abi < 3 else 1 << 15 if abi < 5 else 1 << 16) - 1
    attributes = struct.pack("=QQQ", handled, _NET, _SCOPES)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _syscall("landlock", _LANDLOCK_CREATE, attributes, len(attributes), 0)
    for paths, access in ((readable, _READ), (writable, _SCRATCH)):
        for path in paths:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # a missing path needs no rule
            # A rule for a file may contain only the rights of files.
            is_folder = os.path.isdir(path)
            allowed = access & handled & (-1 if is_folder else 1 << 2 | _WRITE_FILE | _TRUNCATE)
            rule = struct.pack("=Qi", allowed, descriptor)
            _syscall("landlock", _LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(descriptor)
    _syscall("landlock", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)
