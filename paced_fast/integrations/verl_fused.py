"""verl's fused log-probs taken over by `paced_kernels.linear_logprobs`, switched on by configuration alone.

::

    actor_rollout_ref.model.external_lib=paced_fast.integrations.verl_fused
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=torch

verl 0.9.1 has no name for a backend of one's own: `patch_forward_with_backends` (models/transformers/monkey_patch.py)
leaves the model as it is for any but "torch", "triton" and "liger", and `FusedLinearForPPO` refuses the rest. Its
forward functions (models/transformers/dense_common.py and those beside it) look that class up at each call, in
utils/experimental/torch_functional.py, and hand it the hidden states and the output layer. So importing this module,
which `external_lib` does in every worker, puts another class there: every model that verl's "torch" backend supports
then computes its log-probs and entropies here, for any loss. The losses of this package are then fused from the hidden
states to the log-probs, not beyond. "triton" and "liger" are not touched. For `strategy: fsdp`, verl's default: under
fsdp2 verl reads the weight of a unit of its own from outside of it, so that its gradient is not summed over ranks.

B = sequences, L = tokens of one, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from verl.utils.experimental import torch_functional as host

from paced_fast.errors import InputError
from paced_kernels import linear_logprobs


class FusedLinear(nn.Module):
    """verl's `FusedLinearForPPO`, called the same way."""

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
        """Log-probs and entropies in the shape of `input_ids`, float32."""
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
