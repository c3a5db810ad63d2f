"""Which kernels would be compiled at which step of a run of random lengths, without a GPU.

    python tests/support/counted_compilations.py

writes JSON: "steps" has, by scenario, the kernels of each step, and "fuses" whether their products are fused into sums.

Triton's own launcher binds the arguments, for a chip of compute capability 9.0 or 8.0 that a stand-in for its driver
names. A kernel that is not in the launcher's cache is counted and neither compiled nor run, so results are noise: what
is asked is only which arguments lead to another kernel. Triton's interpreter must be off.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from paced_kernels import Bell, PriorityTree, linear_logprobs, priority_tree, trajectory_balance_loss, warm_up
from paced_kernels._loss import engine, tiles

STEPS = 50
Capability = tuple[int, int]


class StandInDriver:
    """What the launcher asks of a driver before it has a kernel."""

    def __init__(self, capability: Capability) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """The number under which the launcher keeps what it knows: one for each chip."""
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def counted(capability: Capability) -> Iterator[list[tuple[str, bool]]]:
    """CPU tensors pass for those of such a GPU; the list gets every kernel that is not in the cache: its name, and
    whether it fuses products into sums."""
    seen: set[tuple[Any, str]] = set()
    found: list[tuple[str, bool]] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        key = fn.jit_function, str(compile["key"])
        if key not in seen:
            seen.add(key)
            found.append((fn.name, compile["enable_fp_fusion"]))
        return True  # the launcher then neither compiles nor launches

    def plan(hidden: Tensor, weight: Tensor) -> tiles.GemmConfig | None:
        return tiles.choose_config(capability, hidden.dtype, hidden.shape[1], weight.shape[0], hidden.shape[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", StandInDriver(capability))
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
        patch.setattr(tiles, "plan", plan)
        patch.setattr(tiles, "device_facts", lambda _: (capability, 132))
        for module in (engine, priority_tree):
            patch.setattr(module, "require_kernels", lambda *_: None)
        yield found


def loss_steps(
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    with_weights: bool,
    with_entropy: bool,
    skipped_share: float = 0.0,
) -> Callable[[random.Random], None]:
    """A step of a trainer: log-probs of all tokens, the loss of micro-batches with its gradients, log-probs again."""
    weight = torch.ones(vocab_size, hidden_size, dtype=dtype)
    warm_up(weight, with_weights=with_weights, with_entropy=with_entropy, skipped_share=skipped_share, backend="triton")

    def step(source: random.Random) -> None:
        lengths = [source.choice((0, 1, source.randrange(1, 90))) for _ in range(source.randrange(1, 9))]
        num_rows = max(1, sum(lengths))
        lengths[-1] += num_rows - sum(lengths)
        hidden = torch.ones(num_rows, hidden_size, dtype=dtype, requires_grad=True)
        token_ids = torch.zeros(num_rows, dtype=torch.int64)
        # Several chunks, whose first rows start at any address; one sequence alone may be longer than a chunk.
        per_row = tiles.bytes_per_row(tiles.plan(hidden, weight), vocab_size, dtype)
        workspace = source.choice((None, per_row * source.randrange(1, 40)))
        temperature = source.choice((1.0, 0.7))
        options: dict[str, Any] = {"backend": "triton", "workspace_bytes": workspace, "temperature": temperature}
        options["skipped_share"] = skipped_share
        with torch.no_grad():
            linear_logprobs(hidden, weight, token_ids, **options)
        scored = linear_logprobs(hidden, weight, token_ids, **options)
        scored.sum().backward()
        loss = trajectory_balance_loss(
            hidden,
            weight,
            token_ids,
            torch.tensor([0, *lengths]).cumsum(0),
            rewards=torch.ones(len(lengths)),
            log_z=torch.zeros(len(lengths)),
            beta=0.05,
            weights=torch.ones(len(lengths)) if with_weights else None,
            return_entropy=with_entropy,
            entropy_bonus=0.01 if with_entropy else 0.0,
            **options,
        ).loss
        loss.backward()

    return step


def tree_steps(capacity: int) -> Callable[[random.Random], None]:
    """A step of a schedule and of a replay buffer: numbers of draws and of updates, widths and shares change."""
    tree = PriorityTree(capacity, seed=0, backend="triton")
    values = torch.ones(capacity)
    allowed = torch.ones(capacity, dtype=torch.bool)

    def step(source: random.Random) -> None:
        num_draws, start = source.randrange(1, 300), source.randrange(0, 9)
        idx = torch.arange(400)[start : start + num_draws]
        tree.update(idx, torch.ones(400)[start : start + num_draws])
        tree.write_range(torch.zeros((), dtype=torch.int64), torch.ones(num_draws))
        tree.sample(num_draws)
        tree.sample(num_draws, mode="iid")
        tree.rebuild(Bell(source.choice((0.0, 0.5, source.random())), source.random()), values, allowed=allowed)
        tree.rebuild(values)
        tree.sample_distinct(num_draws, method="race", exploration=source.choice((1.0, source.random())))

    return step


BOTH = {"with_weights": True, "with_entropy": True}
SCENARIOS: dict[str, tuple[Capability, Callable[[], Callable[[random.Random], None]]]] = {
    "sm_90, TMA": ((9, 0), lambda: loss_steps(64, 1187, torch.bfloat16, with_weights=True, with_entropy=False)),
    "no weights": ((9, 0), lambda: loss_steps(64, 1187, torch.bfloat16, with_weights=False, with_entropy=True)),
    "sm_90, skipping": (
        (9, 0),
        lambda: loss_steps(64, 1187, torch.bfloat16, with_weights=True, with_entropy=False, skipped_share=2.0**-9),
    ),
    "sm_90, unaligned": ((9, 0), lambda: loss_steps(70, 1187, torch.bfloat16, **BOTH)),
    "sm_80": ((8, 0), lambda: loss_steps(64, 1184, torch.bfloat16, **BOTH)),
    "float16": ((9, 0), lambda: loss_steps(64, 1184, torch.float16, **BOTH)),
    "float32": ((9, 0), lambda: loss_steps(64, 1187, torch.float32, **BOTH)),
    "tree": ((9, 0), lambda: tree_steps(40000)),
}


def compiled_by_step(name: str) -> list[list[tuple[str, bool]]]:
    """What a scenario would compile: at its warm-up (a tree's is its first step), then at every step."""
    capability, make = SCENARIOS[name]
    source = random.Random(0)
    with counted(capability) as found:
        step = make()
        if not found:
            step(source)
        steps = [list(found)]
        for _ in range(STEPS):
            before = len(found)
            step(source)
            steps.append(found[before:])
        return steps


if __name__ == "__main__":
    found = {name: compiled_by_step(name) for name in SCENARIOS}
    kernels = [kernel for steps in found.values() for step in steps for kernel in step]
    fuses = {name: sorted({is_fused for other, is_fused in kernels if other == name}) for name, _ in kernels}
    steps = {name: [[kernel for kernel, _ in step] for step in steps] for name, steps in found.items()}
    sys.stdout.write(json.dumps({"steps": steps, "fuses": fuses}))
