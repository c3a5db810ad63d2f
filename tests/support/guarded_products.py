"""Multiply operands that end, or begin, at a page that may not be read: a process that reads beside them is killed."""

import ctypes
import mmap
import random

import torch
from torch import Tensor

from paced_kernels._host_products import multiply

LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
SIDES = (1, 2, 3, 6, 7, 17, 63, 65, 95, 97, 1025)
DEPTHS = (1, 2, 3, 31, 33, 640, 641)


def guarded(rows: int, columns: int, dtype: torch.dtype, held: list[object]) -> Tensor:
    """Random numbers [rows, columns] in either order beside a forbidden page; `held` keeps their memory."""
    size = rows * columns * dtype.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert LIBC.mprotect(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    offset = random.choice((0, pages * PAGE - size))
    buffer = (ctypes.c_char * size).from_address(start + PAGE + offset)
    held += [memory, buffer]
    flat = torch.frombuffer(buffer, dtype=dtype).copy_(torch.randn(rows * columns))
    return flat.view(columns, rows).T if random.random() < 0.5 else flat.view(rows, columns)


def main() -> None:
    random.seed(0)
    for _ in range(300):
        held: list[object] = []
        m, n, k = random.choice(SIDES), random.choice(SIDES), random.choice(DEPTHS)
        dtypes = random.choices((torch.float32, torch.bfloat16), k=2)
        left, right = guarded(m, k, dtypes[0], held), guarded(k, n, dtypes[1], held)
        out = guarded(m * n, 1, torch.float32, held).reshape(m, n)
        scale = guarded(k, 1, torch.float32, held).reshape(k) if dtypes[0] == torch.float32 else None
        multiply(left, right, out, scale=scale, begins=True)
        assert out.isfinite().all()


if __name__ == "__main__":
    main()
