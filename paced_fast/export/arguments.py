"""Arguments of an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportArguments:
    """Write the policy of a run as a plain Hugging Face folder."""

    run_or_checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """Run folder, or one of its checkpoints, such as checkpoints/step_000150 in it."""
    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Output folder; it must be empty or not exist."""
    step: int | None = None
    """Step of the run's checkpoint to export; 0: the policy before training; default: the newest checkpoint."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Data type of the weights; `auto`: the most exact that the run has, which is float32 for weights that were
    trained. bfloat16 halves the size, and rounds away what a short training at a small learning rate changed."""
