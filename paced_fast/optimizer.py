"""AdamW that leaves a step out when a number is not finite, without the host knowing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class GuardedAdamW(torch.optim.AdamW):
    """torch's fused AdamW with a learning rate and a verdict that live on the device of the parameters."""

    found_inf: Tensor | None  # read by torch's fused step: 1.0 leaves parameters, moments and step counts as they are

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        """AdamW on `parameters`, all on one device, starting at `learning_rate`."""
        own = list(parameters)
        rate = torch.full((), learning_rate, device=own[0].device)
        super().__init__(own, lr=rate, betas=betas, weight_decay=weight_decay, fused=True, capturable=rate.is_cuda)
        self.found_inf = None

    @property
    def learning_rate(self) -> Tensor:
        """The learning rate, f32[] on the device; fill it in place."""
        return self.param_groups[0]["lr"]

    def guarded_step(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Step if both scalars are finite, else change nothing; whether it was taken, bool[] on the device."""
        taken = torch.isfinite(loss) & torch.isfinite(grad_norm)
        self.found_inf = (~taken).float()
        self.step()
        return taken
