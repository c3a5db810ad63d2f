"""Arguments of an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paced_fast.config.command import Command


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportArguments:
    """Write the policy of a run as a plain Hugging Face folder."""

    run_or_checkpoint: str
    """Folder of a run, or one of its checkpoints, such as runs/first/checkpoints/step_000150."""
    folder: str
    """Folder to write; it must not exist yet, or be empty."""
    step: int | None = None
    """Checkpoint of the run, by its step; 0 is the policy before training. Default: the newest one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Data type of the weights; `auto` is the most exact that the run has: float32 for weights that were trained, the
    type of the model for merged adapters. bfloat16 halves the size, and rounds away what a short training at a small
    learning rate changed."""


COMMAND = Command(
    name="export",
    purpose="Write the policy of a run as a plain Hugging Face folder, which transformers, vLLM and others load.",
    words={"run_or_checkpoint": "RUN_OR_CHECKPOINT", "folder": "FOLDER"},
    examples={
        "paced-fast export runs/first exported": "the newest checkpoint",
        "paced-fast export runs/first halved --dtype bfloat16": "in half the size",
    },
    synonyms=dict.fromkeys(("run", "run-dir", "model", "checkpoint-path"), "run_or_checkpoint")
    | dict.fromkeys(("out", "output", "output-dir", "out-dir", "save-dir"), "folder")
    | {"checkpoint": "step"},
)
