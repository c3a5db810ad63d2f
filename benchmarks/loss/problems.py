"""Problems of the kernel benchmarks: shapes, inputs like those in training, and the required results.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary. One THV is T * H * V floating-point operations; a
GEMM of that shape costs 2 THV.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BETA = 0.05  # reward units per nat
LOG_RATIO_NOISE = 0.05  # nats per token by which the reference policy differs; a few nats per sequence
MEAN_NLL = 0.3  # nats per token of peaked inputs, typical of completions of a trained policy

MODES = ("full", "forward", "frozen")
"""Loss with every gradient; without gradients; with the gradient of the hidden states only."""

COMMON_THV = {"forward": 2.0, "frozen": 4.0, "full": 6.0}
"""THV that the task needs: 2 each for logits, dhidden and dweight, without recomputation."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one problem, written as T16384-H4096-V151936."""

    tokens: int
    hidden_size: int
    vocab_size: int

    @property
    def name(self) -> str:
        """Return the name that `parse` reads."""
        return f"T{self.tokens}-H{self.hidden_size}-V{self.vocab_size}"

    @property
    def num_sequences(self) -> int:
        """Return the number of completions: about a thousand tokens each, at least four completions."""
        return min(self.tokens, max(4, self.tokens // 1024))

    @staticmethod
    def parse(text: str) -> Shape:
        """Return the shape with this name; ValueError for any other text."""
        found = re.fullmatch(r"T(\d+)-H(\d+)-V(\d+)", text)
        if found is None:
            raise ValueError(f"shape {text!r}: write it like T16384-H4096-V151936")
        tokens, hidden_size, vocab_size = (int(word) for word in found.groups())
        return Shape(tokens=tokens, hidden_size=hidden_size, vocab_size=vocab_size)

    def operations(self, thv: float) -> float:
        """Return the floating-point operations of `thv` THV."""
        return thv * self.tokens * self.hidden_size * self.vocab_size


GPU_FIRST = Shape(tokens=16384, hidden_size=4096, vocab_size=151936)
CPU_SHAPE = Shape(tokens=2048, hidden_size=576, vocab_size=49152)
QUICK_SHAPE = Shape(tokens=256, hidden_size=128, vocab_size=8192)
TOY_SHAPE = Shape(tokens=96, hidden_size=64, vocab_size=512)


def toy_of(shape: Shape) -> Shape:
    """Stand-in for a shape of a GPU on a CPU; different shapes have different ones."""
    return Shape(tokens=shape.tokens // 512, hidden_size=shape.hidden_size // 64, vocab_size=shape.vocab_size // 512)


def gpu_grid() -> list[Shape]:
    """Return all GPU shapes, most important first: the headline, then hidden sizes, lengths, the other vocabulary."""
    sizes = [
        (tokens, hidden_size, vocab_size)
        for vocab_size in (151936, 128256)
        for tokens in (16384, 8192, 32768, 4096)
        for hidden_size in (4096, 2048, 3584, 5120, 896)
    ]
    return [Shape(tokens=t, hidden_size=h, vocab_size=v) for t, h, v in sizes]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Set of inputs; `cu_seqlens` is on the CPU, the rest on the measured device."""

    shape: Shape
    hidden: Tensor  # [T, H]
    head_weight: Tensor  # [V, H]
    token_ids: Tensor  # [T] i64
    cu_seqlens: Tensor  # [B + 1] i64, CPU
    ref_logprobs: Tensor  # [T] f32
    rewards: Tensor  # [B] f32
    log_z: Tensor  # [B] f32
    token_weights: Tensor  # [T] f32, dloss / dlogprobs in the case `logprobs`
    mean_logprob: float  # nats

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())


def draw_lengths(tokens: int, num_sequences: int, generator: torch.Generator) -> Tensor:
    """Return [B] random lengths of sum `tokens`, from a quarter to about twice the mean, all positive."""
    shares = 0.25 + 1.5 * torch.rand(num_sequences, generator=generator, dtype=torch.float64)
    ends = (shares.cumsum(0) / shares.sum() * (tokens - num_sequences)).round().long()
    return torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64)) + 1


def make_weight(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Return [V, H] with rows of norm about 1."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator, device=device, dtype=torch.float32)
    return weight.mul_(shape.hidden_size**-0.5).to(dtype)


def make_batch(
    shape: Shape,
    head_weight: Tensor,  # [V, H]
    kind: str,
    seed: int,
) -> Batch:
    """Create inputs of one kind: "peaked" steers each state towards its token, "flat" leaves both random.

    Peaked: each token gets a negative log-prob drawn from a heavy-tailed distribution of mean 0.3 nats (most tokens
    are nearly certain, some are not), and the state of that token is noise plus the multiple of its weight row that
    gives this log-prob. The reference policy differs by a little noise, so that residuals are a few nats as in
    training, and errors of log-probs affect the gradients as much as they would there.
    """
    if kind not in ("peaked", "flat"):
        raise ValueError(f"inputs {kind!r}: give peaked or flat")
    device, dtype = head_weight.device, head_weight.dtype
    generator = torch.Generator(device).manual_seed(seed)
    host = torch.Generator().manual_seed(seed)
    tokens, vocab_size = shape.tokens, shape.vocab_size
    token_ids = torch.randint(0, vocab_size, (tokens,), generator=generator, device=device)
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator, device=device, dtype=torch.float32)
    rows = head_weight[token_ids].float()
    if kind == "peaked":
        uniform = torch.rand(tokens, generator=generator, device=device, dtype=torch.float64).clamp_(1e-12)
        nll = (0.5 * MEAN_NLL * uniform.log().square()).clamp(1e-6, 12.0)  # square of an exponential variable: mean 2
        margin = -nll.expm1().log()
        target = torch.full_like(margin, math.log(vocab_size) + 0.5)
        for _ in range(20):  # steering also spreads the other logits: it adds variance target^2 / H to the noise
            target = math.log(vocab_size) + 0.5 * (1.0 + (target**2 / shape.hidden_size).clamp(max=8.0)) + margin
        missing = target.float() - (hidden * rows).sum(-1)
        hidden += (missing / rows.square().sum(-1))[:, None] * rows
    lengths = draw_lengths(tokens, shape.num_sequences, host)
    batch = Batch(
        shape=shape,
        hidden=hidden.to(dtype),
        head_weight=head_weight,
        token_ids=token_ids,
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        ref_logprobs=torch.empty(0, device=device),
        rewards=torch.randint(0, 2, (shape.num_sequences,), generator=host).float().to(device),
        log_z=(torch.rand(shape.num_sequences, generator=host) / BETA).to(device),
        token_weights=torch.randn(tokens, generator=generator, device=device) / tokens,
        mean_logprob=math.nan,
    )
    logprobs = torch.cat([part for _, part in chunked_logprobs(batch, dtype)]).float()
    noise = LOG_RATIO_NOISE * torch.randn(tokens, generator=generator, device=device)
    return replace(batch, ref_logprobs=logprobs + noise, mean_logprob=float(logprobs.double().mean()))


def chunked_logprobs(batch: Batch, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their log-probs): a plain product in `dtype`, then float32 or float64 arithmetic."""
    weight = batch.head_weight.to(dtype)
    for rows in row_chunks(batch.shape):
        logits = batch.hidden[rows].to(dtype) @ weight.T
        logits = logits if dtype == torch.float64 else logits.float()
        chosen = logits.gather(1, batch.token_ids[rows, None])[:, 0]
        yield rows, chosen - logits.logsumexp(-1)


def row_chunks(shape: Shape, chunk_bytes: int = 2**30) -> Iterator[slice]:
    """Yield slices of rows whose float64 logits take at most about a GiB."""
    size = max(1, chunk_bytes // (8 * shape.vocab_size))
    for start in range(0, shape.tokens, size):
        yield slice(start, min(start + size, shape.tokens))
