"""One run: everything together, and functions of settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import PurePath
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

OWN = "own"
"""Name of the preset for models of the user's own."""

GeneratorName = Literal["auto", "vllm", "transformers"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out evaluation."""

    every: Annotated[int, Bounds(0, 10**9)] = 25
    """Steps between evaluations during training; 0: none."""
    samples: Annotated[int, Bounds(1, 10**5)] = 8
    """Completions per prompt in evaluations during training."""
    final_samples: Annotated[int, Bounds(1, 10**5)] = 16
    """Completions per prompt in the evaluations before and after training."""
    temperature: Annotated[float, Bounds(0.0, 100.0)] = 1.0
    """Sampling temperature of evaluations; 0: always the likeliest token."""
    top_p: Annotated[float, Bounds(1e-6, 1.0)] = 1.0
    """Share of the probability mass that evaluations sample from, likeliest tokens first; training samples from all."""
    max_completion_tokens: Annotated[int, Bounds(0, 10**7)] = 0
    """Maximum length of a completion in evaluations, in tokens; 0: that of `generation`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Files, checkpoints and threads of a run."""

    checkpoint_every: Annotated[int, Bounds(0, 10**9)] = 50
    """Steps between checkpoints; the last step always writes one; 0: only the last step does."""
    keep_checkpoints: Annotated[int, Bounds(1, 10**9)] = 2
    """Number of newest checkpoints that are kept."""
    async_save: bool = True
    """Write checkpoints in the background; training only waits until the parameters are copied."""
    rollouts_per_step: Annotated[int, Bounds(0, 10**9)] = 4
    """Rollouts written to rollouts.jsonl per step."""
    show_sample_every: Annotated[int, Bounds(0, 10**9)] = 25
    """Steps between sample completions on the terminal; 0: none."""
    save_rollouts: bool = False
    """Write every completion of every step with its tokens and log-probs to rollouts_full.jsonl, for --replay-rollouts;
    about 20 bytes per token."""
    overwrite: bool = False
    """Replace the results of an earlier run in the same folder."""
    threads: Annotated[int, Bounds(0, 10**4)] = 0
    """CPU threads of torch per process; 0: OMP_NUM_THREADS if it is set, else the machine's usable cores divided among
    its processes."""
    report: bool = True
    """Write the HTML report and its charts when training ends."""
    report_every: Annotated[int, Bounds(0, 10**9)] = 25
    """Steps between reports during training, written by another process that takes up to 5 % of a core; the open page
    refreshes itself; 0: only at the end."""
    loggers: tuple[Literal["wandb", "tensorboard", "trackio", "mlflow"], ...] = ()
    """Loggers that receive figures, completions and the report, in addition to the files of the run folder."""
    project: str = "paced_fast"
    """Project of the run at wandb and trackio; experiment at mlflow."""
    group: str | None = None
    """Group of the run at wandb, trackio and mlflow; default: none."""
    tags: tuple[str, ...] = ()
    """Tags of the run at wandb, trackio and mlflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """Training with several processes, started by torchrun, one per GPU."""

    mode: Literal["auto", "replicated", "sharded"] = "auto"
    """`replicated` (every rank holds all parameters and its part of the optimiser state), `sharded` (FSDP2: parameters
    are split too), or `auto`: replicated if it fits in memory, otherwise sharded; the memory plan has the numbers."""
    gradients: Literal["auto", "whole", "split"] = "auto"
    """Gradients of replicated parameters: `whole` on every rank, summed over the ranks once per optimiser step;
    `split`, summed after every micro-batch, so that a rank keeps its part (less memory, more exchange); or `auto`:
    split where whole ones do not fit in memory. Sharded parameters always have split gradients."""
    prompts: Literal["queue", "parts"] = "queue"
    """How ranks share a step's prompts for sampling: `queue` (a rank takes the next ones whenever it has room, so that
    none idles while others have prompts waiting) or `parts` (each has an equal part). With vLLM, which prompts are
    decoded side by side then depends on timing, and with that the rounding of log-probs; `parts` avoids this. Engines
    split over ranks have parts."""
    timeout_seconds: Annotated[float, Bounds(1.0, 86400.0)] = 600.0
    """Maximum wait for another rank in a collective, in seconds; beyond it the run stops."""
    stall_seconds: Annotated[float, Bounds(1.0, 86400.0)] = 300.0
    """Time without progress, in seconds, after which every rank logs once where it stands; nothing is stopped. Keep it
    below `timeout_seconds`, so that the log shows the reason before the run stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run."""

    preset: str = "tiny"
    """Name of the preset that these settings started from; give it as the first word, not as an option."""
    algorithm: Algorithm = "paced"
    """`paced` (trajectory balance whose learned log Z schedules prompts and replay), `paced_paper` (the same
    with the head of arXiv 2602.12642 alone, fitted once to the groups of each step), `tb` (trajectory balance with a
    learned log Z and uniform prompts), `tb_group` (with the group's mean reward in place of log Z), `flowrl`
    (trajectory balance to rewards normalised within the group) or `grpo` (clipped policy gradient with the group's mean
    and deviation as baseline)."""
    steps: Annotated[int, Bounds(0, 10**9)] = 150
    """Steps of training."""
    seed: Annotated[int, Bounds(0, 2**63 - 1)] = 0
    """Seed of every draw of the run."""
    run_dir: str | None = None
    """Run folder; none: runs/PRESET-ALGORITHM-SEED, or runs/MODEL-ALGORITHM-SEED with a model of your own, and a number
    appended if that folder exists."""
    resume: Literal["never", "auto"] = "never"
    """`auto`: continue from the newest valid checkpoint of the run folder, or start anew if it has none; `never`: start
    anew; on the command line also a run folder, which is continued with its own settings."""
    generator: GeneratorName = "auto"
    """Engine that samples completions: `vllm`, `transformers` (the trainer's own model), or `auto`: vllm if it is
    installed and the policy is on a GPU, otherwise transformers."""
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
    def label(self) -> str:
        """Name of the run without a number: preset, or the model's where that is the user's own, algorithm and seed."""
        own = re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(self.model.name).name).strip(".-") or "model"
        return f"{own if self.preset == OWN else self.preset}-{self.algorithm}-{self.seed}"

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
