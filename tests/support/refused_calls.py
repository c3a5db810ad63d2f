"""A kernel that refuses some system calls, played by a filter: for messages about machines that are more closed."""

from __future__ import annotations

import platform
import struct

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: load a word of the call, compare it, return
_EPERM, _ALLOW = 0x0005_0001, 0x7FFF_0000  # what seccomp does then
_COLUMN = {"x86_64": 0, "aarch64": 1}


def refusing_filter(numbers: dict[str, tuple[int, int]]) -> bytes:
    """Filter under which only these calls fail (EPERM); a call has its number on x86_64 and on aarch64."""
    column = _COLUMN[platform.machine()]
    code = [(_LOAD, 0, 0, 0)]  # the number of the call
    for number in numbers.values():
        code += [(_EQUAL, 0, 1, number[column]), (_RETURN, 0, 0, _EPERM)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
