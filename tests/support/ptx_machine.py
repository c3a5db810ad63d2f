"""A machine that runs the PTX of sm_90a kernels: a cluster of programs, their barriers, TMA and tensor cores, in numpy.

For kernels that no GPU has run yet. It is slow, adds products in another order than tensor cores do, and knows no time.
What it knows is order: warps run in a random order, blocks arrive from memory at a random later moment, and a product
reads its operands and a store its buffer as late as the waits after it allow. A barrier that lets somebody through too
early therefore gives wrong numbers, and one that lets nobody through is reported as a `Deadlock`.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from ptx_program import EVERY, LANES, UNSIGNED, Instruction, Reader, parse, put
from ptx_units import DYNAMIC_START, PEER, WAIT, Barrier, Deadlock, Fault, Program, TensorMap, Units, Warp


class Machine(Units):
    """Runs a kernel on clusters, one after the other."""

    def __init__(
        self,
        ptx: str,
        parameters: dict[int, Any],  # index -> number, TensorMap, or array that a pointer points to
        *,
        threads: int,
        cluster: int,
        seed: int,
    ) -> None:
        self.program = parse(ptx)
        self.threads, self.cluster, self.random = threads, cluster, random.Random(seed)
        self.maps: dict[int, TensorMap] = {}
        self.arrays: list[np.ndarray] = []
        bits = {i: self._bits(i, value) for i, value in parameters.items()}
        special = {
            "%tid.x": lambda warp: 32 * warp.index + LANES,
            "%laneid": lambda warp: LANES,
            "%ctaid.x": lambda warp: warp.program.block,
            "%nctaid.x": lambda warp: self.num_blocks,
            "%cluster_ctarank": lambda warp: warp.program.rank,
        }
        self.reader = Reader(bits, {"__dynamic_shmem__0": DYNAMIC_START}, special)
        self.steps = [self._step_of(instruction) for instruction in self.program.instructions]
        self.counts: dict[str, int] = {}

    def _bits(self, index: int, value: Any) -> int:
        if isinstance(value, TensorMap):
            self.maps[index] = value
            return 0
        if isinstance(value, np.ndarray):
            assert value.flags.c_contiguous
            self.arrays.append(value.reshape(-1).view(np.uint8))
            return len(self.arrays) << 40
        if isinstance(value, float):
            return int(np.float32(value).view(np.uint32))
        return value

    def run(self, num_clusters: int) -> None:
        """Run the whole grid."""
        self.num_blocks = num_clusters * self.cluster
        with np.errstate(all="ignore"):
            for i in range(num_clusters):
                self._run_cluster(i)

    def _run_cluster(self, index: int) -> None:
        self.programs = [Program(rank, index * self.cluster + rank) for rank in range(self.cluster)]
        warps = [Warp(program, i) for program in self.programs for i in range(self.threads // 32)]
        self.cluster_arrived, self.cluster_round, self.pending = 0, 0, []
        self.num_threads = len(warps) * 32
        running = list(warps)
        while running:
            self.random.shuffle(running)
            has_moved = self._deliver()
            for warp in running:
                # A random number of steps, so that no warp is always first.
                for _ in range(self.random.choice((1, 30, 400))):
                    if not self._advance(warp):
                        break
                    has_moved = True
                    if self.pending and self.random.random() < 0.02:
                        self._deliver()
            running = [warp for warp in running if not warp.is_over]
            if not has_moved and not self.pending:
                raise Deadlock("; ".join(self._where(warp) for warp in running))
        for warp in warps:
            if any(warp.products) or any(warp.stores):
                raise Fault("a warp has ended before its products or stores were waited for")

    def _where(self, warp: Warp) -> str:
        instruction = self.program.instructions[warp.at]
        return f"program {warp.program.rank} warp {warp.index} at line {instruction.line} {instruction.name}"

    def _deliver(self) -> bool:
        """Carry out some of the loads under way."""
        late = [load for load in self.pending if self.random.random() < 0.5]
        for load in late:
            load()
        self.pending = [load for load in self.pending if load not in late]
        return bool(late)

    def _advance(self, warp: Warp) -> bool:
        """Carry out the instruction of the lanes that are furthest behind; False if it has to wait."""
        if warp.is_over:
            return False
        if warp.is_together:
            mask = EVERY
        else:
            warp.at = int(warp.places.min())
            mask = warp.places == warp.at
            if mask.all():
                warp.is_together, mask = True, EVERY
        instruction, step = self.program.instructions[warp.at], self.steps[warp.at]
        active = mask
        if instruction.guard:
            condition = warp.registers[instruction.guard] ^ instruction.is_negated
            active = mask & condition
            if active.all():
                active = EVERY
        if instruction.name.startswith("bra"):
            self._branch(warp, mask, active, self.program.labels[instruction.operands[0]])
            return True
        if instruction.name == "ret":
            if not warp.is_together:
                raise Fault("lanes of a warp return apart")
            warp.is_over = True
            return True
        if active.any() and step(warp, active) is WAIT:
            return False
        self._move(warp, mask, warp.at + 1)
        return True

    def _move(self, warp: Warp, mask: np.ndarray, to: int) -> None:
        if warp.is_together:
            warp.at = to
        else:
            warp.places[mask] = to

    def _branch(self, warp: Warp, mask: np.ndarray, taken: np.ndarray, to: int) -> None:
        if warp.is_together and (taken is EVERY or not taken.any()):
            warp.at = to if taken is EVERY else warp.at + 1
            return
        if warp.is_together:
            warp.places[:] = warp.at
            warp.is_together = False
        warp.places[mask] = warp.at + 1
        warp.places[taken] = to

    # Instructions

    def _step_of(self, instruction: Instruction) -> Any:
        name, operands = instruction.name, instruction.operands
        for prefix, make in (
            ("bra", None),
            ("ret", None),
            ("setmaxnreg", None),
            ("fence", None),
            ("wgmma.fence", None),
            ("prefetch", None),
            ("ld.param", self._load_parameter),
            ("ld.global", self._load_global),
            ("st.global", self._store_global),
            ("elect", self._elect),
            ("shfl", self._shuffle),
            ("mbarrier.init", self._init),
            ("mbarrier.arrive", self._arrive),
            ("mbarrier.try_wait", self._try_wait),
            ("mapa", self._map),
            ("bar.", self._named_barrier),
            ("barrier.cluster", self._cluster_barrier),
            ("cp.async.bulk.tensor.2d.global", self._tma_store),
            ("cp.async.bulk.tensor", self._tma_load),
            ("cp.async.bulk.commit", lambda name, operands: lambda warp, mask: warp.stores.append([])),
            ("cp.async.bulk.wait", self._wait_stores),
            ("stmatrix", self._store_matrix),
            ("wgmma.mma_async", self._multiply),
            ("wgmma.commit", lambda name, operands: lambda warp, mask: warp.products.append([])),
            ("wgmma.wait", self._wait_products),
        ):
            if name.startswith(prefix):
                return (lambda warp, mask: None) if make is None else self._counted(name, make(name, operands))
        return self.reader.closure(instruction)

    def _counted(self, name: str, step: Any) -> Any:
        def run(warp: Warp, mask: np.ndarray) -> Any:
            if ".aligned" in name and mask is not EVERY:
                raise Fault(f"{name} by a part of a warp")
            result = step(warp, mask)
            if result is not WAIT:
                self.counts[name] = self.counts.get(name, 0) + 1
            return result

        return run

    def _load_parameter(self, name: str, operands: tuple[str, ...]) -> Any:
        bits = int(name[-2:])
        index, _, offset = operands[1].strip("[]").rpartition("_")[2].partition("+")
        assert not offset
        value = np.full(32, self.reader.parameters[int(index)] % (1 << bits), dtype=UNSIGNED[bits])
        return lambda warp, mask: put(warp, operands[0], value, mask)

    def _global(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        number = int(addresses[0]) >> 40
        if not 1 <= number <= len(self.arrays) or (addresses >> 40 != number).any():
            raise Fault("an address in no array")
        array, offsets = self.arrays[number - 1], addresses & ((1 << 40) - 1)
        if (offsets % size).any() or (offsets + size > array.size).any():
            raise Fault("an address beyond its array")
        return array.view(UNSIGNED[8 * size]), offsets // size

    def _load_global(self, name: str, operands: tuple[str, ...]) -> Any:
        bits = int(name.rsplit(".", 1)[1][1:])
        find = self.reader.address(operands[1])

        def load(warp: Warp, mask: np.ndarray) -> None:
            array, places = self._global(find(warp)[mask], bits // 8)
            value = np.zeros(32, dtype=UNSIGNED[max(bits, 16)])
            value[mask] = array[places]
            put(warp, operands[0], value, mask)

        return load

    def _store_global(self, name: str, operands: tuple[str, ...]) -> Any:
        bits = int(name.rsplit(".", 1)[1][1:])
        find, value = self.reader.address(operands[0]), self.reader.value(operands[1], bits)

        def store(warp: Warp, mask: np.ndarray) -> None:
            array, places = self._global(find(warp)[mask], bits // 8)
            array[places] = value(warp)[mask]

        return store

    def _elect(self, name: str, operands: tuple[str, ...]) -> Any:
        _, predicate = operands[0].split("|")
        return lambda warp, mask: put(warp, predicate, np.flatnonzero(mask)[0] == LANES, mask)

    def _shuffle(self, name: str, operands: tuple[str, ...]) -> Any:
        value, number = self.reader.value(operands[1], 32), int(operands[2])
        source = LANES ^ number if ".bfly." in name else np.full(32, number)

        def shuffle(warp: Warp, mask: np.ndarray) -> None:
            if mask is not EVERY:
                raise Fault("a shuffle by a part of a warp")
            put(warp, operands[0], value(warp)[source], mask)

        return shuffle

    def _init(self, name: str, operands: tuple[str, ...]) -> Any:
        find, count = self.reader.address(operands[0]), self.reader.value(operands[1], 32)

        def init(warp: Warp, mask: np.ndarray) -> None:
            (lane,) = np.flatnonzero(mask)
            number = int(count(warp)[lane])
            warp.program.barriers[int(find(warp)[lane])] = Barrier(number, number)

        return init

    def _arrive(self, name: str, operands: tuple[str, ...]) -> Any:
        find, number = self.reader.address(operands[1]), self.reader.value(operands[2], 32)

        def arrive(warp: Warp, mask: np.ndarray) -> None:
            for lane in np.flatnonzero(mask):
                barrier = self._barrier(warp.program, int(find(warp)[lane]))
                if "expect_tx" in name:
                    barrier.bytes_due += int(number(warp)[lane])
                    barrier.pending -= 1
                else:
                    barrier.pending -= int(number(warp)[lane])
                barrier.settle()

        return arrive

    def _try_wait(self, name: str, operands: tuple[str, ...]) -> Any:
        find, parity = self.reader.address(operands[1]), self.reader.value(operands[2], 32)

        def wait(warp: Warp, mask: np.ndarray) -> Any:
            lane = np.flatnonzero(mask)[0]
            over = self._barrier(warp.program, int(find(warp)[lane])).phase & 1 != int(parity(warp)[lane])
            if not over:
                return WAIT
            put(warp, operands[0], np.ones(32, dtype=bool), mask)
            return None

        return wait

    def _map(self, name: str, operands: tuple[str, ...]) -> Any:
        find, rank = self.reader.value(operands[1], 32), self.reader.value(operands[2], 32)

        def convert(warp: Warp, mask: np.ndarray) -> None:
            if (rank(warp)[mask] >= self.cluster).any():
                raise Fault("a program beyond the cluster")
            put(warp, operands[0], find(warp) | ((rank(warp) + np.uint32(1)) << np.uint32(PEER)), mask)

        return convert

    def _named_barrier(self, name: str, operands: tuple[str, ...]) -> Any:
        find, count = (self.reader.value(operand, 32) for operand in operands)

        def sync(warp: Warp, mask: np.ndarray) -> Any:
            number, needed = int(find(warp)[0]), int(count(warp)[0])
            if mask is not EVERY or not 0 <= number < 16:
                raise Fault("a barrier by a part of a warp, or one there is not")
            state = warp.program.named.setdefault(number, [0, 0])
            if warp.waits is None:
                state[0] += 32
                if state[0] > needed:
                    raise Fault(f"more threads at barrier {number} than it waits for")
                here = state[1]
                if state[0] == needed:
                    state[:] = [0, here + 1]
                if name.startswith("bar.arrive"):
                    return None
                warp.waits = here
            if state[1] == warp.waits:
                return WAIT
            warp.waits = None
            return None

        return sync

    def _cluster_barrier(self, name: str, operands: tuple[str, ...]) -> Any:
        def arrive(warp: Warp, mask: np.ndarray) -> None:
            warp.waits = self.cluster_round
            self.cluster_arrived += int(mask.sum())
            if self.cluster_arrived == self.num_threads:
                self.cluster_arrived, self.cluster_round = 0, self.cluster_round + 1

        def wait(warp: Warp, mask: np.ndarray) -> Any:
            if self.cluster_round == warp.waits:
                return WAIT
            warp.waits = None
            return None

        return arrive if "arrive" in name else wait
