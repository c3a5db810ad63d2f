"""The head that learns log Z per prompt: value = beta * log Z, an estimate of the policy's accuracy (arXiv 2602.12642).

With the old policy as reference the squared trajectory-balance residual is least at beta * log Z = E[reward], so the
head regresses on raw correctness. Its output goes through a sigmoid, because a raw log Z at small beta has gradients
hundreds of times larger and starves under any shared clip.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paced_fast.config import LogZConfig
from paced_fast.policy.optimizer import GuardedAdamW

# Prompts scored at once, so that the head's float32 activations stay small for any table size.
_BLOCK = 8192


class LogZ:
    """3-layer MLP on frozen prompt embeddings, with an optimiser of its own. N = prompts, H = embedding size.

    `values` f32[N] are the latest estimates; with `scored_per_step` below N only a rotating window is recomputed per
    step.
    """

    def __init__(self, embeddings: Tensor, config: LogZConfig, *, seed: int, bounded: bool) -> None:
        """`embeddings` f32[N, H]; `bounded` puts a sigmoid on the output (value), else it is a raw log Z."""
        self.config, self.bounded = config, bounded
        self.mean = embeddings.mean(0)
        self.scale = embeddings.std(0, correction=0).clamp(min=1e-6)  # so that a table of one prompt works too
        self.inputs = self._standardise(embeddings)
        self.cursor = torch.zeros((), dtype=torch.int64, device=embeddings.device)  # where the next window begins
        width = config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mlp = nn.Sequential(
                nn.Linear(embeddings.shape[1], width),
                nn.GELU(),
                nn.LayerNorm(width),
                nn.Linear(width, width),
                nn.GELU(),
                nn.LayerNorm(width),
                nn.Linear(width, 1),
            ).to(embeddings.device)
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.mul_(0.1)  # start near one half for every prompt
            last.bias.zero_()
        self.optimizer = GuardedAdamW(self.mlp.parameters(), learning_rate=config.learning_rate)
        self.values = self.all_values()

    def _standardise(self, embeddings: Tensor) -> Tensor:
        return ((embeddings.float() - self.mean) / self.scale).to(getattr(torch, self.config.cache_dtype))

    def _logits(self, inputs: Tensor) -> Tensor:
        return self.mlp(inputs.float())[:, 0]

    @torch.no_grad()
    def score(self) -> Tensor:
        """Recompute `values`, all of them or the next window, and return them."""
        count, size = len(self.inputs), self.config.scored_per_step
        if not 0 < size < count:
            self.values.copy_(self.all_values())
            return self.values
        window = (self.cursor + torch.arange(size, device=self.cursor.device)) % count
        self.values.index_copy_(0, window, self.value(window))
        self.cursor.copy_((self.cursor + size) % count)
        return self.values

    def rescore(self, prompt_index: Tensor) -> None:
        """Recompute the `values` of prompts i64[B], which the window of `score` may have left out."""
        if 0 < self.config.scored_per_step < len(self.inputs):
            self.values.index_copy_(0, prompt_index, self.value(prompt_index))

    @torch.no_grad()
    def value(self, prompt_index: Tensor) -> Tensor:
        """Head output f32[B] for prompts i64[B]: the value in (0, 1) when bounded, else log Z."""
        return self._output(self.inputs[prompt_index])

    @torch.no_grad()
    def all_values(self) -> Tensor:
        """Head output f32[N] for every prompt of the table."""
        return self._output(self.inputs)

    @torch.no_grad()
    def value_of(self, embeddings: Tensor) -> Tensor:
        """Head output f32[M] for other prompts, given their embeddings [M, H]."""
        return self._output(self._standardise(embeddings))

    def _output(self, inputs: Tensor) -> Tensor:
        logits = torch.cat([self._logits(block) for block in inputs.split(_BLOCK)])
        return torch.sigmoid(logits) if self.bounded else logits

    def fit(self, prompt_index: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fit the head to `target` f32[B] on prompts i64[B], weighted by `weight` f32[B]; returns loss and gradient
        norm.

        `tb`: mean squared residual in reward units, target = reward - beta * log ratio. `bce`: cross-entropy on raw
        correctness, target = reward. A non-finite loss or gradient leaves the head as it was.
        """
        inputs = self.inputs[prompt_index]
        loss = grad_norm = torch.zeros((), device=inputs.device)
        for _ in range(self.config.updates_per_step):
            logits = self._logits(inputs)
            if self.bounded and self.config.loss == "bce":
                each = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
            else:
                each = (torch.sigmoid(logits) if self.bounded else logits).sub(target).square()
            loss = (each if weight is None else each * weight).mean()
            self.optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(self.mlp.parameters(), self.config.max_grad_norm)
            self.optimizer.guarded_step(loss.detach(), grad_norm)
        return loss.detach(), grad_norm

    def state_dict(self) -> dict[str, Tensor]:
        """State of the head besides its optimiser's; includes `values`, because a window leaves older ones in place."""
        parameters = {f"mlp.{name}": value for name, value in self.mlp.state_dict().items()}
        return {**parameters, "values": self.values, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`."""
        self.mlp.load_state_dict({k.removeprefix("mlp."): v for k, v in state.items() if k.startswith("mlp.")})
        self.values.copy_(state["values"])
        self.cursor.copy_(state["cursor"])
