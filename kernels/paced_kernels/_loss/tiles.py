"""Which variant of the projection runs: a static table by architecture, dtype and shape. Nothing is tuned at run time.

Two stages share everything but the way from hidden states to exponentials:

* stage 2, `project_kernel`: a Triton GEMM whose epilogue stores exponentials and row sums;
* stage 1: a library GEMM with float32 output and two row kernels over it. It needs no tensor cores of Triton, takes
  any alignment and dtype, and reads and writes 14 bytes an element more.

T = packed tokens, H = hidden size, V = vocabulary of this rank.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .torch_rows import DEFAULT_WORKSPACE_BYTES

# Rows of a chunk without a workspace bound: adding up dweight once a chunk then costs less than 3 % (6 THV, any H, V).
DEFAULT_ROWS = 8192
# Leading dimension of the buffer of exponentials, in elements: 128-byte rows for TMA and the library GEMMs.
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

    @property
    def width(self) -> int:
        """Columns of a piece of a tile: one partial sum each."""
        return self.block_v // self.pieces

    def num_parts(self, vocab_size: int) -> int:
        """Partial sums of a row."""
        return -(-vocab_size // self.block_v) * self.pieces


# Compiled for each architecture in tests/ops/test_compile.py: no spills, shared memory within the chip's limit.
AMPERE = GemmConfig(128, 128, 32, pieces=1, num_warps=8, num_stages=4, use_tma=False)
HOPPER = GemmConfig(128, 256, 64, pieces=2, num_warps=8, num_stages=3, use_tma=True)
HOPPER_UNALIGNED = GemmConfig(128, 128, 64, pieces=1, num_warps=8, num_stages=4, use_tma=False)
BLACKWELL = GemmConfig(128, 128, 64, pieces=1, num_warps=8, num_stages=4, use_tma=True)
BLACKWELL_UNALIGNED = GemmConfig(128, 128, 64, pieces=1, num_warps=8, num_stages=3, use_tma=False)

# What may run on a chip of each architecture; the first entry that fits the alignment does.
SHIPPED: dict[int, tuple[GemmConfig, ...]] = {
    80: (AMPERE,),
    90: (HOPPER, HOPPER_UNALIGNED),
    100: (BLACKWELL, BLACKWELL_UNALIGNED),
}


def interpreter_config(vocab_size: int, num_rows: int) -> GemmConfig:
    """Blocks for the interpreter, which takes about the same time for a small program as for a large one."""
    block_t = 16 if num_rows <= 64 else 128
    block_v = 64 if vocab_size <= 1024 else 2048
    return GemmConfig(block_t, block_v, 64, pieces=2, num_warps=4, num_stages=1, use_tma=False)


def architecture_of(capability: tuple[int, int]) -> int:
    """Key of `SHIPPED`: consumer chips of newer generations have the shared memory and instructions of sm_80."""
    major, minor = capability
    if (major, minor) == (9, 0):
        return 90
    if major == 10:
        return 100
    return 80


def choose_config(
    capability: tuple[int, int] | None, dtype: torch.dtype, hidden_size: int, vocab_size: int, num_rows: int
) -> GemmConfig | None:
    """Configuration of stage 2, or None for stage 1.

    Args:
        capability: CUDA compute capability; None = the interpreter.
        dtype: of hidden states and weight.

    float32 goes to stage 1, because a Triton product of float32 operands uses no tensor cores or rounds to TF32, and
    float16 because exponentials relative to the target do not fit its range.
    """
    if capability is None:
        return None if dtype == torch.float16 else interpreter_config(vocab_size, num_rows)
    if dtype != torch.bfloat16 or capability < (8, 0):
        return None
    return shipped_config(capability, is_aligned=hidden_size % 8 == 0)


def shipped_config(capability: tuple[int, int], is_aligned: bool) -> GemmConfig:
    """The first configuration of the chip that takes the alignment; TMA needs rows on 16-byte borders."""
    return next(config for config in SHIPPED[architecture_of(capability)] if is_aligned or not config.use_tma)


@functools.cache
def device_facts(index: int) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors of a CUDA device; asks the driver once."""
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def plan(hidden: Tensor, weight: Tensor) -> GemmConfig | None:
    """`choose_config` for these tensors."""
    capability = device_facts(hidden.device.index or 0)[0] if hidden.device.type == "cuda" else None
    return choose_config(capability, hidden.dtype, hidden.shape[1], weight.shape[0], hidden.shape[0])


def adapt_to_alignment(config: GemmConfig, hidden: Tensor, weight: Tensor) -> GemmConfig:
    """The configuration itself, or the one without TMA for slices of a larger tensor that start on odd addresses."""
    is_aligned = all(
        value.data_ptr() % 16 == 0 and value.stride(0) * value.element_size() % 16 == 0 for value in (hidden, weight)
    )
    if not config.use_tma or is_aligned:
        return config
    return shipped_config(device_facts(hidden.device.index or 0)[0], is_aligned=False)


def row_stride(vocab_size: int) -> int:
    """Elements from one row of exponentials to the next."""
    return -(-vocab_size // ROW_ALIGNMENT) * ROW_ALIGNMENT


def bytes_per_row(config: GemmConfig | None, vocab_size: int, dtype: torch.dtype) -> int:
    """Workspace of one row: exponentials (stage 1: float32 logits in their place) and up to three partial sums."""
    if config is None:
        return row_stride(vocab_size) * 4
    return row_stride(vocab_size) * dtype.itemsize + 12 * config.num_parts(vocab_size)


def rows_per_chunk(config: GemmConfig | None, vocab_size: int, dtype: torch.dtype, workspace_bytes: int | None) -> int:
    """Rows that fit the workspace, at least one; `DEFAULT_ROWS` without a bound."""
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
    """Memory the operations take for chunks when the caller sets no bound, for a plan of what fits.

    Beside it the loss holds the gradients it returns, and that of the weight once more in float32.

    Args:
        num_rows: T, rows of one call.
        vocab_size: V, rows of the weight on this device.
        dtype: of hidden states and weight.
        capability: CUDA compute capability, for a plan of a GPU that is not there; None asks the device.

    Returns:
        Bytes.
    """
    if device.type != "cuda" or dtype == torch.float64:
        return DEFAULT_WORKSPACE_BYTES
    capability = capability or device_facts(device.index or 0)[0]
    config = choose_config(capability, dtype, ROW_ALIGNMENT, vocab_size, num_rows)
    return min(num_rows, DEFAULT_ROWS) * bytes_per_row(config, vocab_size, dtype)


def weight_gradient_dtype(hidden: Tensor, weight: Tensor, workspace_bytes: int | None) -> torch.dtype:
    """float32, but the dtype of the weight if all rows are one chunk: one product, which rounds once."""
    rows = rows_per_chunk(plan(hidden, weight), weight.shape[0], weight.dtype, workspace_bytes)
    return weight.dtype if weight.dtype == torch.bfloat16 and hidden.shape[0] <= rows else torch.float32
