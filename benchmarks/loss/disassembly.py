"""What one warp of the projection executes for a tile, counted in the disassembly of its kernel.

A tile is some steps over the inner dimension, then an epilogue, then what the next tile begins with. In the graph of
basic blocks the step is the loop around the warpgroup products; the epilogue is the path from there to the last store
or sum. It has branches for pieces of a tile that hold a target or the edge of the vocabulary: the shortest path that
computes every exponential meets none of them, the longest has all pieces masked.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PRODUCT, EXPONENTIAL = "HGMMA", "MUFU.EX2"
STORES = ("UTMASTG", "UTMACMDFLUSH", "STG")
_LOGIC = ("BMSK", "FSEL", "LOP3", "MOV", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF")
_COMPARE = ("FMNMX", "FSETP", "IMNMX", "ISETP", "VIADDMNMX", "VIMNMX")
ALU = frozenset((*_LOGIC, *_COMPARE, "F2FP", "IABS", "IADD3", "LEA", "VIADD"))
"""Instructions of the arithmetic-logic pipe, which starts a warp's instruction in two cycles."""
FLOAT = frozenset(("FADD", "FFMA", "FMUL"))


@dataclass
class Block:
    """Instructions without a jump in between, and the blocks that may follow."""

    operations: list[str] = field(default_factory=list)
    following: list[int] = field(default_factory=list)


class Counts(NamedTuple):
    """Instructions of one warp."""

    instructions: int
    alu: int
    special: int  # MUFU: exponentials, reciprocals
    floats: tuple[int, ...]  # of FADD, FFMA, FMUL


def count(operations: list[str]) -> Counts:
    """Count by pipe."""
    names = [operation.split(".")[0] for operation in operations]
    floats = tuple(names.count(name) for name in sorted(FLOAT))
    return Counts(len(names), sum(name in ALU for name in names), names.count("MUFU"), floats)


def disassemble(cubin: bytes) -> str:
    """Return what nvdisasm, which comes with Triton, prints for a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout


def blocks_of(text: str) -> list[Block]:
    """Split a disassembly into basic blocks, in order of their addresses."""
    blocks, labels, jumps = [Block()], {}, {}
    falls_through = True
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            if blocks[-1].operations:
                _begin(blocks, falls_through)
            labels[label.group(1)] = len(blocks) - 1
            falls_through = True
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*)", line)
        if not found:
            continue
        predicate, operation, rest = found.groups()
        if not falls_through:
            _begin(blocks, falls_through)
            falls_through = True
        blocks[-1].operations.append(operation)
        is_conditional = bool(predicate) or re.match(r"!?U?P\d", rest) is not None
        if operation == "EXIT" and not is_conditional:
            falls_through = False
        elif operation.startswith("BRA") and not operation.startswith("BRA.DIV"):  # threads of a warp stay together
            target = re.search(r"\((\.L\w+)\)", rest)
            assert target is not None, line
            jumps[len(blocks) - 1] = target.group(1)
            if is_conditional:
                _begin(blocks, True)
            else:
                falls_through = False
    for i, label in jumps.items():
        blocks[i].following.append(labels[label])
    return blocks


def _begin(blocks: list[Block], falls_through: bool) -> None:
    if falls_through:
        blocks[-1].following.append(len(blocks))
    blocks.append(Block())


def paths(blocks: list[Block], start: int, stops: set[int]) -> dict[int, tuple[list[int], list[int]]]:
    """Return, by number of exponentials, the shortest and the longest way forward from a block to one of `stops`."""
    known: dict[int, dict[int, tuple[list[int], list[int]]]] = {start: {0: ([], [])}}
    ends: dict[int, tuple[list[int], list[int]]] = {}

    def length(way: list[int]) -> int:
        return sum(len(blocks[i].operations) for i in way)

    def merge(into: dict[int, tuple[list[int], list[int]]], key: int, pair: tuple[list[int], list[int]]) -> None:
        old = into.get(key, pair)
        into[key] = (min(old[0], pair[0], key=length), max(old[1], pair[1], key=length))

    for i in range(start, len(blocks)):
        for exponentials, pair in known.get(i, {}).items():
            total = exponentials + sum(name.startswith(EXPONENTIAL) for name in blocks[i].operations)
            here = ([*pair[0], i], [*pair[1], i])
            if i in stops:
                merge(ends, total, here)
            for other in blocks[i].following:
                if other > i:
                    merge(known.setdefault(other, {}), total, here)
    return ends


def tile_counts(text: str) -> dict[str, Counts]:
    """Return the counts of a `step`, an `epilogue` without masks, a `masked` one, and of the `begin` of a tile.

    The text is that of a kernel with warpgroup products (sm_90). `begin` has everything else that a tile costs.
    """
    blocks = blocks_of(text)
    last = max(i for i, block in enumerate(blocks) if any(name.startswith(PRODUCT) for name in block.operations))
    reached = {last}
    for i in range(last, len(blocks)):
        if i in reached:
            reached |= {other for other in blocks[i].following if other > i}
    loops = [(head, i) for i in sorted(reached) for head in blocks[i].following if head <= last]
    outer_head, outer_end = min(head for head, _ in loops), max(end for _, end in loops)
    inner_head = max(head for head, _ in loops)

    def operations(way: list[int]) -> list[str]:
        return [name for i in way for name in blocks[i].operations]

    def to_product(head: int) -> tuple[list[int], list[int]]:
        return paths(blocks, head, {last})[0]

    after = paths(blocks, last, {outer_end})
    shortest, longest = after[max(after)]
    epilogue, rest = _at_last_use(operations(shortest[1:]))
    masked, _ = _at_last_use(operations(longest[1:]))
    step = operations(to_product(inner_head)[0])
    if inner_head == outer_head:  # one loop: a step may begin a tile, and leaves the epilogue out
        begin = _difference(operations(to_product(outer_head)[1]), step) + rest
        step += operations(after[min(after)][0][1:])
    else:
        begin = _difference(operations(to_product(outer_head)[0]), step) + rest
    found = {"step": step, "epilogue": epilogue, "masked": masked, "begin": begin}
    return {name: count(names) for name, names in found.items()}


def _at_last_use(operations: list[str]) -> tuple[list[str], list[str]]:
    """Split after the last store or sum: the shortest path jumps over a store whose rows are all past the end."""
    used = (*STORES, *FLOAT)
    at = 1 + max(i for i, name in enumerate(operations) if name.startswith(used))
    return operations[:at], operations[at:]


def _difference(long: list[str], short: list[str]) -> list[str]:
    """What the longer list has more of each operation."""
    left = list(short)
    found = []
    for name in long:
        if name in left:
            left.remove(name)
        else:
            found.append(name)
    return found
