"""Faults to seed into a copy of the kernels, each with a test that must notice, and the process that runs them.

    python tests/support/seeded_faults.py FOLDER [NAME ...]   # a line "status name" each; -11 = killed by signal 11

Every fault runs its tests in a fork of one process that has imported the libraries but not the kernels.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "paced_kernels"

OPTIONS = "ops/test_triton_rows.py::test_every_option_in_one_chunk"
MODES = "ops/test_triton_rows.py::test_every_mode"
SIZES = "ops/test_kernel_edges.py::test_sizes_around_a_block"
WAYS = "ops/test_triton_rows.py::test_every_loop_and_epilogue_gives_the_same_bits"
GUARDS = "ops/test_kernel_memory.py::test_nothing_beyond_inputs_and_outputs_is_touched"
FAR = "ops/test_kernel_memory.py::test_offsets_beyond_32_bits"


@dataclass(frozen=True)
class Fault:
    """`old` occurs once in the module and becomes `new`; `test` fails."""

    name: str
    module: str
    old: str
    new: str
    test: str


CONTROLS = (
    Fault(
        "logits rounded to bfloat16",
        "_loss/gemm_kernels",
        "products = tl.fma(products, inv_temperature, bias",
        "products = tl.fma(products, inv_temperature, 0.0).to(tl.bfloat16).to(tl.float32) + (bias",
        f"{OPTIONS}[plain-halves]",
    ),
    Fault(
        "a column of the vocabulary dropped",
        "_loss/gemm_kernels",
        "    m_columns = o_columns < vocab_size\n    is_counted =",
        "    m_columns = o_columns < vocab_size - 1\n    is_counted =",
        f"{OPTIONS}[plain-whole]",
    ),
    Fault(
        "columns beyond the vocabulary counted",
        "_loss/gemm_kernels",
        "is_counted = m_columns[None, :] & (o_columns[None, :] != target[:, None])",
        "is_counted = o_columns[None, :] != target[:, None]",
        f"{SIZES}[one column less than a tile-whole]",
    ),
    Fault(
        "coefficient of the neighbour",
        "_loss/fused_pass",
        "coefficient[owner].to(",
        "coefficient[owner - 1].to(",
        f"{OPTIONS}[plain-whole]",
    ),
    Fault(
        "mean over the padded length",
        "_loss/sequences",
        "(cu_seqlens[1:] - cu_seqlens[:-1]).clamp(",
        "(cu_seqlens[1:] - cu_seqlens[:-1]).amax().clamp(",
        f"{OPTIONS}[mean, sharp-whole]",
    ),
)
"""The negative controls that every suite for such a loss owes."""

OTHERS = (
    Fault(
        "columns beyond the vocabulary counted, stage 1",
        "_loss/row_kernels",
        "is_counted = m_columns & (o_columns != target)",
        "is_counted = o_columns != target",
        f"{SIZES}[one column less than a tile-logits]",
    ),
    Fault(
        "target not left out of the sum",
        "_loss/gemm_kernels",
        "(o_columns[None, :] != target[:, None])",
        "(o_columns[None, :] != -1 - target[:, None])",
        f"{OPTIONS}[plain-halves]",
    ),
    Fault(
        "32-bit offset of exponentials",
        "_loss/gemm_kernels",
        "out_ptrs = out + o_rows.to(tl.int64)[:, None]",
        "out_ptrs = out + o_rows[:, None]",
        f"{FAR}[dtype1-halves]",
    ),
    Fault(
        "32-bit offset of hidden states",
        "_loss/gemm_kernels",
        "hidden_ptrs = hidden + o_rows.to(tl.int64)[:, None]",
        "hidden_ptrs = hidden + o_rows[:, None]",
        f"{FAR}[dtype1-halves]",
    ),
    Fault(
        "32-bit offset of patches",
        "_loss/row_kernels",
        "out_ptr + o_rows.to(tl.int64) * stride_out",
        "out_ptr + o_rows * stride_out",
        "ops/test_kernel_memory.py::test_the_largest_batch_of_a_real_vocabulary",
    ),
    Fault(
        "store beyond the last row",
        "_loss/gemm_kernels",
        "tl.store(out_ptrs, b_out, mask=m_rows[:, None] & m_columns[None, :])",
        "tl.store(out_ptrs, b_out, mask=(o_rows >= 0)[:, None] & m_columns[None, :])",
        f"{GUARDS}[14-float32-halves]",
    ),
    Fault(
        "store beyond the last column",
        "_loss/gemm_kernels",
        "tl.store(out_ptrs, b_out, mask=m_rows[:, None] & m_columns[None, :])",
        "tl.store(out_ptrs, b_out, mask=m_rows[:, None] & (o_columns >= 0)[None, :])",
        f"{GUARDS}[14-float32-halves]",
    ),
    Fault(
        "store beyond the last column, stage 1",
        "_loss/row_kernels",
        "narrow(probabilities, out_ptr.dtype.element_ty), mask=m_columns",
        "narrow(probabilities, out_ptr.dtype.element_ty), mask=o_columns >= 0",
        f"{GUARDS}[14-float32-logits]",
    ),
    Fault(
        "load beyond the hidden size",
        "_loss/gemm_kernels",
        "m_inner = (o_inner < hidden_size)[None, :]",
        "m_inner = (o_inner >= 0)[None, :]",
        f"{GUARDS}[1000-float32-whole]",
    ),
    Fault(
        "rows of the last tile not patched",
        "_loss/triton_rows",
        "(triton.cdiv(matrix.shape[0], block_t),)",
        "(max(1, matrix.shape[0] // block_t),)",
        f"{SIZES}[one row more-whole]",
    ),
    Fault(
        "sign of the patch",
        "_loss/triton_gemm",
        "-torch.expm1(-stats.logprobs)",
        "torch.expm1(-stats.logprobs)",
        f"{OPTIONS}[plain-whole]",
    ),
    Fault(
        "dead rows kept",
        "_loss/row_kernels",
        "if tl.load(live_ptr + i_row) == 0:",
        "if tl.load(live_ptr + i_row) == 2:",
        "ops/test_kernel_edges.py::test_weight_zero_removes_a_sequence_whatever_it_holds[0.0-whole]",
    ),
    Fault(
        "dead rows kept, stage 1",
        "_loss/row_kernels",
        "probabilities = tl.where(is_live, exp(logits - lse), 0.0)",
        "probabilities = exp(logits - lse)",
        "ops/test_kernel_edges.py::test_weight_zero_removes_a_sequence_whatever_it_holds[0.0-logits]",
    ),
    Fault(
        "accumulators not cleared",
        "_loss/gradients",
        "engine.add_outer(self._value, matrix, rows, scale=scale, begins=self._is_empty, kept=kept)",
        "engine.add_outer(self._value, matrix, rows, scale=scale, begins=False, kept=kept)",
        f"{OPTIONS}[plain-whole]",
    ),
    Fault(
        "a chunk in the place of the sum",
        "_loss/matmul",
        "total.addmm_(left, right)",
        "torch.mm(left, right, out=total)",
        f"{MODES}[groups-whole]",
    ),
    Fault(
        "a streamed sequence without its coefficient",
        "_loss/gradients",
        "self._value.addcmul_(other.value, scale)",
        "self._value.add_(other.value)",
        f"{MODES}[streamed-whole]",
    ),
    Fault(
        "temperature ignored in the backward pass",
        "_loss/gradients",
        "inner_scale = scale / engine.head.temperature",
        "inner_scale = scale",
        f"{OPTIONS}[mean, sharp-whole]",
    ),
    Fault(
        "entropy without the target's term",
        "_loss/row_kernels",
        "part_shifted = tl.where(part_total == 0.0, 0.0, part_weighted + part_shift * part_total)",
        "part_shifted = tl.where(part_total == 0.0, 0.0, part_weighted)",
        f"{OPTIONS}[plain-logits]",
    ),
    Fault(
        "gradient of the entropy from the patch",
        "_loss/row_kernels",
        "    logprobs = tl.where(is_target, target_logprob, logprobs)\n",
        "",
        f"{OPTIONS}[entropy bonus-logits]",
    ),
    Fault(
        "improbable rows not repaired",
        "_loss/row_kernels",
        "tl.store(gate_ptr + 0 * o_rows, 1, mask=is_below)",
        "tl.store(gate_ptr + 0 * o_rows, 0, mask=is_below)",
        "ops/test_kernel_edges.py::test_the_loss_of_improbable_tokens[dtype1-whole]",
    ),
    Fault(
        "neighbours of repaired rows changed",
        "_loss/triton_gemm",
        "torch.where(is_direct, target, stats.lse)",
        "stats.lse",
        "ops/test_kernel_edges.py::test_a_recomputed_row_leaves_its_neighbours_alone[whole]",
    ),
    Fault(
        "tiles of a last, narrow group missed",
        "_loss/gemm_kernels",
        "width = tl.minimum(num_vocab_tiles - first, GROUP_V)",
        "width = GROUP_V",
        f"{OPTIONS}[plain-halves]",
    ),
    Fault(
        "a target of the second piece not seen",
        "_loss/gemm_kernels",
        "ones = tl.where(offset < WIDTH, 1, 1 << 16)",
        "ones = tl.where(offset < WIDTH, 1, 0)",
        f"{WAYS}[flat]",
    ),
    Fault(
        "an edge not seen",
        "_loss/gemm_kernels",
        "tl.maximum(first + WIDTH - vocab_size, 0) > 0",
        "tl.maximum(first - vocab_size, 0) > 0",
        f"{WAYS}[flat]",
    ),
    Fault(
        "products of the tile before",
        "_loss/gemm_kernels",
        "                products = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)\n    else:",
        "    else:",
        f"{WAYS}[flat]",
    ),
    Fault(
        "store of a tile without masks beyond the last row",
        "_loss/gemm_kernels",
        "tl.store(out_ptrs, b_out, mask=m_rows[:, None])",
        "tl.store(out_ptrs, b_out, mask=(o_rows >= 0)[:, None])",
        f"{GUARDS}[14-float32-halves]",
    ),
    Fault(
        "second piece of a tile over the first",
        "_loss/gemm_kernels",
        "i_part = first // WIDTH",
        "i_part = column_start // WIDTH",
        f"{OPTIONS}[plain-halves]",
    ),
    Fault(
        "log-probs near 0 by log",
        "_loss/row_kernels",
        "log1p(below), tl.log(total)",
        "tl.log(1.0 + below), tl.log(total)",
        "ops/test_kernel_edges.py::test_logprobs_of_any_size_and_their_gradients[whole]",
    ),
)

EVERYTHING = "ops/test_triton_tree.py::test_everything_equals_the_reference"
KEYS = "ops/test_triton_tree.py::test_keys_of_a_race_are_those_of_the_reference_to_the_last_bit"
TREE = (
    Fault(
        "a race whose keys forget the index",
        "_tree/kernels",
        "(keys & ~index_mask) | leaves, NO_KEY",
        "keys, NO_KEY",
        f"{EVERYTHING}[1025]",
    ),
    Fault(
        "exploration of what weighs nothing",
        "_tree/launches",
        'state["size"], q > 0)',
        'state["size"], q >= 0)',
        f"{KEYS}[0.3]",
    ),
    Fault(
        "shares of a mixture exchanged",
        "_tree/kernels",
        "near = (weight / sum_q) * (1.0 - exploration)",
        "near = (weight / sum_q) * exploration",
        f"{EVERYTHING}[1025]",
    ),
    Fault(
        "exp with one term less",
        "_tree/kernels",
        "tl.static_range(1, NUM_EXP_TERMS)",
        "tl.static_range(1, NUM_EXP_TERMS - 1)",
        f"{EVERYTHING}[1025]",
    ),
    Fault(
        "the last bits of a logarithm",
        "_tree/kernels",
        "return e * LN2_HIGH + (s * series + e * LN2_LOW)",
        "return e * (LN2_HIGH + LN2_LOW) + s * series",
        "ops/test_triton_tree.py::test_exp_and_log_have_the_bits_of_the_reference",
    ),
    Fault(
        "weights where none are allowed",
        "_tree/kernels",
        "    q = tl.where(is_allowed, q, 0)\n",
        "",
        f"{EVERYTHING}[1025]",
    ),
    Fault(
        "the first of duplicates wins",
        "_tree/kernels",
        "position + 1) << WEIGHT_BITS",
        "num_elements - position) << WEIGHT_BITS",
        "ops/test_triton_tree.py::test_last_writer_wins_across_programs",
    ),
    Fault(
        "a boundary that belongs to the left",
        "_tree/kernels",
        "is_before = prefix <= target[:, None]",
        "is_before = prefix < target[:, None]",
        "ops/test_triton_tree.py::test_draws_equal_the_two_line_oracle",
    ),
    Fault(
        "upper sums of a second rebuild on the first",
        "_tree/launches",
        "        self._upper.zero_()\n",
        "",
        "ops/test_triton_tree.py::test_any_number_of_levels[1]",
    ),
)

FAULTS = CONTROLS + OTHERS + TREE
UNCHANGED = "unchanged"


def seed(fault: Fault | None, folder: Path) -> Path:
    """A copy of the package below `folder`, with the fault."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    if fault is not None:
        path = folder / PACKAGE.name / f"{fault.module}.py"
        text = path.read_text()
        assert text.count(fault.old) == 1, f"{fault.name}: {text.count(fault.old)} places"
        path.write_text(text.replace(fault.old, fault.new))
    return folder


def run_forked(folder: Path, tests: list[str]) -> int:
    """Exit status of pytest on the copy in `folder`; -N = killed by signal N, 100 = it ran another copy."""
    child = os.fork()
    if child == 0:
        import pytest

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(folder / "log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        # "-m": tests that are slow count as well. Faults of addresses end in a signal, whose report is of no use.
        paths = f"pythonpath={folder} {ROOT / 'tests' / 'support'} {ROOT}"
        options = ["-xq", "-m", "", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-o", paths, f"--rootdir={ROOT}"]
        status = int(pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)]))
        found = Path(sys.modules["paced_kernels"].__file__ or "")
        os._exit(status if folder in found.parents else 100)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, *names: str) -> None:
    """Run the tests of every fault of those names, all without one, on a copy that has it, and on one that has none."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo  # what defining operators takes most of its time for
    import triton.language  # noqa: F401

    torch.set_num_threads(1)  # no threads of which a fork would have none
    faults = [fault for fault in FAULTS if not names or fault.name in names]
    for i, fault in enumerate([None, *faults]):
        copy = seed(fault, folder / str(i))
        tests = [fault.test] if fault else sorted({fault.test for fault in faults})
        sys.stdout.write(f"{run_forked(copy, tests)} {fault.name if fault else UNCHANGED}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
