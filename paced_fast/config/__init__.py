"""Every setting of a run, as frozen dataclasses; the sentence under a field is its `--help` text.

`auto` means "what the algorithm's name says"; `config.resolve` replaces it, and the run folder keeps the result.
"""

from paced_fast.config.data import DataConfig
from paced_fast.config.generation import GenerationConfig, MismatchConfig, SyncMode, WeightSyncConfig
from paced_fast.config.guards import GuardConfig, WarningName
from paced_fast.config.paced import Algorithm, LogZConfig, LossConfig, ReplayConfig, Rule, SchedulerConfig
from paced_fast.config.policy import LoraConfig, ModelConfig, OptimizerConfig, WarmStartConfig, WarmStartPhase
from paced_fast.config.rewards import RewardConfig
from paced_fast.config.run import (
    Config,
    DistributedConfig,
    EvaluationConfig,
    GeneratorName,
    RunConfig,
    digest,
    flatten,
    stream_seed,
)

__all__ = [
    "Algorithm",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "GeneratorName",
    "GuardConfig",
    "LogZConfig",
    "LoraConfig",
    "LossConfig",
    "MismatchConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ReplayConfig",
    "RewardConfig",
    "Rule",
    "RunConfig",
    "SchedulerConfig",
    "SyncMode",
    "WarmStartConfig",
    "WarmStartPhase",
    "WarningName",
    "WeightSyncConfig",
    "digest",
    "flatten",
    "stream_seed",
]
