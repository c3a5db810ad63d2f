"""Settings of generation, of the way of weights into an engine, and of what differs there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from paced_fast.config.bounds import Bounds

_BATCH, _LARGE_BATCH = 256, 1024
"""Sequences decoded at once; the larger number is vLLM's on a GPU with much memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """Sampling of completions."""

    prompts_per_step: Annotated[int, Bounds(1, 10**6)] = 16
    """Prompts drawn per step."""
    group_size: Annotated[int, Bounds(1, 10**5)] = 8
    """Completions sampled per prompt. The learned value needs no group as its baseline, so that few completions of many
    prompts teach more than many of few."""
    max_completion_tokens: Annotated[int, Bounds(1, 10**7)] = 1024
    """Maximum length of a completion, in tokens; a completion cut there is scored like any other."""
    temperature: Annotated[float, Bounds(1e-3, 100.0)] = 1.0
    """Sampling temperature; training computes all log-probs at the same temperature."""
    stop_tokens: tuple[str, ...] = ("auto",)
    """Tokens that end a completion, by text or id; `auto`: every end token declared by the model's generation settings,
    its configuration, its tokenizer or its chat template. The run folder records the tokens found."""
    max_batch_sequences: Annotated[int, Bounds(0, 10**6)] = 0
    """Maximum number of sequences that a rank decodes at once; 0: vLLM's own default for the GPU (1024 from 70 GiB on,
    except on an A100), otherwise 256."""

    def batch_sequences(self, *, large_engine: bool = False) -> int:
        """Sequences decoded at once; `large_engine`: by vLLM on a GPU for which its own default is the larger one."""
        return self.max_batch_sequences or (_LARGE_BATCH if large_engine else _BATCH)


SyncMode = Literal["auto", "shared", "push"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSyncConfig:
    """How vLLM receives the weights, and how its log-probs are checked against the trainer's."""

    mode: SyncMode = "auto"
    """`shared` (the trainer's parameters are views of the engine's memory), `push` (parameters are copied after every
    step), or `auto`: shared if the engine's layout allows it, otherwise push; the log states the reason."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the engine's weights; `auto`: that of the policy. A different type requires push."""
    bucket_mib: Annotated[int, Bounds(1, 1 << 20)] = 256
    """Size of the buckets in which `push` copies weights, in MiB."""
    tensor_parallel: Annotated[int, Bounds(1, 1024)] = 1
    """Number of ranks per vLLM engine; a number above 1 requires push."""
    sleep_level: Annotated[Literal[0, 1, 2], Bounds(0, 2)] = 0
    """GPU memory that the engine frees while the policy trains: 0: the key-value cache; 1: the weights too, kept in
    host memory; 2: the weights too, dropped. 1 and 2 require push."""
    kv_cache_gib: Annotated[float, Bounds(0.0, 1e6)] = 0.0
    """Size of the engine's key-value cache, in GiB; 0: the size in the memory plan."""
    check_every: Annotated[int, Bounds(0, 10**9)] = 10
    """Steps between comparisons of the engine's log-probs with the trainer's; one precedes the first step; 0: only
    that one."""
    check_prompts: Annotated[int, Bounds(1, 64)] = 2
    """Number of long token sequences per comparison."""
    max_mean_difference: Annotated[float, Bounds(0.0, math.inf)] = 0.0
    """Largest mean absolute difference of a token's log-prob, in nats; above it the run stops. 0: the difference that
    rounding explains, which is 0.03 in bfloat16, 0.002 in float32, and 0.01 in float32 if `model.matmul_precision` is
    not `highest`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchConfig:
    """Correction for the difference between the generator's log-probs and the trainer's."""

    mode: Literal["off", "sequence_truncate", "sequence_mask", "token_truncate", "token_mask"] = "off"
    """Importance weight, the trainer's probability over the generator's: of the whole sequence (`sequence_...`) or per
    token (`token_...`), cut at the cap (`..._truncate`) or set to 0 outside [1/cap, cap] (`..._mask`); `off`: 1."""
    cap: Annotated[float, Bounds(1.0 + 1e-6, 1e6)] = 2.0
    """Largest importance weight; the masks also have the lower limit 1 / cap."""
