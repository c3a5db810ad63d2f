"""Belief about each prompt's accuracy by counting: a Beta distribution that forgets (MoPPS, arXiv 2507.04632).

N = prompts in the table, P = prompts drawn in a step, K = prompts asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paced_fast.config import stream_seed

MEMORY = 0.5
"""Weight of the old parameters when a prompt is observed; the rest is the prior's (lambda of the paper)."""
PRIOR = 1.0
"""Both parameters of the prior: every accuracy is as likely as any other."""
_PROPOSALS = 8
"""Proposals for a gamma variate; all of them are rejected in less than one of 10^9 cases."""


class BetaPosterior:
    """Parameters f32[N] of each prompt's Beta distribution."""

    def __init__(self, num_prompts: int, *, seed: int, device: torch.device) -> None:
        """Start with the prior; `seed` fixes every draw."""
        self.alpha = torch.full((num_prompts,), PRIOR, device=device)
        self.beta = torch.full((num_prompts,), PRIOR, device=device)
        self.seed = stream_seed(seed, 0, "posterior")

    @property
    def mean(self) -> Tensor:
        """Expected accuracy f32[N]."""
        return self.alpha / (self.alpha + self.beta)

    def observe(self, prompt_index: Tensor, successes: Tensor, failures: Tensor) -> None:
        """Count successes f32[P] and failures f32[P] of prompts i64[P]; those without either keep what they have.

        alpha <- MEMORY alpha + (1 - MEMORY) PRIOR + successes, and beta likewise with failures.
        """
        new = torch.zeros(2, self.alpha.numel(), device=self.alpha.device)
        new.index_add_(1, prompt_index, torch.stack([successes, failures]).to(new.dtype))
        is_seen = new.sum(0) > 0
        for old, counted in ((self.alpha, new[0]), (self.beta, new[1])):
            old.copy_(torch.where(is_seen, MEMORY * old + (1 - MEMORY) * PRIOR + counted, old))

    def draw(self, prompt_index: Tensor, now: Tensor) -> Tensor:
        """One draw f64[K] from the distribution of each prompt i64[K], a function of seed, `now` i64[] and prompt."""
        random = _random(self.seed, now, prompt_index, 2 * 3 * _PROPOSALS).view(2, 3, _PROPOSALS, -1)
        first = _gamma(self.alpha[prompt_index].double(), random[0])
        second = _gamma(self.beta[prompt_index].double(), random[1])
        return first / (first + second)


def _gamma(shape: Tensor, random: Tensor) -> Tensor:
    """Gamma variates f64[K] of `shape` f64[K], at least 1, from numbers f64[3, proposals, K] in (0, 1).

    The first accepted proposal of Marsaglia and Tsang (2000); 1 is their d in the case that none is.
    """
    d = shape - 1 / 3
    normal = (-2 * random[0].log()).sqrt() * (2 * math.pi * random[1]).cos()
    v = (1 + normal / (9 * d).sqrt()) ** 3
    bound = 0.5 * normal.square() + d - d * v + d * v.clamp(min=1e-300).log()
    accepted = (v > 0) & (random[2].log() < bound)  # [proposals, K]
    is_first = accepted & (accepted.long().cumsum(0) == 1)
    return d * torch.where(accepted.any(0), (v * is_first).sum(0), 1.0)


def _random(seed: int, now: Tensor, prompt_index: Tensor, count: int) -> Tensor:
    """Numbers f64[count, K] in (0, 1): splitmix64 of seed, `now`, prompt and number, the same on every rank."""
    key = _mixed(now * _signed(0xD1342543DE82EF95) + _signed(seed))
    of_prompt = _mixed(key + prompt_index)
    numbers = torch.arange(1, count + 1, device=prompt_index.device)[:, None]
    bits = _mixed(of_prompt + numbers * _signed(0x9E3779B97F4A7C15))
    return (_shifted(bits, 12).double() + 0.5) * 2.0**-52


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, on i64 that wrap around."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    """Shift to the right and fill with zeros."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _signed(x: int) -> int:
    """The i64 with the bits of an unsigned number."""
    return x - 2**64 if x >= 2**63 else x
