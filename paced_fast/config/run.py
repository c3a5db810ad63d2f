"""One run: everything together, and functions of settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from paced_fast.config.bounds import Bounds
from paced_fast.config.data import DataConfig
from paced_fast.config.generation import GenerationConfig, MismatchConfig, WeightSyncConfig
from paced_fast.config.guards import GuardConfig
from paced_fast.config.paced import (
    ALGORITHMS,
    RULES,
    Algorithm,
    LogZConfig,
    LossConfig,
    ReplayConfig,
    SchedulerConfig,
    Traits,
)
from paced_fast.config.policy import LoraConfig, ModelConfig, OptimizerConfig, WarmStartConfig
from paced_fast.config.rewards import RewardConfig

GeneratorName = Literal["auto", "vllm", "transformers"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out evaluation."""

    every: Annotated[int, Bounds(0, 10**9)] = 25
    """Steps between evaluations during training; 0 for none."""
    samples: Annotated[int, Bounds(1, 10**5)] = 8
    """Completions for each prompt during training."""
    final_samples: Annotated[int, Bounds(1, 10**5)] = 16
    """Completions for each prompt before and after training."""
    temperature: Annotated[float, Bounds(0.0, 100.0)] = 1.0
    """Sampling temperature, apart from training's; 0 takes the likeliest token."""
    top_p: Annotated[float, Bounds(1e-6, 1.0)] = 1.0
    """Sample from the likeliest tokens that hold this share of the mass; training always samples from all."""
    max_completion_tokens: Annotated[int, Bounds(0, 10**7)] = 0
    """Completions are cut here; 0 for generation.max-completion-tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What a run keeps."""

    checkpoint_every: Annotated[int, Bounds(0, 10**9)] = 50
    """Steps between checkpoints; the last step always writes one; 0 for the last only."""
    keep_checkpoints: Annotated[int, Bounds(1, 10**9)] = 2
    """Newest checkpoints kept."""
    async_save: bool = True
    """Write checkpoints beside the steps that follow; a step waits for its parameters to be copied only."""
    rollouts_per_step: Annotated[int, Bounds(0, 10**9)] = 4
    """Rollouts written to rollouts.jsonl each step."""
    save_rollouts: bool = False
    """Write every completion of every step, its tokens and log-probs, to rollouts_full.jsonl: what --replay-rollouts
    trains from. About 20 bytes a token."""
    overwrite: bool = False
    """Replace the results of an earlier run in the same folder."""
    threads: Annotated[int, Bounds(0, 10**4)] = 0
    """CPU threads of torch; 0 for one a core."""
    report: bool = True
    """Write the HTML report and its plots at the end."""
    loggers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Other places that receive the metrics, besides metrics.jsonl."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """Several processes, started by torchrun, one a GPU."""

    mode: Literal["auto", "replicated", "sharded"] = "auto"
    """`replicated` (every rank holds all parameters, and a part of the optimiser's state), `sharded` (FSDP2: parameters
    too are split), or `auto`: replicated where it fits, and the memory plan says why."""
    timeout_seconds: Annotated[float, Bounds(1.0, 86400.0)] = 600.0
    """Longest wait for another rank in an exchange; after it the run stops."""
    stall_seconds: Annotated[float, Bounds(1.0, 86400.0)] = 300.0
    """Time without progress after which every rank logs where it is and what it runs, once; nothing is stopped. Below
    `timeout_seconds`, so that the reason is on record when that ends the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run."""

    preset: str = "tiny"
    """Name of the preset these settings began from."""
    algorithm: Algorithm = "paced"
    """`paced`, `tb` (learned log Z, uniform prompts), `tb_group` (group-mean intercept), `flowrl` or `grpo`."""
    steps: Annotated[int, Bounds(0, 10**9)] = 150
    """Steps of training."""
    seed: Annotated[int, Bounds(0, 2**63 - 1)] = 0
    """Seed of every draw of the run."""
    run_dir: str | None = None
    """Run folder; without one, runs/PRESET-ALGORITHM-SEED (with a number when that is taken)."""
    resume: Literal["never", "auto"] = "never"
    """`auto` continues the newest valid checkpoint of the run folder, and starts anew when the folder has none."""
    generator: GeneratorName = "auto"
    """Who samples completions: `vllm`, `transformers` (the trainer's own model), or `auto`: vllm on a GPU where it is
    installed, else transformers."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    reward: RewardConfig = RewardConfig()
    generation: GenerationConfig = GenerationConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    mismatch: MismatchConfig = MismatchConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    log_z: LogZConfig = LogZConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    replay: ReplayConfig = ReplayConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distributed: DistributedConfig = DistributedConfig()
    guard: GuardConfig = GuardConfig()
    run: RunConfig = RunConfig()

    @property
    def rollouts_per_step(self) -> int:
        """B = P * G."""
        return self.generation.prompts_per_step * self.generation.group_size

    @property
    def traits(self) -> Traits:
        """Needs and defaults of the algorithm."""
        return ALGORITHMS[self.algorithm]

    @property
    def uses_head(self) -> bool:
        """Whether log Z is learned: the intercept, the schedule or replay reads it. Of resolved settings only."""
        return self.loss.intercept == "value" or RULES[self.scheduler.rule].reads_value or self.replay.mode == "on"

    @property
    def value_is_accuracy(self) -> bool:
        """Whether the head predicts accuracy (FlowRL's log Z belongs to normalised rewards and does not)."""
        return self.uses_head and self.traits.value_is_accuracy


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings as one dict from dotted names to values."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits that change when any part does; dataclasses count by their fields."""
    plain = [flatten(part) if dataclasses.is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def stream_seed(seed: int, step: int, stream: str) -> int:
    """Seed of one independent stream of random numbers: a function of (seed, step, stream) and nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{stream}".encode()).digest()[:8], "little") >> 1
