"""The barriers of the ping-pong projection as a small discrete simulation of one cluster, written a second time.

Loaders and consumers are generators that yield what they wait for; blocks arrive at random later moments. What a
consumer multiplies must be the block it thinks it is, from the moment it is issued to the moment it is over.

The compiled kernel itself runs in `ptx_machine`, where the package that compiles it is installed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ptx_units import Barrier, Deadlock

from paced_kernels._loss import pingpong_plan as plan

Wait = Callable[[], bool]


class WrongBlock(AssertionError):
    """A consumer multiplied something else than its block."""


@dataclass(frozen=True)
class Protocol:
    """What the kernel does; tests change one thing at a time."""

    full_arrivals: int = plan.FULL_ARRIVALS
    empty_arrivals: int = plan.EMPTY_ARRIVALS
    takes_turns: bool = True
    releases_to_peer: bool = True
    in_flight: int = 1
    """Blocks whose products may still be running when an older one is released."""


@dataclass
class Cta:
    """One program of the cluster: its barriers and what is in its buffers."""

    protocol: Protocol
    full: list[Barrier] = field(init=False)
    empty: list[Barrier] = field(init=False)
    parts: list[dict[str, tuple[int, int]]] = field(default_factory=lambda: [{} for _ in range(plan.STAGES)])
    leave: list[int] = field(default_factory=lambda: [0] * plan.CONSUMERS)

    def __post_init__(self) -> None:
        full, empty = self.protocol.full_arrivals, self.protocol.empty_arrivals
        self.full = [Barrier(full, full) for _ in range(plan.STAGES)]
        self.empty = [Barrier(empty, empty) for _ in range(plan.STAGES)]


class Cluster:
    """Runs `num_tiles` tiles of `num_steps` blocks each, and checks every product."""

    def __init__(self, num_tiles: int, num_steps: int, protocol: Protocol, seed: int) -> None:
        self.num_tiles, self.num_steps, self.protocol = num_tiles, num_steps, protocol
        self.random = random.Random(seed)
        self.ctas = [Cta(protocol) for _ in range(plan.CLUSTER)]
        self.arriving: list[Callable[[], None]] = []
        self.multiplied: list[tuple[int, int, int]] = []  # program, tile, step

    def run(self) -> None:
        actors = [self._loader(rank) for rank in range(plan.CLUSTER)]
        actors += [self._consumer(rank, i) for rank in range(plan.CLUSTER) for i in range(plan.CONSUMERS)]
        waits: dict[Iterator[Wait], Wait] = {actor: lambda: True for actor in actors}
        while waits:
            ready = [actor for actor, wait in waits.items() if wait()]
            if not ready and not self.arriving:
                raise Deadlock(f"{len(waits)} actors wait, after {len(self.multiplied)} products")
            if self.arriving and (not ready or self.random.random() < 0.5):
                self.arriving.pop(self.random.randrange(len(self.arriving)))()
                continue
            actor = self.random.choice(ready)
            try:
                waits[actor] = next(actor)
            except StopIteration:
                del waits[actor]

    def _loader(self, rank: int) -> Iterator[Wait]:
        own = self.ctas[rank]
        for count in range(self.num_tiles * self.num_steps):
            stage, parity, block = count % plan.STAGES, count // plan.STAGES % 2, divmod(count, self.num_steps)
            yield lambda stage=stage, parity=parity: own.empty[stage].phase & 1 != parity ^ 1
            own.full[stage].bytes_due += plan.STAGE_BYTES
            own.full[stage].pending -= 1
            own.full[stage].settle()
            self._send(own, stage, "hidden", block, 2 * plan.BLOCK_T * plan.BLOCK_H)
            for cta in self.ctas:
                self._send(cta, stage, f"weight {rank}", block, 2 * plan.BLOCK_V * plan.BLOCK_H // plan.CLUSTER)

    def _send(self, cta: Cta, stage: int, part: str, block: tuple[int, int], num_bytes: int) -> None:
        def arrive() -> None:
            cta.parts[stage][part] = block
            cta.full[stage].bytes_due -= num_bytes
            cta.full[stage].settle()

        self.arriving.append(arrive)

    def _consumer(self, rank: int, consumer: int) -> Iterator[Wait]:
        own = self.ctas[rank]
        for tile in range(consumer, self.num_tiles, plan.CONSUMERS):
            if tile > 0 and self.protocol.takes_turns:
                yield lambda: own.leave[consumer] > 0
                own.leave[consumer] -= 1
            running: list[tuple[int, int]] = []
            for step in range(self.num_steps):
                count = tile * self.num_steps + step
                stage, parity = count % plan.STAGES, count // plan.STAGES % 2
                yield lambda stage=stage, parity=parity: own.full[stage].phase & 1 != parity
                self._check(own, stage, (tile, step))
                running.append((step, stage))
                while len(running) > self.protocol.in_flight:
                    self._finish(rank, tile, *running.pop(0))
                    yield lambda: True
            own.leave[plan.CONSUMERS - 1 - consumer] += 1
            for step, stage in running:
                yield lambda: True
                self._finish(rank, tile, step, stage)

    def _check(self, cta: Cta, stage: int, block: tuple[int, int]) -> None:
        found = cta.parts[stage]
        if set(found.values()) != {block} or len(found) != 1 + plan.CLUSTER:
            raise WrongBlock(f"{found} where {block} should be")

    def _finish(self, rank: int, tile: int, step: int, stage: int) -> None:
        self._check(self.ctas[rank], stage, (tile, step))  # the product has read its operands until now
        self.multiplied.append((rank, tile, step))
        for cta in self.ctas if self.protocol.releases_to_peer else [self.ctas[rank]]:
            cta.empty[stage].pending -= plan.WARPS_PER_GROUP
            cta.empty[stage].settle()
