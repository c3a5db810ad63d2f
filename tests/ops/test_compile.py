"""Triton kernels compile for sm_80, sm_90 and sm_100 as they must; no GPU needed.

`make test` compiles the widest products for each, and the widest of the other kernels for sm_90.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kept import kept

from benchmarks.loss import compile_kernels
from benchmarks.pages import loss
from paced_kernels._loss import tiles

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.process]
MULTIPLYING = {"project_kernel", "target_logits_kernel", "kept_rows_kernel", "kept_columns_kernel"}
SOURCES = [Path(__file__), Path(compile_kernels.__file__), ROOT / "benchmarks" / "run.py"]


@pytest.fixture(scope="module", params=["widest", pytest.param("all", marks=pytest.mark.exhaustive)])
def choice(request: pytest.FixtureRequest) -> str:
    """What is compiled: with all options on, or all there is."""
    return request.param


@pytest.fixture(scope="module")
def rows(choice: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Found once for the sources as they are."""
    return kept(f"compile-{choice}", SOURCES, choice, lambda: compiled(choice, tmp_path_factory.mktemp("compile")))


def compiled(choice: str, folder: Path) -> list[dict[str, Any]]:
    """In a process of its own: here the kernels belong to the interpreter."""
    path = folder / "compile.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    command = [sys.executable, "-m", "benchmarks.run", "compile", "--json", str(path)]
    command += ["--widest"] if choice == "widest" else []
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(path.read_text())
    assert result["environment"]["commit"] in loss.compiled(result)
    return result["rows"]


def test_every_kernel_and_configuration_is_there(rows: list[dict[str, Any]], choice: str) -> None:
    sources = "".join(
        (ROOT / "kernels" / "paced_kernels" / f"{name}.py").read_text()
        for name in ("_loss/gemm_kernels", "_loss/row_kernels", "_loss/skipping_kernels", "_tree/kernels")
    )
    launched = {
        line.split("(")[0].removeprefix("def ")
        for line in sources.splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    for arch, configs in tiles.SHIPPED.items():
        here = [row for row in rows if row["arch"] == arch]
        assert {row["kernel"] for row in here} == (launched if choice == "all" or arch == 90 else MULTIPLYING)
        projections = [row for row in here if row["kernel"] == "project_kernel"]
        assert len(projections) == ({90: 4}.get(arch, 2) if choice == "widest" else 8) * len(configs)


def test_nothing_spills_and_shared_memory_fits(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        limit = compile_kernels.SHARED_MEMORY_LIMIT[row["arch"]]
        if row["arch"] == 80:  # also what consumer chips run
            limit = compile_kernels.SHARED_MEMORY_LIMIT[86]
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= limit, row
        assert 0 < row["registers"] * row["num_warps"] * 32 <= 65536, row


def test_pieces_without_masks_are_spared_them_and_rounded_alike(rows: list[dict[str, Any]]) -> None:
    split = [row for row in rows if "tile" in row and "plain" not in row["variant"] and "gated" not in row["variant"]]
    assert len(split) >= 8
    for row in split:
        epilogue, masked = row["tile"]["epilogue"], row["tile"]["masked"]
        assert epilogue["instructions"] < 0.7 * masked["instructions"], row
        assert epilogue["alu"] < masked["alu"] / 2, row
        # A row must not notice that a neighbour's target is in its tile.
        assert epilogue["floats"] == masked["floats"], row
    (usual,) = (row for row in split if row["variant"] == "128x256x64 TMA flat: exponentials")
    assert usual["tile"]["epilogue"]["instructions"] <= 775, usual  # 128 a warp are exponentials, 388 their arithmetic
    assert usual["tile"]["epilogue"]["alu"] <= 150, usual
    assert usual["tile"]["epilogue"]["special"] == 128, usual


def test_products_use_the_tensor_cores_of_the_chip_and_add_in_float32(rows: list[dict[str, Any]]) -> None:
    prefix = {80: "mma.sync.aligned.m16n8k16", 90: "wgmma.mma_async.sync.aligned.m64n", 100: "tcgen05.mma"}
    for row in rows:
        if row["kernel"] in MULTIPLYING:
            assert row["products"], row
            assert all(name.startswith(prefix[row["arch"]]) for name in row["products"]), row
            assert row["accumulates_f32"] is True, row
            assert row["uses_tma"] == ("TMA" in row["variant"]), row
        else:
            assert not row["products"], row
    for arch in prefix:
        # Both logits of a difference have to lose alike what tensor cores cut off.
        used = {
            kernel: {re.sub(r"n\d+", "n", name) for row in rows for name in row["products"] if is_of(row, kernel, arch)}
            for kernel in MULTIPLYING
        }
        assert used["target_logits_kernel"] == used["project_kernel"]
    hopper = [row for row in rows if row["kernel"] == "project_kernel" and row["arch"] == 90]
    assert any(row["uses_tma"] for row in hopper)


def is_of(row: dict[str, Any], kernel: str, arch: int) -> bool:
    return (row["kernel"], row["arch"]) == (kernel, arch)


def test_what_must_have_the_bits_of_the_reference_fuses_no_product_into_a_sum(
    rows: list[dict[str, Any]], choice: str
) -> None:
    exact = [row for row in rows if row["kernel"] in ("tree_rebuild_kernel", "tree_race_kernel")]
    assert len(exact) == (5 if choice == "widest" else 10 * len(tiles.SHIPPED))
    assert all(row["fused_float64"] == 0 for row in exact)


def test_a_spill_and_a_narrow_sum_would_be_seen() -> None:
    """The readers of the compiler's output, on output that is wrong."""
    narrow = "wgmma.mma_async.sync.aligned.m64n128k16.f16.f16.f16 {"
    assert compile_kernels.matrix_instructions(narrow) == ["wgmma.mma_async.sync.aligned.m64n128k16.f16.f16.f16"]
    assert compile_kernels.accumulates_in_float32(narrow, "") is False
    wide = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {"
    assert compile_kernels.accumulates_in_float32(wide, "") is True
    assert compile_kernels.accumulates_in_float32("add.f32", "") is None
