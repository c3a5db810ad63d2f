"""A program: verl's own model patch, with its torch backend and with ours, on tiny models; prints "fine"."""

from __future__ import annotations

import copy
import importlib
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends

from paced_fast.errors import InputError

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def run(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies and every gradient, called as verl's FSDP engine does."""
    ids = torch.randint(37, (1, 11), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    out = model(input_ids=ids, attention_mask=None, use_cache=False, temperature=0.7, return_dict=True)
    (out.log_probs.square().sum() + 0.1 * out.entropy.sum()).backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and bool(g.abs().max() > 0) for g in grads)
    return out.log_probs.detach(), out.entropy.detach(), *grads  # pyright: ignore


def main() -> None:
    """Both backends on both models; the switch is the import that `model.external_lib` makes."""
    torch.manual_seed(0)
    models = [LlamaForCausalLM(LlamaConfig(**SIZES)), Qwen2ForCausalLM(Qwen2Config(**SIZES))]
    for model in models:
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    theirs = [run(copy.deepcopy(model)) for model in models]
    module = importlib.import_module("paced_fast.integrations.verl_fused")
    calls = []
    forward = module.FusedLinear.forward
    module.FusedLinear.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    for model, wanted in zip(models, theirs, strict=True):
        for found, expected in zip(run(model), wanted, strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    with pytest.raises(InputError, match="set impl_backend=torch"):
        module.FusedLinear(impl_backend="liger")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    split = distribute_tensor(torch.randn(37, 16), mesh, [Shard(0)]).requires_grad_()
    hidden, ids = torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.int64)
    for weight in (split, split.full_tensor()):  # what fsdp2 leaves, and what some of verl's models make of it
        with pytest.raises(InputError, match=r"set actor\.strategy=fsdp"):
            module.FusedLinear()(hidden, weight, ids)
    dist.destroy_process_group()
    sys.stdout.write("fine\n")


if __name__ == "__main__":
    main()
