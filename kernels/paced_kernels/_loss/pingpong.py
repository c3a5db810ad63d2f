"""Stage 3 of the row engine, taken by name only: `GemmRows` over the ping-pong projection of `pingpong_kernel`.

Everything but the projection is stage 2's. No GPU has run this stage yet: what is known of it comes from the compiler,
and from tests that run its PTX in an emulator.

T = packed tokens, H = hidden size, V = vocabulary of this rank, R = rows of a chunk.
"""

# The packages that compile and launch may be absent.
# pyright: reportMissingImports=false

import functools
from typing import Any

import cutlass
import torch
from cuda.bindings import driver
from cutlass import cute
from cutlass.cute.runtime import make_fake_stream, make_ptr
from torch import Tensor
from torch.nn.functional import pad

from . import pingpong_plan as plan
from . import tiles
from .head import Head
from .pingpong_kernel import ProjectKernel
from .torch_rows import Exponentials
from .triton_gemm import GemmRows

CUTLASS_TYPES = {
    torch.bfloat16: cutlass.BFloat16,
    torch.float32: cutlass.Float32,
    torch.int32: cutlass.Int32,
    torch.int64: cutlass.Int64,
}


class PingPongRows(GemmRows):
    """Row engine over `ProjectKernel`, for bfloat16 on compute capability 9.0."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,  # [T, H]
        token_ids: Tensor,  # [T]
        with_entropy: bool,
        workspace_bytes: int | None,
    ) -> None:
        """Raises ValueError for another chip, and for a weight whose rows TMA cannot read."""
        capability = tiles.device_facts(hidden.device.index or 0)[0]
        if capability != (9, 0):
            raise ValueError(
                f'backend="pingpong" needs a GPU of compute capability 9.0, got {capability[0]}.{capability[1]}; use '
                'backend="auto"'
            )
        if not tiles.is_aligned(head.weight) or hidden.shape[1] % 8:
            raise ValueError(
                'backend="pingpong" needs rows of head_weight that start at multiples of 16 bytes (H a multiple of 8); '
                'use backend="auto"'
            )
        super().__init__(head, hidden, token_ids, with_entropy, workspace_bytes, plan.CONFIG)
        self._bias = None if head.bias is None else pad(head.bias, (0, -self.vocab_size % plan.BLOCK_V))

    def choose(self, chunk: Exponentials, rows: slice, scale: Tensor, share: float) -> None:
        """Pass over nothing: its tiles of 192 columns fit no block of the products that can."""

    def _project(
        self,
        rows: slice,
        parts: Tensor,  # [3, P, R]
        kind: int,  # SUMS or EXPONENTIALS
        *,
        matrix: Tensor | None = None,  # [R, V]
        reference: Tensor | None = None,  # [R]
        gate: Tensor | None = None,
    ) -> None:
        """See `GemmRows._project`; the kind follows from the matrix."""
        hidden, head = self._states(rows), self.head
        if hidden.shape[0] == 0:
            return
        sums, weighted, maxima = parts
        options = plan.Options(
            stores=matrix is not None,
            has_bias=head.bias is not None,
            with_entropy=self.with_entropy,
            gated=gate is not None,
        )
        tensors = {
            "hidden": hidden,
            "weight": head.weight,
            "out": hidden if matrix is None else matrix,
            "bias": head.weight if self._bias is None else self._bias,
            "tokens": self.token_ids[rows],
            "reference": sums if reference is None else reference,
            "gate": self._no_gate if gate is None else gate,
            "sums": sums,
            "weighted": weighted,
            "maxima": maxima,
        }
        num_clusters = tiles.device_facts(hidden.device.index or 0)[1] // plan.CLUSTER
        numbers = (
            hidden.shape[0],
            self.vocab_size,
            hidden.shape[1],
            head.start,
            hidden.stride(0),
            head.weight.stride(0),
            tensors["out"].stride(0),
            1.0 / head.temperature,
            min(num_clusters, plan.cluster_tiles(hidden.shape[0], self.vocab_size)),
        )
        kernel = compiled(options, tensors["bias"].dtype, tensors["tokens"].dtype)
        stream = driver.CUstream(torch.cuda.current_stream(hidden.device).cuda_stream)
        kernel(*(pointer(name, tensor) for name, tensor in tensors.items()), *numbers, stream)

    @functools.cached_property
    def _no_gate(self) -> Tensor:
        return torch.empty(1, dtype=torch.int32, device=self.hidden.device)


WIDE = ("hidden", "weight", "out")
"""What TMA reads and writes."""
DTYPES = {
    **dict.fromkeys(WIDE, torch.bfloat16),
    "reference": torch.float32,
    "gate": torch.int32,
    "sums": torch.float32,
    "weighted": torch.float32,
    "maxima": torch.float32,
}
NAMES = (*WIDE, "bias", "tokens", "reference", "gate", "sums", "weighted", "maxima")
"""Arguments of the kernel that are addresses, in order."""


def pointer(name: str, tensor: Tensor) -> Any:
    """Return the address of a tensor, with its type and what its alignment is known to be."""
    return _pointer(name, tensor.dtype, tensor.data_ptr())


def _pointer(name: str, dtype: torch.dtype, address: int) -> Any:
    alignment = 16 if name in WIDE else dtype.itemsize
    return make_ptr(CUTLASS_TYPES[dtype], address, cute.AddressSpace.gmem, assumed_align=alignment)


@functools.cache
def compiled(options: plan.Options, bias_dtype: torch.dtype, token_dtype: torch.dtype, flags: str = "") -> Any:
    """Compile one variant for sm_90a; no GPU is needed for that. One compilation serves all sizes.

    Args:
        flags: more options of the compiler, for tests that look at what it makes.
    """
    dtypes = {**DTYPES, "bias": bias_dtype, "tokens": token_dtype}
    addresses = [_pointer(name, dtypes[name], 1 << 20) for name in NAMES]
    sizes = [cutlass.Int32(1)] * 3 + [cutlass.Int64(8)] * 4
    return cute.compile(
        ProjectKernel(options),
        *addresses,
        *sizes,
        cutlass.Float32(1.0),
        cutlass.Int32(1),
        make_fake_stream(),
        options=f"--gpu-arch sm_90a {flags}",
    )
