"""`tiny_trl` with the model split over processes by FSDP2, FSDP1 or ZeRO: several runs of one process of a launch.

As a program: `tiny_trl_sharded.py FOLDER JSON` with the variables of a launcher set; JSON has under `runs` the settings
of PacedConfig of each run by its name, and among them `is_tied`, `has_lora`, and `sharding` (options of FSDP) or
`stage` (of ZeRO), without which the run is DDP's.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny_policy
import tiny_trl
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, _init_utils
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

from paced_fast.errors import InputError


def model(*, is_tied: bool = False) -> PreTrainedModel:
    """That of `tiny_policy`, or the same with one matrix for embeddings and head."""
    made = tiny_policy.model(sharpness=2.0)
    if is_tied:
        made.config.tie_word_embeddings = True
        made.tie_weights()
        assert made.lm_head.weight is made.model.embed_tokens.weight
    return made


class SumsForGloo(TrainerCallback):
    """gloo adds up and does not average: let FSDP2 divide by itself."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        for module in options["model"].modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def zero(stage: int) -> dict[str, Any]:
    """Settings of DeepSpeed; at stage 3 even the smallest parameter is split."""
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def trainer(
    folder: Path,
    *,
    is_tied: bool = False,
    has_lora: bool = False,
    sharding: dict[str, Any] | None = None,
    stage: int | None = None,
    **changes: Any,
) -> tiny_trl.Recorder:
    """A trainer that has not begun."""
    for name in [n for n in os.environ if n.startswith(("FSDP_", "ACCELERATE_USE_"))]:
        del os.environ[name]  # of the run before
    if sharding is not None:
        changes |= {"fsdp": True, "fsdp_config": dict(sharding)}
    if stage is not None:
        changes["deepspeed"] = zero(stage)
    args = tiny_trl.settings(folder, ddp_backend="gloo", **changes)
    if sharding is not None:  # accelerate takes FSDP for processes with GPUs only
        PartialState().distributed_type = DistributedType.MULTI_GPU
        if sharding["version"] == 1:  # it wants a device with a number, and a CPU has none
            _init_utils._get_device_from_device_id = lambda *_: torch.device("cpu")
    options: dict[str, Any] = {}
    if has_lora:
        import peft

        options["peft_config"] = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
    torch.manual_seed(0)
    made = tiny_trl.Recorder(
        model(is_tied=is_tied),
        tiny_trl.reward,
        args,
        train_dataset=tiny_trl.data(),
        processing_class=tiny_trl.tokenizer(),
        callbacks=[SumsForGloo()],
        **options,
    )
    assert (made.is_fsdp_enabled, made.is_deepspeed_enabled) == (sharding is not None, stage is not None)
    return made


def whole(made: tiny_trl.Recorder, stage: int | None) -> dict[str, torch.Tensor]:
    """Parameters, put together from all processes."""
    split = made.accelerator.unwrap_model(made.model) if not made.is_fsdp_enabled else made.model
    scope: Any = contextlib.nullcontext()
    if isinstance(split, FSDP1):
        scope = FSDP1.summon_full_params(split)
    elif made.is_fsdp_enabled:
        assert all(isinstance(p, DTensor) for p in split.parameters())
    elif stage == 3:
        import deepspeed

        assert all(p.numel() == 0 for p in split.parameters())
        scope = deepspeed.zero.GatheredParameters(list(split.parameters()))
    with scope:
        found = {n.replace("_fsdp_wrapped_module.", ""): p.detach() for n, p in split.named_parameters()}
        return {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in found.items()}


def run(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """What it trained on and what came out, or why it was refused."""
    try:
        made = trainer(folder, **changes)
    except InputError as error:
        return {"refused": str(error)}
    made.train()
    units = [name for name, module in made.model.named_modules() if isinstance(module, FSDPModule | FSDP1)]
    return {"batches": made.batches, "state": whole(made, changes.get("stage")), "units": units}


def main() -> None:
    """Run after run, and write what each gave."""
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])["runs"]
    results = {name: run(folder, changes) for name, changes in runs.items()}
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
