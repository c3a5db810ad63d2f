"""Replacement of verl's fused log-probs by `paced_kernels.linear_logprobs`, enabled by configuration alone.

::

    actor_rollout_ref.model.external_lib=paced_fast.integrations.verl_fused
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=torch

verl 0.9.1 has no setting for a custom backend: `patch_forward_with_backends` (models/transformers/monkey_patch.py)
leaves the model unpatched unless the backend is "torch", "triton" or "liger", and `FusedLinearForPPO` refuses other
names. verl's forward functions (models/transformers/dense_common.py and its siblings) look that class up at each call,
in utils/experimental/torch_functional.py, and pass it the hidden states and the output layer. Importing this module,
which `external_lib` does in every worker, therefore replaces that class. Every model that verl's "torch" backend
supports then computes its log-probs and entropies here, for any loss. The losses of this package are then fused from
the hidden states to the log-probs, not further. "triton" and "liger" are unchanged. Use it with `strategy: fsdp`,
verl's default. Under fsdp2, verl reads the weight of a separately wrapped unit from outside that unit, so the weight's
gradient is not summed over ranks.

B = sequences, L = tokens per sequence, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from verl.utils.experimental import torch_functional as host

from paced_fast.errors import InputError
from paced_kernels import linear_logprobs


class FusedLinear(nn.Module):
    """Drop-in replacement for verl's `FusedLinearForPPO`, with the same call signature."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        del chunk_size
        if impl_backend != "torch":
            raise InputError(f"impl_backend={impl_backend}: with external_lib={__name__} set impl_backend=torch")

    def forward(
        self,
        hidden_states: Tensor,  # [B, L, H] or [L, H]
        vocab_weights: Tensor,  # [V, H]
        input_ids: Tensor,  # [B, L] or [L]
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies, float32, in the shape of `input_ids`."""
        if isinstance(vocab_weights, DTensor) or "ToTorchTensor" in type(vocab_weights.grad_fn).__name__:
            raise InputError("under fsdp2 the gradient of the output layer is not summed: set actor.strategy=fsdp")
        logprobs, entropy = linear_logprobs(
            hidden_states.flatten(0, -2),
            vocab_weights,
            input_ids.flatten(),
            temperature=temperature,
            return_entropy=True,
        )
        return logprobs.view(input_ids.shape), entropy.view(input_ids.shape)


host.FusedLinearForPPO = FusedLinear
