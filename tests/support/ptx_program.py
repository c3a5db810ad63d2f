"""PTX read as a program of closures over numpy registers: the half of `ptx_machine` that one warp needs.

Only what the project's compiled kernels contain is understood; anything else is refused by name. A register of a warp
is an array of its 32 lanes: uint32 for %r, uint64 for %rd, uint16 for %rs, bool for %p; floats are kept as their bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LANES = np.arange(32)
EVERY = np.ones(32, dtype=bool)
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {32: np.float32}
Run = Callable[[Any, np.ndarray], Any]


@dataclass(frozen=True)
class Instruction:
    """One line: `@guard name operands`."""

    name: str
    guard: str  # predicate register, or empty
    is_negated: bool
    operands: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Program:
    """Instructions in order, and where labels point."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    """Read the one entry of a PTX text; labels and registers of inner blocks get names of their own."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    inside, scopes, count, pending = False, [], 0, ""
    for number, raw in enumerate(ptx.splitlines(), 1):
        text = raw.split("//")[0].strip()
        if text == "{":
            inside = True
            count += 1
            scopes.append(f"#{count}")
            continue
        if not inside or not text:
            continue
        if text == "}" and not pending:
            scopes.pop()
            if not scopes:
                break
            continue
        if text.startswith((".reg", ".loc")):
            continue
        if text.endswith(":"):
            labels[_scoped(text[:-1], scopes)] = len(instructions)
            continue
        pending += " " + text
        if not text.endswith(";"):
            continue
        text, pending = pending.strip().rstrip(";").strip(), ""
        instructions.append(_instruction(text, scopes, number))
    return Program(tuple(instructions), labels)


def _scoped(name: str, scopes: list[str]) -> str:
    is_inner = len(scopes) > 1 and not name.startswith(("%", "$"))
    return name + scopes[-1] if is_inner else name


def _instruction(text: str, scopes: list[str], number: int) -> Instruction:
    guard, is_negated = "", False
    if text.startswith("@"):
        mark, text = text.split(None, 1)
        is_negated = mark.startswith("@!")
        guard = _scoped(mark.lstrip("@!"), scopes)
    name, _, rest = text.partition(" ")
    if "\t" in name:
        name, _, more = text.partition("\t")
        rest = more
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
    names = tuple(
        _scoped(part, scopes) if re.fullmatch(r"[A-Za-z_]\w*", part) and len(scopes) > 1 else part for part in parts
    )
    return Instruction(name.strip(), guard, is_negated, names, number)


def listed(operand: str) -> list[str]:
    """`{a, b}` -> [a, b]."""
    return [part.strip() for part in operand.strip("{}").split(",")]


class Reader:
    """Turns operands into functions of a warp, and instructions that touch registers alone into closures."""

    def __init__(self, parameters: dict[int, int], symbols: dict[str, int], special: dict[str, Any]) -> None:
        """`parameters[i]`: bits of the i-th parameter; `special[name]`: function of a warp."""
        self.parameters, self.symbols, self.special = parameters, symbols, special

    def value(self, operand: str, bits: int) -> Callable[[Any], np.ndarray]:
        """The operand as an unsigned array of `bits`, of a register, a number or a name."""
        kind = UNSIGNED[bits]
        if operand in self.special:
            find = self.special[operand]
            return lambda warp: np.broadcast_to(np.asarray(find(warp), dtype=kind), 32)
        if operand.startswith("%"):
            return lambda warp: warp.registers[operand]
        if operand.startswith("0f"):
            constant = int(operand[2:], 16)
        elif re.fullmatch(r"-?\d+", operand):
            constant = int(operand) % (1 << bits)
        elif operand in self.symbols:
            constant = self.symbols[operand]
        elif re.search(r"_param_(\d+)$", operand):
            constant = parameter_address(operand)
        else:
            raise NotImplementedError(f"operand {operand!r}")
        array = np.full(32, constant, dtype=kind)
        return lambda warp: array

    def predicate(self, operand: str) -> Callable[[Any], np.ndarray]:
        return lambda warp: warp.registers[operand]

    def address(self, operand: str) -> Callable[[Any], np.ndarray]:
        """`[register + number]` as int64."""
        base, _, offset = operand.strip("[]").partition("+")
        find = self.value(base.strip(), 64 if base.startswith("%rd") else 32)
        shift = int(offset or 0)
        return lambda warp: find(warp).astype(np.int64) + shift

    def closure(self, instruction: Instruction) -> Run:
        """Of an instruction that reads and writes registers only."""
        name, operands = instruction.name, instruction.operands
        base, _, suffix = name.partition(".")
        if base == "mov" and operands[0].startswith("{"):
            low, high = listed(operands[0])
            find = self.value(operands[1], 64)

            def unpack(warp: Any, mask: np.ndarray) -> None:
                put(warp, low, find(warp).astype(np.uint32), mask)
                put(warp, high, (find(warp) >> np.uint64(32)).astype(np.uint32), mask)

            return unpack
        if base == "mov" and operands[1].startswith("{"):
            halves = [self.value(part, 32) for part in listed(operands[1])]

            def pack(warp: Any, mask: np.ndarray) -> None:
                low, high = (half(warp).astype(np.uint64) for half in halves)
                put(warp, operands[0], low | (high << np.uint64(32)), mask)

            return pack
        compute = self._arithmetic(base, suffix, operands)
        return lambda warp, mask: put(warp, operands[0], compute(warp), mask)

    def _arithmetic(self, base: str, suffix: str, operands: tuple[str, ...]) -> Callable[[Any], np.ndarray]:
        kind = suffix.rsplit(".", 1)[-1]
        if kind == "pred":
            finds = [self.predicate(operand) for operand in operands[1:]]
            logic = {"not": lambda a: ~a, "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[base]
            return lambda warp: logic(*(find(warp) for find in finds))
        if base == "cvt":
            return self._conversion(suffix, operands)
        bits = int(re.sub(r"\D", "", kind))
        typed = SIGNED[bits] if kind[0] == "s" else FLOATS[bits] if kind[0] == "f" else UNSIGNED[bits]
        if base == "selp":
            first, second, which = self.value(operands[1], bits), self.value(operands[2], bits), operands[3]
            return lambda warp: np.where(warp.registers[which], first(warp), second(warp))
        finds = [self.value(operand, bits) for operand in operands[1:]]
        if base == "cvta":
            return finds[0]
        if base == "setp":
            compare = COMPARISONS[suffix.split(".")[0]]
            return lambda warp: compare(*(find(warp).view(typed) for find in finds))
        if base in ("shl", "shr"):
            count = self.value(operands[2], 32)
            move = np.left_shift if base == "shl" else np.right_shift
            assert not (base == "shl" and kind[0] == "s")

            def shift(warp: Any) -> np.ndarray:
                by = count(warp)
                assert (by < bits).all()
                return move(finds[0](warp).view(typed), by.astype(typed)).view(UNSIGNED[bits])

            return shift
        if base in ("mul", "mad") and kind[0] != "f":
            return self._integer_product(base, suffix, operands, bits, typed)
        operation = OPERATIONS[base]
        return lambda warp: np.ascontiguousarray(
            operation(*(find(warp).view(typed) for find in finds)), dtype=typed
        ).view(UNSIGNED[bits])

    def _integer_product(self, base: str, suffix: str, operands: tuple[str, ...], bits: int, typed: Any) -> Any:
        part = suffix.split(".")[0]
        first, second = (self.value(operand, bits) for operand in operands[1:3])
        third = self.value(operands[3], bits) if base == "mad" else None
        assert bits == 32

        def product(warp: Any) -> np.ndarray:
            wide = first(warp).view(typed).astype(np.int64) * second(warp).view(typed).astype(np.int64)
            if part == "wide":
                assert third is None
                return wide.view(np.uint64)
            low = (wide >> 32 if part == "hi" else wide).astype(np.uint32)
            return low if third is None else low + third(warp)

        return product

    def _conversion(self, suffix: str, operands: tuple[str, ...]) -> Callable[[Any], np.ndarray]:
        if suffix == "rn.bf16x2.f32":
            high, low = (self.value(operand, 32) for operand in operands[1:])
            return lambda warp: to_bf16(low(warp)) | (to_bf16(high(warp)) << np.uint32(16))
        if suffix == "f32.bf16":
            find = self.value(operands[1], 16)
            return lambda warp: find(warp).astype(np.uint32) << np.uint32(16)
        to, source = suffix.split(".")
        from_bits, to_bits = int(source[1:]), int(to[1:])
        assert "f" not in (to[0], source[0]), suffix
        find = self.value(operands[1], from_bits)
        typed = SIGNED[from_bits] if source[0] == "s" else UNSIGNED[from_bits]
        return lambda warp: (
            find(warp)
            .view(typed)
            .astype(SIGNED[to_bits] if to[0] == "s" else UNSIGNED[to_bits])
            .view(UNSIGNED[to_bits])
        )


def put(warp: Any, name: str, value: np.ndarray, mask: np.ndarray) -> None:
    """Write the lanes of a register."""
    if mask is EVERY or name not in warp.registers:
        warp.registers[name] = value if mask is EVERY else np.where(mask, value, np.zeros_like(value))
    else:
        warp.registers[name] = np.where(mask, value, warp.registers[name])


def parameter_address(name: str) -> int:
    """A number that stands for the address of the i-th parameter."""
    return (1 << 46) + int(name.rsplit("_", 1)[1])


def to_bf16(bits: np.ndarray) -> np.ndarray:
    """Bits of float32 rounded to the nearest bfloat16, as uint32 below 2^16."""
    value = bits.view(np.float32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded)


def _divide(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.trunc(first.astype(np.float64) / second.astype(np.float64)).astype(first.dtype)


def _fused(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
    return (first.astype(np.float64) * second + third).astype(np.float32)


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
OPERATIONS: dict[str, Any] = {
    "mov": lambda a: a,
    "neg": np.negative,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": _fused,
    "min": np.minimum,
    "max": np.fmax,
    "div": _divide,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "ex2": np.exp2,
}
