"""Drop-in `lm_head` whose forward, where FSDP2 gathers the weight, can also compute log-probs and the loss.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from .logprobs import linear_logprobs
from .reference import TBOutput
from .trajectory_balance import trajectory_balance_loss


class FusedLinearHead(nn.Linear):
    """`nn.Linear` to the vocabulary whose call can also compute `linear_logprobs` or `trajectory_balance_loss`.

    ::

        head(hidden)                                  # [..., V] logits, as nn.Linear
        head(hidden, token_ids, **options)            # linear_logprobs: [T], or a pair with return_entropy=True
        head(hidden, token_ids, cu_seqlens, **options)    # trajectory_balance_loss: TBOutput

    Parameters, their names and the state dict are those of `nn.Linear`. `forward` reads the weight, and autograd
    returns its gradient. `fully_shard(head)` therefore gathers the weight once per call and reduces one gradient, and a
    weight tied to the embedding receives the gradients of both uses.

    By default, `MixedPrecisionPolicy` of FSDP2 rounds every floating-point argument of a wrapped module to
    `param_dtype`, including rewards, log_z and log-probs. Wrap with `cast_forward_inputs=False` to avoid this.

    Args:
        hidden: [..., H], or [T, H] with `token_ids`; same dtype as the weight, or any dtype under autocast.
        token_ids: [T] int64 or int32 in [0, V); None = return logits.
        cu_seqlens: [B + 1] prefix sums of the lengths; None = return log-probs.
        options: keyword arguments of `linear_logprobs` or `trajectory_balance_loss` other than `bias`.

    Raises:
        ValueError: as in the operations, or `cu_seqlens` or options were given without `token_ids`.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Return a head with the same weight and bias Parameter objects as `linear`, so that tied weights stay tied.

        Args:
            linear: [V, H] projection, with or without a bias, on any device; before `fully_shard`.

        Returns:
            A module to replace `linear`, in the same training mode.

        Raises:
            ValueError: `linear` is not an nn.Linear, or is of a subclass, whose own forward would be lost.
        """
        if not isinstance(linear, nn.Linear) or type(linear).forward not in (nn.Linear.forward, cls.forward):
            raise ValueError(f"linear must be an nn.Linear that does not override forward, got {type(linear).__name__}")
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden: Tensor,  # [..., H] or [T, H]
        token_ids: Tensor | None = None,  # [T]
        cu_seqlens: Tensor | None = None,  # [B + 1]
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor] | TBOutput:
        if token_ids is None:
            if cu_seqlens is not None or options:
                raise ValueError("token_ids must be given with cu_seqlens or options, got None")
            return F.linear(hidden, self.weight, self.bias)
        if cu_seqlens is None:
            return linear_logprobs(hidden, self.weight, token_ids, bias=self.bias, **options)
        return trajectory_balance_loss(hidden, self.weight, token_ids, cu_seqlens, bias=self.bias, **options)
