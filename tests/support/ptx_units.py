"""What the warps of `ptx_machine` share: memory, barriers, and the units that work beside them (TMA, tensor cores).

Addresses of shared memory are offsets; above `PEER` they also hold the rank of a program in the cluster, plus one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ptx_program import LANES, Reader, listed

PEER = 24
SHARED_BYTES = 232448
DYNAMIC_START = 1024
WAIT = object()
"""What an instruction returns that has to be tried again."""


class Deadlock(AssertionError):
    """Nobody can go on."""


class Fault(AssertionError):
    """Something the hardware forbids, or leaves undefined."""


@dataclass
class TensorMap:
    """What TMA knows of a matrix of 16-bit numbers, and the box it moves; swizzled over 128 bytes."""

    matrix: np.ndarray  # [rows, columns] uint16
    box_rows: int
    box_columns: int = 64


@dataclass
class Barrier:
    """An mbarrier: a phase ends when nobody is pending and all bytes have come."""

    expected: int
    pending: int
    bytes_due: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.pending < 0:
            raise Fault("more arrivals at a barrier than it was made for")
        if self.pending == 0 and self.bytes_due == 0:
            self.phase += 1
            self.pending = self.expected


@dataclass
class Program:
    """One CTA."""

    rank: int
    block: int
    shared: np.ndarray = field(default_factory=lambda: np.full(SHARED_BYTES + DYNAMIC_START, 0x7F, dtype=np.uint8))
    barriers: dict[int, Barrier] = field(default_factory=dict)
    named: dict[int, list[Any]] = field(default_factory=dict)  # barrier id -> [threads arrived, round]


class Warp:
    """32 lanes of a program."""

    def __init__(self, program: Program, index: int) -> None:
        self.program, self.index = program, index
        self.registers: dict[str, np.ndarray] = {}
        self.places = np.zeros(32, dtype=np.int64)
        self.at = 0
        self.is_together = True
        self.is_over = False
        self.waits: Any = None  # what a named or cluster barrier made it wait for
        self.products: list[list[Any]] = [[]]  # groups of wgmma; the last is not committed
        self.stores: list[list[Any]] = [[]]


class Units:
    """Instructions that move blocks or multiply them, made from their operands."""

    reader: Reader
    maps: dict[int, TensorMap]
    programs: list[Program]
    pending: list[Any]  # loads under way
    cluster: int

    def _barrier(self, program: Program, address: int) -> Barrier:
        owner = self.programs[(address >> PEER) - 1] if address >> PEER else program
        if (address & ((1 << PEER) - 1)) not in owner.barriers:
            raise Fault("a barrier nobody made")
        return owner.barriers[address & ((1 << PEER) - 1)]

    def _box(self, operands: tuple[str, ...], which: int) -> Any:
        inside = operands[which].strip("[]")
        pointer, coordinates = inside.split(",", 1)
        find = self.reader.value(pointer.strip(), 64)
        column, row = (self.reader.value(part, 32) for part in listed(coordinates.strip()))

        def box(warp: Warp, lane: int) -> tuple[TensorMap, int, int]:
            found = self.maps[int(find(warp)[lane]) - (1 << 46)]
            return found, int(row(warp).view(np.int32)[lane]), int(column(warp).view(np.int32)[lane])

        return box

    def _tma_load(self, name: str, operands: tuple[str, ...]) -> Any:
        to, box, bar = self.reader.address(operands[0]), self._box(operands, 1), self.reader.address(operands[2])
        everyone = self.reader.value(operands[3], 16) if "multicast" in name else None

        def load(warp: Warp, mask: np.ndarray) -> None:
            (lane,) = np.flatnonzero(mask)
            found, row, column = box(warp, lane)
            ranks = [warp.program.rank]
            if everyone is not None:
                ranks = [rank for rank in range(self.cluster) if int(everyone(warp)[lane]) >> rank & 1]
            values = np.zeros((found.box_rows, found.box_columns), dtype=np.uint16)
            part = found.matrix[row : row + found.box_rows, column : column + found.box_columns]
            values[: part.shape[0], : part.shape[1]] = part
            address, barrier = int(to(warp)[lane]), int(bar(warp)[lane])

            def arrive(rank: int) -> None:
                program = self.programs[rank]
                program.shared.view(np.uint16)[swizzled(address, found.box_rows, found.box_columns)] = values
                target = self._barrier(program, barrier)
                target.bytes_due -= values.nbytes
                target.settle()

            self.pending += [lambda rank=rank: arrive(rank) for rank in ranks]

        return load

    def _tma_store(self, name: str, operands: tuple[str, ...]) -> Any:
        box, source = self._box(operands, 0), self.reader.address(operands[1])

        def store(warp: Warp, mask: np.ndarray) -> None:
            lane, *others = np.flatnonzero(mask)  # the unit takes one command a warp
            found, row, column = box(warp, lane)
            address = int(source(warp)[lane])
            if any(box(warp, i)[1:] != (row, column) or source(warp)[i] != address for i in others):
                raise Fault("lanes of a warp store different boxes")

            def leave() -> None:
                values = warp.program.shared.view(np.uint16)[swizzled(address, found.box_rows, found.box_columns)]
                part = found.matrix[row : row + found.box_rows, column : column + found.box_columns]
                part[:] = values[: part.shape[0], : part.shape[1]]

            warp.stores[-1].append(leave)

        return store

    def _wait_stores(self, name: str, operands: tuple[str, ...]) -> Any:
        return lambda warp, mask: finish(warp.stores, int(operands[0]))

    def _store_matrix(self, name: str, operands: tuple[str, ...]) -> Any:
        find = self.reader.address(operands[0])
        values = [self.reader.value(part, 32) for part in listed(operands[1])]

        def store(warp: Warp, mask: np.ndarray) -> None:
            memory = warp.program.shared.view(np.uint32)
            starts = find(warp)
            if (starts % 16).any():
                raise Fault("a matrix stored at an address that is not a multiple of 16 bytes")
            for i, value in enumerate(values):
                rows = starts[8 * i : 8 * i + 8] // 4
                memory[rows[LANES // 4] + LANES % 4] = value(warp)

        return store

    def _multiply(self, name: str, operands: tuple[str, ...]) -> Any:
        accumulators = listed(operands[0])
        first, second = (self.reader.value(operand, 64) for operand in operands[1:3])
        adds = operands[3]
        assert operands[4:] == ("1", "1", "0", "0"), operands
        width = int(name.split("m64n")[1].split("k16")[0])
        assert len(accumulators) == width // 2

        def multiply(warp: Warp, mask: np.ndarray) -> None:
            a, b = int(first(warp)[0]), int(second(warp)[0])
            keeps = bool(warp.registers[adds][0])

            def calculate() -> None:
                part = 16 * (warp.index % 4)
                left = operand(warp.program, a, 64)[part : part + 16]
                product = left @ operand(warp.program, b, width).T  # [16, width]
                for j, register in enumerate(accumulators):
                    value = product[LANES // 4 + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * (LANES % 4) + j % 2]
                    before = warp.registers[register].view(np.float32) if keeps else np.float32(0.0)
                    warp.registers[register] = (before + value).astype(np.float32).view(np.uint32)

            warp.products[-1].append(calculate)

        return multiply

    def _wait_products(self, name: str, operands: tuple[str, ...]) -> Any:
        return lambda warp, mask: finish(warp.products, int(operands[0]))


def finish(groups: list[list[Any]], num_left: int) -> None:
    """Carry out all committed groups but the last `num_left`."""
    while len(groups) - 1 > num_left:
        for action in groups.pop(0):
            action()


def swizzled(address: int, rows: int, columns: int) -> np.ndarray:
    """Places, in units of 2 bytes, of a box whose rows of 128 bytes are permuted in chunks of 16 bytes."""
    if address % 1024:
        raise Fault("a swizzled box at an address that is not a multiple of 1024 bytes")
    assert columns == 64
    linear = address + 128 * np.arange(rows)[:, None] + 2 * np.arange(columns)[None, :]
    return (linear ^ (linear >> 7 & 7) << 4) // 2


def operand(program: Program, descriptor: int, rows: int) -> np.ndarray:
    """[rows, 16] float32 of a matrix in shared memory, from its descriptor (128-byte swizzle, H contiguous)."""
    start = (descriptor & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    assert descriptor >> 62 == 1, "another swizzle"
    assert descriptor >> 49 & 7 == 0, "a base offset"
    row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
    linear = start + row // 8 * stride + row % 8 * 128 + 2 * column
    bits = program.shared.view(np.uint16)[(linear ^ (linear >> 7 & 7) << 4) // 2]
    return (bits.astype(np.uint32) << 16).view(np.float32)
