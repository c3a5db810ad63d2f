"""Choice of the projection kernel: a static table by architecture, dtype and shape. Nothing is tuned at run time.

Two variants, called stages, differ only in how hidden states become exponentials:

* stage 2, `project_kernel`: a Triton GEMM whose epilogue stores exponentials and row sums;
* stage 1: a library GEMM with float32 output, then two row kernels. It does not need tensor cores in Triton, takes any
  alignment and dtype, and reads and writes 14 more bytes per element.

T = packed tokens, H = hidden size, V = vocabulary of this rank.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .torch_rows import DEFAULT_WORKSPACE_BYTES, KEPT_BYTES, kept_bytes

# Rows per chunk without a workspace bound: adding up dweight once per chunk then costs < 3 % (6 THV, any H, V).
DEFAULT_ROWS = 8192
# Row alignment of the buffer of exponentials, in elements: 128 bytes, for TMA and the library GEMMs.
ROW_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """Block shapes of `project_kernel`; tiles are [block_t, block_v], the inner dimension steps by block_h."""

    block_t: int
    block_v: int
    block_h: int
    pieces: int
    num_warps: int
    num_stages: int
    use_tma: bool
    group_v: int = 8
    is_flat: bool = False  # one loop over the steps of all tiles instead of one for each tile
    is_split: bool = True  # an epilogue of its own for pieces that hold no target and no edge

    @property
    def width(self) -> int:
        """Columns per piece of a tile; each piece gives one partial sum."""
        return self.block_v // self.pieces

    def num_parts(self, vocab_size: int) -> int:
        """Number of partial sums per row."""
        return -(-vocab_size // self.block_v) * self.pieces


# tests/ops/test_compile.py compiles each for its architecture: no spills, shared memory within the chip's limit.
AMPERE = GemmConfig(128, 128, 32, pieces=1, num_warps=8, num_stages=4, use_tma=False)
HOPPER = GemmConfig(128, 256, 64, pieces=2, num_warps=8, num_stages=4, use_tma=True, is_flat=True)
HOPPER_PLAIN = GemmConfig(128, 256, 64, pieces=2, num_warps=8, num_stages=3, use_tma=True, is_split=False)
HOPPER_UNALIGNED = GemmConfig(128, 128, 64, pieces=1, num_warps=8, num_stages=4, use_tma=False)
BLACKWELL = GemmConfig(128, 128, 64, pieces=1, num_warps=8, num_stages=4, use_tma=True)
BLACKWELL_UNALIGNED = GemmConfig(128, 128, 64, pieces=1, num_warps=8, num_stages=3, use_tma=False)

# Configurations per architecture; the first one that fits the alignment is used. HOPPER_PLAIN has neither the loop over
# all tiles nor the second epilogue: in front of HOPPER it takes its place, should a chip or a version disappoint.
SHIPPED: dict[int, tuple[GemmConfig, ...]] = {
    80: (AMPERE,),
    90: (HOPPER, HOPPER_PLAIN, HOPPER_UNALIGNED),
    100: (BLACKWELL, BLACKWELL_UNALIGNED),
}


def interpreter_config(vocab_size: int, num_rows: int) -> GemmConfig:
    """Return blocks for the interpreter, which takes about equally long for small and large programs."""
    block_t = 16 if num_rows <= 64 else 128
    block_v = 64 if vocab_size <= 1024 else 2048
    return GemmConfig(block_t, block_v, 64, pieces=2, num_warps=4, num_stages=1, use_tma=False, is_flat=True)


def architecture_of(capability: tuple[int, int]) -> int:
    """Return the key in `SHIPPED`; newer consumer chips have the shared memory and instructions of sm_80."""
    major, minor = capability
    if (major, minor) == (9, 0):
        return 90
    if major == 10:
        return 100
    return 80


def choose_config(
    capability: tuple[int, int] | None, dtype: torch.dtype, hidden_size: int, vocab_size: int, num_rows: int
) -> GemmConfig | None:
    """Return the configuration of stage 2, or None for stage 1.

    Args:
        capability: CUDA compute capability; None = the interpreter.
        dtype: dtype of hidden states and weight.

    float32 uses stage 1, because a Triton product of float32 operands uses no tensor cores or rounds to TF32. float16
    uses stage 1, because exponentials relative to the target do not fit its range.
    """
    if capability is None:
        return None if dtype == torch.float16 else interpreter_config(vocab_size, num_rows)
    if dtype != torch.bfloat16 or capability < (8, 0):
        return None
    return shipped_config(capability, is_aligned=hidden_size % 8 == 0)


def shipped_config(capability: tuple[int, int], is_aligned: bool) -> GemmConfig:
    """Return the chip's first configuration that fits the alignment; TMA needs rows aligned to 16 bytes."""
    return next(config for config in SHIPPED[architecture_of(capability)] if is_aligned or not config.use_tma)


@functools.cache
def device_facts(index: int) -> tuple[tuple[int, int], int]:
    """Return compute capability and number of multiprocessors of a CUDA device; queries the driver once."""
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def plan(hidden: Tensor, weight: Tensor) -> GemmConfig | None:
    """`choose_config` for these tensors."""
    capability = device_facts(hidden.device.index or 0)[0] if hidden.device.type == "cuda" else None
    return choose_config(capability, hidden.dtype, hidden.shape[1], weight.shape[0], hidden.shape[0])


def is_aligned(matrix: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def adapt_to_alignment(config: GemmConfig, hidden: Tensor, weight: Tensor) -> GemmConfig:
    """Return `config`, or the one without TMA for slices of a larger tensor that start at unaligned addresses."""
    if not config.use_tma or (is_aligned(hidden) and is_aligned(weight)):
        return config
    return shipped_config(device_facts(hidden.device.index or 0)[0], is_aligned=False)


def row_stride(vocab_size: int) -> int:
    """Return the stride between rows of exponentials, in elements."""
    return -(-vocab_size // ROW_ALIGNMENT) * ROW_ALIGNMENT


def bytes_per_row(config: GemmConfig | None, vocab_size: int, dtype: torch.dtype) -> int:
    """Workspace per row: exponentials (stage 1: float32 logits instead) and up to three sets of partial sums."""
    if config is None:
        return row_stride(vocab_size) * 4
    return row_stride(vocab_size) * dtype.itemsize + 12 * config.num_parts(vocab_size)


def rows_per_chunk(config: GemmConfig | None, vocab_size: int, dtype: torch.dtype, workspace_bytes: int | None) -> int:
    """Return the rows that fit the workspace, at least one; `DEFAULT_ROWS` without a bound."""
    if workspace_bytes is None:
        return DEFAULT_ROWS
    return max(1, workspace_bytes // bytes_per_row(config, vocab_size, dtype))


def default_workspace_bytes(
    num_rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    capability: tuple[int, int] | None = None,
) -> int:
    """Memory that the operations use for chunks if the caller sets no bound; for planning what fits.

    In addition the loss holds the gradients it returns, and a second copy of the weight gradient in float32.

    Args:
        num_rows: T, rows of one call.
        vocab_size: V, rows of the weight on this device.
        dtype: dtype of hidden states and weight.
        capability: CUDA compute capability, to plan for a GPU that is absent; None queries the device.

    Returns:
        Bytes.
    """
    if device.type != "cuda" or dtype == torch.float64:
        kept = kept_bytes(num_rows, vocab_size, dtype)
        return (
            kept if DEFAULT_WORKSPACE_BYTES < kept <= KEPT_BYTES and device.type == "cpu" else DEFAULT_WORKSPACE_BYTES
        )
    capability = capability or device_facts(device.index or 0)[0]
    config = choose_config(capability, dtype, ROW_ALIGNMENT, vocab_size, num_rows)
    return min(num_rows, DEFAULT_ROWS) * bytes_per_row(config, vocab_size, dtype)


def weight_gradient_dtype(hidden: Tensor, weight: Tensor, workspace_bytes: int | None) -> torch.dtype:
    """Return float32, or the weight's dtype if all rows fit one chunk: a single product, which rounds once."""
    rows = rows_per_chunk(plan(hidden, weight), weight.shape[0], weight.dtype, workspace_bytes)
    return weight.dtype if weight.dtype == torch.bfloat16 and hidden.shape[0] <= rows else torch.float32
