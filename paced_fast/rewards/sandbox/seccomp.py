"""Seccomp filters as lists of allowed system calls, assembled here without a library.

Every other call fails with EPERM; clone3 fails with ENOSYS, so that the C library falls back to clone, whose flags a
filter can read. A filter for one architecture kills a process that makes calls of another; x32 calls have different
numbers, which are not listed.
"""

from __future__ import annotations

import platform
import struct

from paced_fast.rewards.sandbox import linux

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}

_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026

# name: its numbers on x86_64 and aarch64 (None if there is none), the most frequent first.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "futex": (202, 98),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "newfstatat": (262, 79),
    "openat": (257, 56),
    "fstat": (5, 80),
    "close": (3, 57),
    "lseek": (8, 62),
    "brk": (12, 214),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "getdents64": (217, 61),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "open": (2, None),
    "creat": (85, None),
    "close_range": (436, 436),
    "stat": (4, None),
    "lstat": (6, None),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "fadvise64": (221, 223),
    "utimensat": (280, 88),
    "umask": (95, 166),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "msync": (26, 227),
    "mincore": (27, 232),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigtimedwait": (128, 137),
    "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "getcpu": (309, 168),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "wait4": (61, 260),  # harmless: there are no children
    "waitid": (247, 95),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "setrlimit": (160, 164),  # hard limits cannot be raised
    "times": (100, 153),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "alarm": (37, None),
    "pause": (34, None),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    "restart_syscall": (219, 128),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrandom": (318, 278),
    "arch_prctl": (158, None),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
_CLONE, _CLONE3, _IOCTL, _FCNTL = (56, 220), (435, 435), (16, 29), (72, 25)
# Calls that act on names without the right to write: on the trainer's files too if the program has the same user.
_ON_NAMES = {"chmod", "fchmod", "fchmodat", "utimensat", "truncate", "link", "linkat", "symlink", "symlinkat", "rename"}
_ON_NAMES |= {"renameat", "renameat2", "mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "creat"}
_PRLIMIT, _KILL_CALL, _TGKILL = (302, 261), (62, 129), (234, 131)

# Calls that the harness also needs between the start of an interpreter and its own filter.
_STARTING: dict[str, tuple[int | None, int | None]] = {
    "execve": (59, 221),
    "mount": (165, 40),
    "prctl": (157, 167),
    "seccomp": (317, 277),
    "capset": (126, 91),
    "setsid": (112, 157),
    "set_tid_address": (218, 96),
    # A call must pass both filters, and the second one checks the process id.
    "prlimit64": _PRLIMIT,
    "kill": _KILL_CALL,
    "tgkill": _TGKILL,
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}

_CLONE_THREAD = 0x10000
_NEW_NAMESPACES = (
    linux.NEWTIME
    | linux.NEWNS
    | linux.NEWCGROUP
    | linux.NEWUTS
    | linux.NEWIPC
    | linux.NEWUSER
    | linux.NEWPID
    | linux.NEWNET
)
# TCGETS, FIONBIO, FIONREAD, FIONCLEX, FIOCLEX, TIOCGWINSZ, which opening a file uses; above all not TIOCSTI.
_HARMLESS_IOCTLS = (0x5401, 0x5421, 0x541B, 0x5450, 0x5451, 0x5413)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC, F_SETPIPE_SZ, F_GETPIPE_SZ: no locks, which other programs could
# see, and no owner, to which signals would be sent.
_HARMLESS_FCNTLS = (0, 1, 2, 3, 1030, 1031, 1032)
_SET_FLAGS, _O_ASYNC = 4, 0x2000


def has_table(machine: str = "") -> bool:
    """Return True if the table has the call numbers of this machine's architecture."""
    return (machine or platform.machine()) in ARCHITECTURES


def lowest_filter(pid: int, machine: str = "", *, has_scratch: bool = True) -> bytes:
    """Return the filter of a running program: threads but no processes, no sockets, signals only to its own id `pid`.

    Without a scratch folder, the only calls on file names are those that open or inspect a file.
    """
    allowed = {name: _ALLOWED[name] for name in _ALLOWED if has_scratch or name not in _ON_NAMES}
    return _assemble(machine or platform.machine(), allowed, pid)


def starting_filter(machine: str = "") -> bytes:
    """Return the filter of an interpreter that has yet to start and to install `lowest_filter`."""
    return _assemble(machine or platform.machine(), {**_ALLOWED, **_STARTING}, None)


_Code = list[tuple[int, int, int, int]]  # operation, jump if true, jump if false, constant


def _assemble(machine: str, allowed: dict[str, tuple[int | None, int | None]], pid: int | None) -> bytes:
    column = _COLUMN[machine]
    code = _load(4)
    code += [(_EQUAL, 1, 0, ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL)]
    code += _load(0)
    for numbers in allowed.values():
        number = numbers[column]
        if number is not None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code += _only_if(_CLONE[column], 0, [_CLONE_THREAD], mask=_CLONE_THREAD | _NEW_NAMESPACES)
    code += _only_if(_IOCTL[column], 1, list(_HARMLESS_IOCTLS))
    code += _only_harmless_fcntl(_FCNTL[column])
    if pid is not None:
        code += _only_if(_PRLIMIT[column], 0, [0, pid])
        code += _only_if(_KILL_CALL[column], 0, [pid])
        code += _only_if(_TGKILL[column], 0, [pid])
    code += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ENOSYS)]
    return _pack([*code, (_RETURN, 0, 0, _EPERM)])


def _load(offset: int) -> _Code:
    return [(_LOAD, 0, 0, offset)]


def _only_if(number: int, argument: int, values: list[int], mask: int | None = None) -> _Code:
    """Allow call `number` if the masked low word of an argument is one of `values`; both machines are little-endian."""
    body = _load(16 + 8 * argument)
    if mask is not None:
        body.append((_AND, 0, 0, mask))
    # Each comparison jumps to the last instruction, which allows the call.
    body += [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    body += [(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, len(body), number), *body]


def _only_harmless_fcntl(number: int) -> _Code:
    flags = [(_EQUAL, 0, 3, _SET_FLAGS), *_load(16 + 8 * 2), (_AND, 0, 0, _O_ASYNC), (_EQUAL, 1, 0, 0)]
    count = len(_HARMLESS_FCNTLS) + len(flags)
    body = [*_load(16 + 8), *((_EQUAL, count - i, 0, value) for i, value in enumerate(_HARMLESS_FCNTLS)), *flags]
    body += [(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, len(body), number), *body]


def _pack(code: _Code) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
