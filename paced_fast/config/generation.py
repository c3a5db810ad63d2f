"""Settings of generation, of the way of weights into an engine, and of what differs there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from paced_fast.config.bounds import Bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """Sampling of completions."""

    prompts_per_step: Annotated[int, Bounds(1, 10**6)] = 16
    """P, prompts drawn in a step."""
    group_size: Annotated[int, Bounds(1, 10**5)] = 8
    """G, completions for each prompt."""
    max_completion_tokens: Annotated[int, Bounds(1, 10**7)] = 1024
    """Completions are cut here; a cut completion is scored like any other."""
    temperature: Annotated[float, Bounds(1e-3, 100.0)] = 1.0
    """Sampling temperature; log-probs everywhere are at this temperature."""
    stop_tokens: tuple[str, ...] = ("auto",)
    """Tokens that end a completion, by text or id; `auto` stands for all that the model's generation settings, its
    configuration, its tokenizer and its chat template end with. The run folder keeps what they were."""
    max_batch_sequences: Annotated[int, Bounds(1, 10**6)] = 256
    """Sequences decoded at once."""


SyncMode = Literal["auto", "shared", "push"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSyncConfig:
    """How vLLM gets the weights, and how its agreement with the trainer is checked."""

    mode: SyncMode = "auto"
    """`shared` (the trainer's parameters are slices of the engine's), `push` (copied after every step), or `auto`:
    shared where the layout allows it, else push with one line that says why."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the engine's weights; `auto` is the policy's, and any other means push."""
    bucket_mib: Annotated[int, Bounds(1, 1 << 20)] = 256
    """`push`: weights are handed over in buckets of about this size, in MiB."""
    tensor_parallel: Annotated[int, Bounds(1, 1024)] = 1
    """Ranks that one vLLM engine is shared out to; above 1 means push."""
    sleep_level: Annotated[Literal[0, 1, 2], Bounds(0, 2)] = 0
    """What the engine gives up while the policy trains on a GPU: 0 the key-value cache only; 1 and 2, in push mode
    only, the weights too (kept in host memory, or dropped)."""
    kv_cache_gib: Annotated[float, Bounds(0.0, 1e6)] = 0.0
    """Key-value cache of the engine in GiB; 0 takes the size in the memory plan."""
    check_every: Annotated[int, Bounds(0, 10**9)] = 10
    """Steps between checks that both sides give the same log-probs; step 0 is always checked; 0 for that one only."""
    check_prompts: Annotated[int, Bounds(1, 64)] = 2
    """Long token sequences scored by both sides in a check."""
    max_mean_difference: Annotated[float, Bounds(0.0, math.inf)] = 0.0
    """Largest mean absolute difference of a token's log-prob (nats) that a check lets pass; above it the run stops.
    0 takes what rounding explains: 0.002 for float32 (0.01 unless `model.matmul_precision` is highest), 0.03 for
    bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchConfig:
    """Correction for the gap between the generator's log-probs and the trainer's."""

    mode: Literal["off", "sequence_truncate", "sequence_mask", "token_truncate", "token_mask"] = "off"
    """Weight of a sequence: the ratio of trainer to generator, cut at the cap or zero outside [1/cap, cap], taken of
    the whole sequence or token by token."""
    cap: Annotated[float, Bounds(1.0 + 1e-6, 1e6)] = 2.0
    """Upper end of the band of ratios; its lower end is 1 / cap."""
