"""Options of other trainers, and the settings here that do the same; and the nearest option to one that is mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Counterpart(NamedTuple):
    """What stands here for an option of another trainer."""

    options: tuple[str, ...]
    """Options to give instead; none where nothing does the same."""
    note: str = ""
    """What is different, as a sentence."""


def _to(*options: str, note: str = "") -> Counterpart:
    return Counterpart(options, note)


_BATCH = _to(
    "--generation.prompts-per-step",
    "--optimizer.micro-batch-tokens",
    note="The first is the number of prompts per step, the second the number of tokens per forward pass.",
)
_KL = _to(note="No KL term to a frozen reference: --loss.beta weighs staying near the policy of the step before.")
_ACCUMULATION = _to(
    "--optimizer.minibatches",
    note="The number of optimiser steps per batch; passes have up to --optimizer.micro-batch-tokens.",
)
_EPOCHS = _to("--steps", note="A run has a number of steps; each draws --generation.prompts-per-step prompts.")
_LOGGERS = _to("--run.loggers", note="As in --run.loggers wandb.")
_PRECISION = _to("--model.dtype", note="Give bfloat16 or float32.")
_LR = _to("--optimizer.learning-rate")
_DECAY = _to("--optimizer.decay", note="Give none (constant) or linear; the warm-up is --optimizer.warmup-steps.")
_GROUP = _to("--generation.group-size")
_COMPLETION = _to("--generation.max-completion-tokens")
_PROMPT = _to("--data.max-prompt-tokens")
_CLIP = _to("--loss.importance-cap", "--loss.grpo-clip", note="The second with --algorithm grpo.")
_EVERY = _to("--evaluation.every")
_SAVE = _to("--run.checkpoint-every")
_CACHE = _to("--weight-sync.kv-cache-gib", note="The size of the key-value cache in GiB.")
_VLLM = _to("--generator", note="Give vllm.")
_DATA = _to("--data", note="A file, a folder or a data set of the hub, as in --data train.jsonl.")
_MODEL = _to("--model")
_ATTENTION = _to("--model.attention")
_QUANTISED = _to(note="Quantised weights are not trained here; --lora.rank trains adapters of bfloat16 weights.")

NAMES: dict[str, Counterpart] = {
    # TRL and transformers
    "learning-rate": _LR,
    "lr": _LR,
    "num-generations": _GROUP,
    "per-device-train-batch-size": _BATCH,
    "train-batch-size": _BATCH,
    "batch-size": _BATCH,
    "generation-batch-size": _to("--generation.prompts-per-step", "--generation.group-size"),
    "steps-per-generation": _to("--optimizer.minibatches"),
    "num-iterations": _to(
        "--optimizer.epochs", "--steps", note="The first are passes over each batch, the second steps of training."
    ),
    "gradient-accumulation-steps": _ACCUMULATION,
    "max-completion-length": _COMPLETION,
    "max-new-tokens": _COMPLETION,
    "max-prompt-length": _PROMPT,
    "max-length": _to("--data.max-prompt-tokens", "--generation.max-completion-tokens"),
    "max-seq-length": _to("--data.max-prompt-tokens", "--generation.max-completion-tokens"),
    "beta": _to(
        "--loss.beta", note="It weighs staying near the policy of the step before, not near a frozen reference."
    ),
    "kl-coef": _KL,
    "epsilon": _CLIP,
    "epsilon-high": _CLIP,
    "delta": _CLIP,
    "loss-type": _to("--algorithm"),
    "scale-rewards": _to("--algorithm", note="Advantages are scaled with grpo only."),
    "reward-funcs": _to("--reward", note="One function, or a weighted sum such as 0.7*math+0.3*file.py:function."),
    "reward-weights": _to("--reward", note="Weights stand in the sum, as in 0.7*math+0.3*file.py:function."),
    "reward-model-path": _to("--reward", note="A reward is a function, file.py:function, which may call any model."),
    "num-train-epochs": _EPOCHS,
    "epochs": _EPOCHS,
    "num-epochs": _EPOCHS,
    "max-steps": _to("--steps"),
    "total-steps": _to("--steps"),
    "output-dir": _to("--run-dir"),
    "out-dir": _to("--run-dir"),
    "run-name": _to("--run-dir"),
    "overwrite-output-dir": _to("--run.overwrite"),
    "resume-from-checkpoint": _to("--resume", note="Give the run folder."),
    "report-to": _LOGGERS,
    "wandb": _LOGGERS,
    "tensorboard": _LOGGERS,
    "use-wandb": _LOGGERS,
    "wandb-project": _to("--run.project"),
    "project": _to("--run.project"),
    "logging-steps": _to(note="Every step is written to metrics.jsonl in the run folder."),
    "save-steps": _SAVE,
    "save-strategy": _SAVE,
    "save-total-limit": _to("--run.keep-checkpoints"),
    "eval-steps": _EVERY,
    "eval-strategy": _EVERY,
    "per-device-eval-batch-size": _to("--generation.max-batch-sequences"),
    "model-name-or-path": _MODEL,
    "model-name": _MODEL,
    "model-id": _MODEL,
    "model-path": _MODEL,
    "base-model": _MODEL,
    "model-revision": _to(note="Download the revision and give its folder by --model."),
    "trust-remote-code": _to(note="Code of a repository is never run."),
    "dataset": _DATA,
    "dataset-name": _DATA,
    "dataset-path": _DATA,
    "train-data": _DATA,
    "train-file": _DATA,
    "dataset-config": _to("--data", note="Write it into the source: --data 'hf:NAME?config=CONFIG'."),
    "dataset-train-split": _to("--data", note="Write it into the source: --data 'hf:NAME?split=SPLIT'."),
    "dataset-test-split": _to("--eval-data", note="Write it into the source: --eval-data 'hf:NAME?split=SPLIT'."),
    "eval-dataset": _to("--eval-data"),
    "eval-file": _to("--eval-data"),
    "val-data": _to("--eval-data"),
    "test-file": _to("--eval-data"),
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "dtype": _PRECISION,
    "torch-dtype": _PRECISION,
    "tf32": _to("--model.matmul-precision", note="Give high."),
    "device": _to("--model.device"),
    "attn-implementation": _ATTENTION,
    "flash-attn": _ATTENTION,
    "use-liger-kernel": _to("--model.liger", note="Give on."),
    "torch-compile": _to("--model.compile", note="Give on."),
    "use-torch-compile": _to("--model.compile", note="Give on."),
    "use-liger-loss": _to(note="The loss is always fused with the output layer."),
    "use-vllm": _VLLM,
    "vllm-mode": _VLLM,
    "vllm-gpu-memory-utilization": _CACHE,
    "gpu-memory-utilization": _CACHE,
    "vllm-tensor-parallel-size": _to("--weight-sync.tensor-parallel"),
    "tensor-parallel-size": _to("--weight-sync.tensor-parallel"),
    "vllm-enable-sleep-mode": _to("--weight-sync.sleep-level"),
    "max-grad-norm": _to("--optimizer.max-grad-norm"),
    "grad-clip": _to("--optimizer.max-grad-norm"),
    "warmup-steps": _to("--optimizer.warmup-steps"),
    "warmup-ratio": _to("--optimizer.warmup-steps", note="It is a number of steps."),
    "weight-decay": _to("--optimizer.weight-decay"),
    "adam-beta1": _to("--optimizer.beta1"),
    "adam-beta2": _to("--optimizer.beta2"),
    "lr-scheduler-type": _DECAY,
    "optim": _to(note="The optimiser is AdamW; --optimizer.learning-rate and its neighbours set it."),
    "temperature": _to("--generation.temperature", "--evaluation.temperature"),
    "top-p": _to("--evaluation.top-p", note="Training samples from the whole distribution."),
    "top-k": _to(note="Training samples from the whole distribution; evaluation has --evaluation.top-p."),
    "num-samples": _to("--generation.group-size", "--evaluation.samples"),
    "chat-template": _to("--data.template", note="Give chat for the template of the tokenizer."),
    "chat-template-kwargs": _to("--data.template-args"),
    "system-prompt": _to("--data.system-prompt"),
    "mask-truncated-completions": _to("--reward.shaping", note="Give 0.2*truncated or 0.2*overlong."),
    "sync-ref-model": _KL,
    "ref-model": _KL,
    "deepspeed": _to("--distributed.mode", note="Start with torchrun; sharded is FSDP2."),
    "fsdp": _to("--distributed.mode", note="Start with torchrun; sharded is FSDP2."),
    "num-gpus": _to(note="Start with torchrun --nproc-per-node N."),
    "push-to-hub": _to(note="python -m paced_fast export writes a folder that the hub's client uploads."),
    # LoRA, PEFT and unsloth
    "use-peft": _to("--lora.rank"),
    "use-lora": _to("--lora.rank"),
    "lora": _to("--lora.rank"),
    "lora-r": _to("--lora.rank"),
    "lora-rank": _to("--lora.rank"),
    "max-lora-rank": _to("--lora.rank"),
    "lora-alpha": _to("--lora.alpha"),
    "lora-target-modules": _to("--lora.targets"),
    "target-modules": _to("--lora.targets"),
    "lora-dropout": _to(note="Adapters have no dropout."),
    "load-in-4bit": _QUANTISED,
    "load-in-8bit": _QUANTISED,
    "fast-inference": _VLLM,
    "use-gradient-checkpointing": _to("--model.gradient-checkpointing"),
    "gradient-checkpointing": _to("--model.gradient-checkpointing"),
    # nanochat
    "device-batch-size": _BATCH,
    "examples-per-step": _to("--generation.prompts-per-step"),
    "eval-every": _EVERY,
    "save-every": _SAVE,
    "eval-examples": _to("--eval-data", note="Write it into the source: --eval-data 'FILE?size=N'."),
    # verl
    "algorithm.adv-estimator": _to("--algorithm"),
    "algorithm.kl-ctrl.kl-coef": _KL,
    "algorithm.use-kl-in-reward": _KL,
    "algorithm.rollout-correction.rollout-is": _to("--mismatch.mode"),
    "data.train-files": _DATA,
    "data.val-files": _to("--eval-data"),
    "data.prompt-key": _to("--data", note="Write it into the source: --data 'FILE?prompt=COLUMN'."),
    "data.train-batch-size": _to("--generation.prompts-per-step"),
    "data.max-prompt-length": _PROMPT,
    "data.max-response-length": _COMPLETION,
    "data.truncation": _to("--data.too-long"),
    "data.filter-overlong-prompts": _to("--data.too-long", note="Give skip."),
    "actor-rollout-ref.model.path": _MODEL,
    "actor-rollout-ref.model.lora-rank": _to("--lora.rank"),
    "actor-rollout-ref.model.lora-alpha": _to("--lora.alpha"),
    "actor-rollout-ref.model.target-modules": _to("--lora.targets"),
    "actor-rollout-ref.model.enable-gradient-checkpointing": _to("--model.gradient-checkpointing"),
    "actor-rollout-ref.actor.optim.lr": _LR,
    "actor-rollout-ref.actor.optim.lr-warmup-steps": _to("--optimizer.warmup-steps"),
    "actor-rollout-ref.actor.optim.lr-scheduler-type": _DECAY,
    "actor-rollout-ref.actor.optim.warmup-style": _DECAY,
    "actor-rollout-ref.actor.optim.weight-decay": _to("--optimizer.weight-decay"),
    "actor-rollout-ref.actor.grad-clip": _to("--optimizer.max-grad-norm"),
    "actor-rollout-ref.actor.clip-ratio": _CLIP,
    "actor-rollout-ref.actor.ppo-epochs": _to("--optimizer.epochs"),
    "actor-rollout-ref.actor.ppo-mini-batch-size": _to("--optimizer.minibatches", note="The number of minibatches."),
    "actor-rollout-ref.actor.ppo-micro-batch-size-per-gpu": _to("--optimizer.micro-batch-tokens"),
    "actor-rollout-ref.actor.ppo-max-token-len-per-gpu": _to("--optimizer.micro-batch-tokens"),
    "actor-rollout-ref.actor.use-kl-loss": _KL,
    "actor-rollout-ref.actor.kl-loss-coef": _KL,
    "actor-rollout-ref.actor.strategy": _to("--distributed.mode"),
    "actor-rollout-ref.rollout.n": _GROUP,
    "actor-rollout-ref.rollout.name": _to("--generator"),
    "actor-rollout-ref.rollout.temperature": _to("--generation.temperature"),
    "actor-rollout-ref.rollout.response-length": _COMPLETION,
    "actor-rollout-ref.rollout.max-num-seqs": _to("--generation.max-batch-sequences"),
    "actor-rollout-ref.rollout.gpu-memory-utilization": _CACHE,
    "actor-rollout-ref.rollout.tensor-model-parallel-size": _to("--weight-sync.tensor-parallel"),
    "actor-rollout-ref.rollout.val-kwargs.n": _to("--evaluation.samples"),
    "actor-rollout-ref.rollout.val-kwargs.temperature": _to("--evaluation.temperature"),
    "actor-rollout-ref.rollout.val-kwargs.top-p": _to("--evaluation.top-p"),
    "custom-reward-function.path": _to("--reward", note="Give verl:FILE.py:FUNCTION."),
    "custom-reward-function.name": _to("--reward", note="Give verl:FILE.py:FUNCTION."),
    "reward.custom-reward-function.path": _to("--reward", note="Give verl:FILE.py:FUNCTION."),
    "trainer.total-epochs": _EPOCHS,
    "trainer.total-training-steps": _to("--steps"),
    "trainer.logger": _LOGGERS,
    "trainer.project-name": _LOGGERS,
    "trainer.experiment-name": _to("--run-dir"),
    "trainer.default-local-dir": _to("--run-dir"),
    "trainer.save-freq": _SAVE,
    "trainer.test-freq": _EVERY,
    "trainer.n-gpus-per-node": _to(note="Start with torchrun --nproc-per-node N."),
    "trainer.nnodes": _to(note="Start with torchrun --nnodes N."),
    "trainer.resume-mode": _to("--resume"),
}
"""Options of TRL, transformers, unsloth, nanochat and verl, without dashes in front and with - for _."""

_NEAR = 0.8
"""Least similarity of a suggestion: below it a suggestion would more often be another setting than a typing error."""
_MOST = 4


def counterpart(option: str) -> Counterpart | None:
    """What stands here for an option of another trainer; None for one that is not in the table."""
    return NAMES.get(option.lstrip("-+").replace("_", "-"))


def suggestion(option: str, known: Sequence[str]) -> str:
    """What to say after the name of an unknown option: what it is called here, or which of the `known` is near."""
    found = counterpart(option)
    if found is not None:
        asks = f"did you mean {_either(found.options)}?" if found.options else ""
        return f"{asks} {found.note}".strip()
    last = f".{option.lstrip('-').replace('_', '-')}"
    same = [name for name in known if name.endswith(last)]  # its last part alone
    if 0 < len(same) <= _MOST:
        return f"did you mean {_either(same)}?"
    near = difflib.get_close_matches(option, known, n=1, cutoff=_NEAR)
    return f"did you mean {near[0]}?" if near else "--help-all lists all options"


def unknown(kind: str, hints: Mapping[str, str]) -> str:
    """The complaint about every unknown name of a `kind` ("option", "setting"), each with its hint; names that have the
    same one stand together."""
    if len(hints) == 1:
        ((name, hint),) = hints.items()
        return f"unknown {kind} {name}: {hint}"
    alike: dict[str, list[str]] = {}
    for name, hint in hints.items():
        alike.setdefault(hint, []).append(name)
    told = [f"{', '.join(names)}{f' ({hint})' if hint else ''}" for hint, names in alike.items()]
    return f"unknown {kind}s: {'; '.join(told)}"


def _either(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
