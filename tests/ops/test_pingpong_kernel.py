"""The ping-pong projection compiles for sm_90a as it must, and its PTX computes what it should, without a GPU.

The PTX runs in `ptx_machine` on clusters of two programs, with warps in random order: its barriers, TMA boxes,
swizzles, fragments and arithmetic are the compiled ones. Needs the package nvidia-cutlass-dsl.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ptx_machine import Machine
from ptx_units import TensorMap
from torch import Tensor

pytest.importorskip("cutlass", reason="the package nvidia-cutlass-dsl is not installed")

from paced_kernels._loss import pingpong
from paced_kernels._loss import pingpong_plan as plan

pytestmark = [pytest.mark.slow]
TRITON = importlib.util.find_spec("triton")
assert TRITON is not None
assert TRITON.origin is not None
BINARIES = Path(TRITON.origin).parent / "backends" / "nvidia" / "bin"

EVERYTHING = plan.Options(stores=True, has_bias=True, with_entropy=True, gated=True)
STORES = plan.Options(stores=True, has_bias=False, with_entropy=False, gated=False)
SUMS = plan.Options(stores=False, has_bias=False, with_entropy=False, gated=False)
SUMS_TOO = plan.Options(stores=False, has_bias=True, with_entropy=True, gated=True)
EVERY = [
    plan.Options(stores, has_bias, with_entropy, gated)
    for stores in (False, True)
    for has_bias in (False, True)
    for with_entropy in (False, True)
    for gated in (False, True)
]
VARIANTS = [
    pytest.param(options, id=f"{i}", marks=() if options in (EVERYTHING, SUMS_TOO) else pytest.mark.exhaustive)
    for i, options in enumerate(EVERY)
]


class Compiled:
    """PTX, SASS and resources of a variant."""

    def __init__(self, options: plan.Options, folder: Path, token_dtype: torch.dtype = torch.int64) -> None:
        flags = f"--keep-ptx --keep-cubin --dump-dir {folder}"
        made = pingpong.compiled.__wrapped__(options, torch.bfloat16, token_dtype, flags)
        self.function, self.ptx = made, made.artifacts.PTX
        (self.cubin,) = folder.glob("*.cubin")

    def sass(self) -> str:
        return self._output("nvdisasm")

    def resources(self) -> dict[str, int]:
        found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", self._output("cuobjdump", "--dump-resource-usage"))
        return {name: int(number) for name, number in found}

    def warnings(self, folder: Path) -> str:
        """What the assembler has to say about the PTX."""
        path = folder / "kernel.ptx"
        path.write_text(self.ptx)
        command = [str(BINARIES / "ptxas"), "-v", "-arch=sm_90a", str(path), "-o", str(folder / "kernel.bin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def _output(self, program: str, *options: str) -> str:
        command = [str(BINARIES / program), *options, str(self.cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Options -> what they compile to, once a module."""
    known: dict[plan.Options, Compiled] = {}

    def make(options: plan.Options) -> Compiled:
        if options not in known:
            known[options] = Compiled(options, tmp_path_factory.mktemp("pingpong"))
        return known[options]

    return make


@pytest.mark.parametrize("options", VARIANTS)
def test_registers_memory_and_instructions(options: plan.Options, made: Any, tmp_path: Path) -> None:
    compiled = made(options)
    sass = compiled.sass()

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    used = compiled.resources()
    assert used["REG"] * plan.THREADS <= 65536  # at the launch; the warp groups then trade
    # With everything on, two numbers wait in local memory while the bias is on its way; nothing else ever does.
    spilled = 2 if options.stores and options.has_bias and options.with_entropy else 0
    assert (used["STACK"], used["LOCAL"]) == (4 * spilled, 0)
    assert (count(r"\bSTL\b"), count(r"\bLDL\b")) == (spilled, spilled)
    said = compiled.warnings(tmp_path)
    assert f"{4 * spilled} bytes spill stores, {4 * spilled} bytes spill loads" in said
    assert "serialized" not in said  # products that wait for each other
    products = count(r"HGMMA\.64x192x16\.F32\.BF16")
    assert products > 0
    assert products == count(r"\bHGMMA\.")
    assert products % (plan.BLOCK_T // 64 * plan.BLOCK_H // 16) == 0
    # Of the two loads of a step one goes to both programs.
    assert count(r"UTMALDG\.2D\.MULTICAST") == count(r"UTMALDG\.2D(?!\.MULTICAST)") > 0
    assert count(r"UTMASTG\.2D") == (6 if options.stores else 0)  # a tile is 2 x 3 pieces
    assert count(r"MUFU\.EX2") == plan.BLOCK_T * plan.BLOCK_V // plan.GROUP_THREADS
    _, loader, consumers = re.split(r"USETMAXREG\.(?:DEALLOC|TRY_ALLOC)", sass)
    assert "UTMALDG" in loader
    assert "HGMMA" in consumers
    for code, limit in ((loader, plan.LOADER_REGISTERS), (consumers, plan.CONSUMER_REGISTERS)):
        assert max(int(number) for number in re.findall(r"\bR(\d+)\b", code)) < limit
    staging = 2 * plan.CONSUMERS * plan.PIECE[0] * plan.PIECE[1]
    shared = 1024 + plan.STAGES * plan.STAGE_BYTES + staging  # barriers first, up to the alignment of blocks
    assert re.search(rf"constant\({shared} : i\d+\)", str(compiled.function.ir_module))  # what the launch asks for
    assert shared <= 232448


class Problem:
    """Random rows with a target each, and the answer in float64."""

    def __init__(self, num_rows: int, vocab_size: int, hidden_size: int, *, first: int = 0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.hidden = torch.randn(num_rows, hidden_size).bfloat16()
        self.weight = (torch.randn(vocab_size, hidden_size) * 2 / hidden_size**0.5).bfloat16()
        self.bias = torch.randn(vocab_size).bfloat16()
        self.first = first  # the target's ids start here; some are another shard's
        self.tokens = torch.randint(0, vocab_size + first, (num_rows,))
        self.gate = np.ones(1 + -(-num_rows // plan.BLOCK_T), dtype=np.int32)
        self.temperature = 1.5
        self.num_parts = -(-vocab_size // plan.BLOCK_V)
        self.reference = torch.randn(num_rows)

    def logits(self, options: plan.Options) -> Tensor:
        """[T, P, BLOCK_V] float64; impossible where nothing is counted."""
        z = self.hidden.double() @ self.weight.double().T * float(np.float32(1 / self.temperature))
        z = z + self.bias.double() if options.has_bias else z
        column = torch.arange(z.shape[1])
        z = z.masked_fill(column == self.tokens[:, None] - self.first, -torch.inf)
        z = torch.nn.functional.pad(z, (0, self.num_parts * plan.BLOCK_V - z.shape[1]), value=-torch.inf)
        return z.view(z.shape[0], self.num_parts, plan.BLOCK_V)


class Result:
    """What a run has written; NaN where it wrote nothing."""

    def __init__(
        self, problem: Problem, compiled: Compiled, *, options: plan.Options, num_clusters: int, seed: int
    ) -> None:
        num_rows, vocab_size = problem.hidden.shape[0], problem.weight.shape[0]
        self.sums, self.weighted, self.maxima = np.full((3, problem.num_parts, num_rows), np.nan, dtype=np.float32)
        self.matrix = np.full((num_rows, -(-vocab_size // 64) * 64), 0x7FC0, dtype=np.uint16)
        out = TensorMap(self.matrix[:, :vocab_size], plan.PIECE[0])
        padded = torch.nn.functional.pad(problem.bias, (0, -vocab_size % plan.BLOCK_V), value=7.0)  # any finite number
        addresses = [bits(padded), problem.tokens.numpy(), problem.reference.numpy()]
        addresses += [problem.gate, self.sums, self.weighted, self.maxima]
        values: dict[int, Any] = {
            0: TensorMap(bits(problem.hidden), plan.BLOCK_T),
            2: TensorMap(bits(problem.weight), plan.BLOCK_V // plan.CLUSTER),
            4: out if options.stores else TensorMap(bits(problem.hidden), plan.PIECE[0]),
            **dict(enumerate(addresses, 8)),
            **dict(enumerate((num_rows, vocab_size, problem.hidden.shape[1], problem.first), 15)),
            19: 1 / problem.temperature,
        }
        self.machine = Machine(compiled.ptx, values, threads=plan.THREADS, cluster=plan.CLUSTER, seed=seed)
        self.machine.run(num_clusters)
        self.exponentials = torch.from_numpy(self.matrix.view(np.int16)).view(torch.bfloat16).double()

    def bits(self) -> list[bytes]:
        return [array.tobytes() for array in (self.sums, self.weighted, self.maxima, self.matrix)]


def bits(values: Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy().view(np.uint16)


def check(problem: Problem, result: Result, options: plan.Options, rows: slice = slice(None)) -> None:
    """Against float64, on `rows`; elsewhere nothing may have been written."""
    logits = problem.logits(options)
    reference = problem.reference.double()[:, None] if options.stores else logits.amax(dim=2)
    shifted = logits - torch.where(reference == -torch.inf, 0.0, reference)[:, :, None]
    expected = shifted.exp()
    weighted = torch.where(expected == 0, 0.0, expected * shifted)
    close = {"rtol": 2e-5, "atol": 1e-7}
    assert torch.allclose(torch.from_numpy(result.sums).T.double()[rows], expected.sum(2)[rows], **close)
    if options.with_entropy:
        found = torch.from_numpy(result.weighted).T.double()[rows]
        assert torch.allclose(found, weighted.sum(2)[rows], rtol=2e-5, atol=2e-5)
    if not options.stores:
        assert torch.allclose(torch.from_numpy(result.maxima).T.double()[rows], reference[rows], rtol=1e-5, atol=1e-5)
        return
    vocab_size = problem.weight.shape[0]
    stored = expected.flatten(1)[:, :vocab_size]
    found = result.exponentials[:, :vocab_size]
    assert torch.allclose(found[rows], stored[rows], rtol=2.0**-8, atol=0)
    assert result.exponentials[:, vocab_size:].isnan().all()  # padding of rows is nobody's
    others = torch.ones(found.shape[0], dtype=torch.bool)
    others[rows] = False
    assert found[others].isnan().all()


@pytest.mark.parametrize(
    ("options", "num_rows", "vocab_size", "hidden_size", "num_clusters"),
    [
        (EVERYTHING, 300, 700, 136, 2),  # an edge in every direction; 3 steps a tile, so the ring turns within tiles
        (STORES, 513, 400, 72, 1),  # the last cluster has one row tile; 9 tiles in one cluster
        (STORES, 1, 5, 8, 3),  # one row, one block, one tile for three clusters
        (SUMS, 129, 193, 392, 1),  # 7 steps: more than the ring holds
        (SUMS_TOO, 256, 1600, 64, 2),  # one step a tile; two groups of vocabulary tiles
    ],
    ids=["all-options", "many-tiles", "one-row", "sums", "sums-all-options"],
)
def test_the_compiled_program_computes_exponentials_and_sums(
    options: plan.Options, num_rows: int, vocab_size: int, hidden_size: int, num_clusters: int, made: Any
) -> None:
    problem = Problem(num_rows, vocab_size, hidden_size, first=3)
    result = Result(problem, made(options), options=options, num_clusters=num_clusters, seed=0)
    check(problem, result, options)
    # Every tile of a cluster once, by both programs: 2 x 4 products a step, by 4 warps.
    steps = plan.cluster_tiles(num_rows, vocab_size) * -(-hidden_size // plan.BLOCK_H)
    multiplied = sum(count for name, count in result.machine.counts.items() if name.startswith("wgmma.mma_async"))
    assert multiplied == plan.CLUSTER * steps * 8 * plan.WARPS_PER_GROUP


def test_the_order_of_warps_changes_no_bit(made: Any) -> None:
    problem = Problem(300, 500, 200)
    runs = [Result(problem, made(STORES), options=STORES, num_clusters=1, seed=seed).bits() for seed in range(3)]
    assert runs[0] == runs[1] == runs[2]


def test_only_flagged_row_tiles_are_computed(made: Any) -> None:
    problem = Problem(700, 400, 72)
    problem.gate[:] = [1, 0, 0, 0, 1, 0, 0]  # the fourth row tile, and with it its neighbour in the cluster
    check(
        problem,
        Result(problem, made(EVERYTHING), options=EVERYTHING, num_clusters=2, seed=0),
        EVERYTHING,
        slice(256, 512),
    )
    problem.gate[0] = 0
    check(
        problem, Result(problem, made(EVERYTHING), options=EVERYTHING, num_clusters=2, seed=0), EVERYTHING, slice(0, 0)
    )


def test_a_row_that_is_no_number_stays_alone(made: Any) -> None:
    problem = Problem(40, 100, 64)
    problem.hidden[7] = torch.nan
    result = Result(problem, made(STORES), options=STORES, num_clusters=1, seed=0)
    assert np.isnan(result.sums[:, 7]).all()
    assert not np.isnan(result.sums[:, [6, 8]]).any()
    assert not result.exponentials[[6, 8], :100].isnan().any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EMPTY_ARRIVALS", plan.EMPTY_ARRIVALS + 1),
        ("EMPTY_ARRIVALS", plan.WARPS_PER_GROUP),
        ("FULL_ARRIVALS", 2),
        ("STAGE_BYTES", plan.STAGE_BYTES + 16),
        ("STAGE_BYTES", plan.STAGE_BYTES - 2 * plan.BLOCK_H * plan.BLOCK_T),
    ],
)
def test_a_barrier_that_is_off_shows(name: str, value: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same program with one number wrong deadlocks, or computes something else."""
    monkeypatch.setattr(plan, name, value)
    compiled, problem = Compiled(STORES, tmp_path), Problem(256, 500, 450)

    def run() -> None:
        for seed in range(3):
            check(problem, Result(problem, compiled, options=STORES, num_clusters=1, seed=seed), STORES)

    with pytest.raises(AssertionError):  # also Deadlock and Fault
        run()


def test_a_launch_takes_the_arguments_it_was_compiled_for(made: Any) -> None:
    """The runtime's own check of the call that the engine makes, up to the driver."""
    from cuda.bindings import driver

    dtypes = {**pingpong.DTYPES, "bias": torch.bfloat16, "tokens": torch.int64}
    addresses = [pingpong.pointer(name, torch.zeros(64, dtype=dtypes[name])) for name in pingpong.NAMES]
    arguments = (*addresses, 300, 151936, 896, 0, 896, 896, 151936, 1.0, 66, driver.CUstream(0))
    prepared, _ = made(STORES).function.generate_execution_args(*arguments)
    assert len(prepared) == len(arguments)
    with pytest.raises(Exception, match=r"argument|mismatch"):
        made(STORES).function.generate_execution_args(*arguments[:-1])
