"""`tiny_trl` with the model split over processes by FSDP2 or FSDP1, as one of several.

As a program: `tiny_trl_sharded.py FOLDER JSON` with the variables of a launcher set; JSON are settings of PacedConfig,
and beside them `is_tied`, `has_lora`, `resume` and `sharding`, the options of FSDP.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tiny_policy
import tiny_trl
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback


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


def trainer(folder: Path, *, is_tied: bool, has_lora: bool, sharding: dict[str, Any], **changes: Any) -> tiny_trl.Recorder:
    """A trainer that has not begun. accelerate takes FSDP for processes with GPUs only, so these say they have them."""
    args = tiny_trl.settings(folder, ddp_backend="gloo", fsdp=True, fsdp_config=dict(sharding), **changes)
    PartialState().distributed_type = DistributedType.MULTI_GPU
    options: dict[str, Any] = {}
    if has_lora:
        import peft

        options["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = tiny_trl.Recorder(
        model(is_tied=is_tied),
        tiny_trl.reward,
        args,
        train_dataset=tiny_trl.data(),
        processing_class=tiny_trl.tokenizer(),
        callbacks=[SumsForGloo()],
        **options,
    )
    assert made.is_fsdp_enabled
    return made


def whole(made: tiny_trl.Recorder) -> dict[str, torch.Tensor]:
    """Parameters, put together from all processes."""
    split = made.model
    if isinstance(split, FSDP1):
        with FSDP1.summon_full_params(split):
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in split.named_parameters()}
    found = dict(split.named_parameters())
    assert all(isinstance(p, DTensor) for p in found.values())
    return {n: p.detach().full_tensor().clone() for n, p in found.items()}


def main() -> None:
    """Train as one process of a launch, and write what it trained on and what came out."""
    folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    made = trainer(folder, **changes)
    made.train()
    modules = [name for name, module in made.model.named_modules() if isinstance(module, (FSDPModule, FSDP1))]
    result = {"batches": made.batches, "state": whole(made), "modules": modules, "log": made.state.log_history}
    torch.save(result, folder / f"rank{made.accelerator.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
