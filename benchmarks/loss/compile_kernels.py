"""Compile all Triton kernels in all shipped configurations without a GPU: registers, spills, shared memory, products.

`python -m benchmarks.run compile` writes the numbers that `kernels/README.md` shows and `tests/ops/test_compile.py`
asserts. Triton's interpreter must be off at the start: kernels that it wraps cannot be compiled.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.loss import disassembly
from paced_fast.errors import InputError

SHARED_MEMORY_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}
"""Most bytes per program on each architecture; 86 = consumer chips, which use the sm_80 configuration."""

# Arguments that are multiples of 16 for aligned tensors, with all pointers and descriptors; a launch tells the compiler
# so where the kernel lets it.
ALIGNED = (
    *("stride_hidden", "stride_weight", "stride_out", "stride_matrix", "stride_rows", "stride"),
    "hidden_size",
)
INTEGERS = ("num_rows", "vocab_size", "hidden_size", "vocab_start", "num_parts", "num_blocks")


@dataclass(frozen=True)
class Arguments:
    """Compile all kernels."""

    architectures: tuple[str, ...] = ("80", "90", "100")
    """Compute capabilities, 90 for sm_90."""
    widest: bool = False
    """Only the most demanding variants: all options on, the most levels, one chip for all but the products."""


@dataclass(frozen=True)
class Build:
    """One kernel with its compile-time constants."""

    kernel: Any
    variant: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    descriptors: dict[str, tuple[int, int]]  # TMA descriptor arguments and their blocks
    dtype: str = "bf16"
    fuses: bool = True  # whether products are fused into sums


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Return rows of name, variant, architecture, registers, spills, shared memory and instructions.

    Rows of the projection on sm_90 have, as `tile`, what a warp executes for a tile: see `disassembly.tile_counts`.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET is 1, so Triton would interpret the kernels: unset it to compile them")
    del path
    architectures = [int(name) for name in arguments.architectures]
    rows = [compile_one(build, arch) for arch in architectures for build in builds(arch, widest=arguments.widest)]
    for row in rows:
        print("  ".join(str(value) for name, value in row.items() if name != "tile"))
    return {"rows": rows}


def builds(arch: int, *, widest: bool = False) -> list[Build]:
    """Return all builds for a chip of this architecture, or only the `widest` of each kind.

    Those are the products on every chip, whose configurations differ, and on sm_90 those of a trainer's default and the
    other kernels, whose constants are the same on all. Launches behind a gate have one epilogue and are left out.
    """
    if not widest:
        every = tuple(itertools.product((False, True), repeat=2))
        kept = [*projections(arch, every), *kept_products(arch)]
        return [*kept, *targets(arch), *row_kernels(), *tree_kernels((2, 3))]
    options: tuple[tuple[bool, bool], ...] = ((True, False),)
    if arch != 90:
        return [*projections(arch, options), *kept_products(arch), *targets(arch)]
    kept = [*projections(arch, ((False, False), *options)), *kept_products(arch)]
    return [*kept, *targets(arch), *row_kernels(), *tree_kernels((3,))]


def projections(arch: int, choices: Sequence[tuple[bool, bool]]) -> list[Build]:
    """Builds of `project_kernel` in the configurations of the static table, for all `choices` of (options, gate)."""
    from paced_kernels._loss import gemm_kernels as gemm
    from paced_kernels._loss.tiles import SHIPPED

    found = []
    for config in SHIPPED[arch]:
        for kind, (is_full, is_gated) in itertools.product((gemm.EXPONENTIALS, gemm.SUMS), choices):
            options = ["exponentials" if kind is gemm.EXPONENTIALS else "sums"]
            options += ["entropy, bias"] * is_full
            options += ["gated"] * is_gated
            constants = {
                "KIND": kind.value,
                "BLOCK_T": config.block_t,
                "BLOCK_V": config.block_v,
                "BLOCK_H": config.block_h,
                "PIECES": config.pieces,
                "GROUP_V": config.group_v,
                "USE_TMA": config.use_tma,
                "FLAT": config.is_flat and not is_gated,
                "SPLIT": config.is_split and not is_gated,
                "UPCAST": False,
                "HAS_BIAS": is_full,
                "WITH_ENTROPY": is_full,
                "GATED": is_gated,
            }
            blocks = {}
            if config.use_tma:
                blocks = {"hidden": (config.block_t, config.block_h), "weight": (config.block_v, config.block_h)}
                if kind is gemm.EXPONENTIALS:
                    blocks["out"] = (config.block_t, config.width)
            shape = f"{config.block_t}x{config.block_v}x{config.block_h} {way_of(config)}: {', '.join(options)}"
            found.append(Build(gemm.project_kernel, shape, constants, config.num_warps, config.num_stages, blocks))
    return found


def way_of(config: Any) -> str:
    """What else distinguishes a configuration."""
    words = ["TMA" if config.use_tma else "pointers", "flat" * config.is_flat, "plain" * (not config.is_split)]
    return " ".join(word for word in words if word)


def kept_products(arch: int) -> list[Build]:
    """Builds of the products that pass over blocks, in the configurations of the static table."""
    from paced_kernels._loss import skipping_kernels as kernels
    from paced_kernels._loss.tiles import SHIPPED
    from paced_kernels._loss.triton_skipping import block_constants

    found = []
    for config in SHIPPED[arch]:
        constants = {**block_constants(config), "UPCAST": False}
        inner, block_h = constants["BLOCK_INNER"], constants["BLOCK_H"]
        sides: dict[Any, tuple[str, dict[str, tuple[int, int]], list[dict[str, Any]]]] = {
            kernels.kept_rows_kernel: ("weight", {"matrix": (config.block_t, inner)}, [{}]),
            kernels.kept_columns_kernel: (
                "rows",
                {"matrix": (inner, config.width)},
                [{"BEGINS": True}, {"BEGINS": False}],
            ),
        }
        loads = "TMA" if config.use_tma else "pointers"
        for kernel, (other, blocks, options) in sides.items():
            blocks = {**blocks, other: (inner, block_h)} if config.use_tma else {}
            for option in options:
                variant = f"{config.block_t}x{block_h}x{inner} {loads}: {option}"
                found.append(
                    Build(kernel, variant, {**constants, **option}, config.num_warps, config.num_stages, blocks)
                )
    return found


def targets(arch: int) -> list[Build]:
    """Builds of `target_logits_kernel`, with the inner blocks and stages of each configuration of the products."""
    from paced_kernels._loss import row_kernels as kernels
    from paced_kernels._loss.tiles import SHIPPED

    shapes = dict.fromkeys((config.block_h, config.num_stages) for config in SHIPPED[arch])
    return [
        Build(
            kernels.target_logits_kernel,
            f"64x64x{block_h}",
            {"HAS_BIAS": True, "BLOCK_T": 64, "BLOCK_H": block_h, "UPCAST": False},
            4,
            num_stages,
            {},
        )
        for block_h, num_stages in shapes
    ]


def row_kernels() -> list[Build]:
    """Builds of the row kernels, with the constants that their launchers use and all options on."""
    from paced_kernels._loss import row_kernels as kernels

    def build(kernel: Any, variant: str, num_warps: int = 4, dtype: str = "bf16", **constants: Any) -> Build:
        return Build(kernel, variant, constants, num_warps, 3, {}, dtype)

    finish = {"TILE_T": 128, "WITH_ENTROPY": True, "BLOCK_P": 16, "BLOCK_T": 64}
    first = {"HAS_MAXIMA": False, "FLAG": True, "GATED": False, "FINAL": True}
    again = {"HAS_MAXIMA": True, "FLAG": False, "GATED": True, "FINAL": True}
    part = {"HAS_MAXIMA": True, "FLAG": False, "GATED": False, "FINAL": False}
    return [
        build(kernels.finish_rows_kernel, "flags", **finish, **first),
        build(kernels.finish_rows_kernel, "gated", **finish, **again),
        build(kernels.finish_rows_kernel, "one of several ranks", **finish, **part),
        build(kernels.row_parts_kernel, "", 8, HAS_BIAS=True, WITH_ENTROPY=True, BLOCK_V=8192),
        build(kernels.row_probabilities_kernel, "bfloat16", 8, HAS_BIAS=True, HAS_LIVE=True, BLOCK_V=8192),
        build(kernels.row_probabilities_kernel, "float32", 8, "fp32", HAS_BIAS=True, HAS_LIVE=True, BLOCK_V=8192),
        build(kernels.patch_targets_kernel, "", HAS_LIVE=True, BLOCK_T=128),
        build(kernels.clear_dead_rows_kernel, "", 8, BLOCK_V=8192),
        build(kernels.entropy_gradient_kernel, "", 8, BLOCK_V=4096),
    ]


def tree_kernels(level_counts: tuple[int, ...]) -> list[Build]:
    """Builds of the priority-tree kernels, for 10^6 and 10^7 leaves."""
    from paced_kernels._tree import kernels, launches

    found = []
    for num_levels in level_counts:
        levels = {"NUM_LEVELS": num_levels}
        name = f"{num_levels} levels"
        update = {**levels, "IS_FLOAT": True, "BLOCK": launches.UPDATE_BLOCK}
        for is_bell, has_allowed in ((False, False), (False, True), (True, True)):
            constants = {**levels, "IS_FLOAT": True, "IS_BELL": is_bell, "HAS_ALLOWED": has_allowed}
            found.append(Build(kernels.tree_rebuild_kernel, name, constants, 4, 3, {}, "fp32", fuses=False))
        for is_mixed in (False, True):
            constants = {**levels, "IS_MIXED": is_mixed, "BLOCK": launches.RACE_BLOCK}
            found.append(Build(kernels.tree_race_kernel, name, constants, 4, 3, {}, "fp32", fuses=False))
        for has_index in (True, False):
            constants = {**update, "HAS_INDEX": has_index}
            found.append(Build(kernels.tree_update_kernel, name, constants, 4, 3, {}, "fp32"))
        for mode in (kernels.SYSTEMATIC, kernels.STRATIFIED, kernels.IID):
            constants = {**levels, "MODE": mode.value, "BLOCK": launches.SAMPLE_BLOCK}
            found.append(Build(kernels.tree_sample_kernel, name, constants, launches.SAMPLE_WARPS, 3, {}, "fp32"))
    return found


def argument_type(name: str, build: Build) -> str:
    """Return Triton's type name of an argument that is not a constant."""
    if name in build.descriptors:
        rows, columns = build.descriptors[name]
        return f"tensordesc<{build.dtype}[{rows},{columns}]>"
    if name == "out_ptr" and build.kernel.__name__.startswith("kept_"):  # float32 sums are the widest
        return "*fp32"
    if name in ("hidden", "weight", "out", "matrix", "rows", "hidden_ptr", "weight_ptr", "bias_ptr", "out_ptr"):
        return f"*{build.dtype}"
    if build.kernel.__name__.startswith("tree_"):
        special = {"weights_ptr": "*fp32", "prob_ptr": "*fp32", "ticket_ptr": "*i32", "allowed_ptr": "*i1"}
        wide = name.endswith("_bits") or name == "index_mask"
        return special.get(name, "*i64" if name.endswith("_ptr") else "i64" if wide else "i32")
    special = {"token_ptr": "*i64", "live_ptr": "*u8", "gate_ptr": "*i32", "inv_temperature": "fp32"}
    special |= {"lists_ptr": "*i32", "counts_ptr": "*i32"}
    if name in special:
        return special[name]
    if name in INTEGERS:
        return "i32"
    return "i64" if name.startswith("stride") else "*fp32"


def compile_one(build: Build, arch: int) -> dict[str, Any]:
    """Compile one build and return the resources it needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    signature = {name: "constexpr" if name in build.constants else argument_type(name, build) for name in names}
    positions = {name: (names.index(name),) for name in names}
    aligned = [
        param.name
        for param in build.kernel.params
        if (param.name in ALIGNED or signature[param.name].startswith("*"))
        and not (param.do_not_specialize or param.do_not_specialize_on_alignment)
    ]
    source = ASTSource(
        build.kernel,
        signature,
        {positions[name]: value for name, value in build.constants.items()},
        {positions[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": build.fuses}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack, local = resources(compiled.asm["cubin"])
    found = {
        "kernel": build.kernel.__name__,
        "variant": build.variant,
        "arch": arch,
        "num_warps": build.num_warps,
        "num_stages": build.num_stages,
        "registers": registers,
        "spill_bytes": stack + local,
        "shared_bytes": compiled.metadata.shared,
        "products": matrix_instructions(compiled.asm["ptx"]),
        "uses_tma": "cp.async.bulk.tensor" in compiled.asm["ptx"],
        "fused_float64": len(re.findall(r"\bfma\.rn\.f64\b", compiled.asm["ptx"])),
        "accumulates_f32": accumulates_in_float32(compiled.asm["ptx"], compiled.asm["ttgir"]),
    }
    if build.kernel.__name__ == "project_kernel" and arch == 90:
        counts = disassembly.tile_counts(disassembly.disassemble(compiled.asm["cubin"]))
        found["tile"] = {name: part._asdict() for name, part in counts.items()}
    return found


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Return registers per thread, and bytes of stack and of local memory, of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no number of registers: {text}")
    registers, stack, local = (int(group) for group in match.groups())
    return registers, stack, local


def matrix_instructions(ptx: str) -> list[str]:
    """Return the matrix-product instructions of the PTX, without operands."""
    return sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.[\w.:]+", ptx)))


def accumulates_in_float32(ptx: str, ttgir: str) -> bool | None:
    """Return whether every matrix product accumulates in float32; None without one."""
    products = matrix_instructions(ptx)
    if not products:
        return None
    if any(name.startswith("tcgen05") for name in products):  # the type is in a run-time descriptor, not in the name
        lines = [line for line in ttgir.splitlines() if "tc_gen5_mma" in line]
        return bool(lines) and all(re.search(r"xf32, #\w+, #ttng.tensor_memory", line) for line in lines)
    return all(re.search(r"\.f32\.(bf16|f16)\.(bf16|f16)(\.f32)?$", name) for name in products)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Format as Markdown, one line for all variants of a kernel with the same blocks: their maximum."""
    lines = [
        "| kernel | architecture | variants | warps, stages | registers | spills | shared memory | products |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        blocks = row["variant"].split(":")[0] if row["products"] else ""
        groups.setdefault((row["kernel"], blocks, row["arch"]), []).append(row)
    for (kernel, blocks, arch), members in sorted(groups.items()):
        registers = [row["registers"] for row in members]
        spread = f"{min(registers)} to {max(registers)}" if min(registers) < max(registers) else str(registers[0])
        cells = (
            f"`{kernel}`" + (f" {blocks}" if blocks else ""),
            f"sm_{arch}",
            len(members),
            f"{members[0]['num_warps']}, {members[0]['num_stages']}",
            spread,
            max(row["spill_bytes"] for row in members),
            f"{max(row['shared_bytes'] for row in members):,} B",
            ", ".join(f"`{name}`" for name in members[0]["products"]),
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return lines


def tile_table(rows: list[dict[str, Any]]) -> list[str]:
    """Format as Markdown what a warp executes for a tile; launches behind a gate, which hardly ever run, stay out."""
    lines = [
        "| `project_kernel`, sm_90 | stages | registers | a step | epilogue | the same with masks | rest of a tile |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "tile" not in row or "gated" in row["variant"]:
            continue
        parts = (row["tile"][name] for name in ("step", "epilogue", "masked", "begin"))
        cells = [f"{part['instructions']:,} / {part['alu']:,}" for part in parts]
        lines.append(f"| {row['variant']} | {row['num_stages']} | {row['registers']} | {' | '.join(cells)} |")
    return lines
