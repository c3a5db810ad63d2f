"""Replay: a small ring of correct completions, those whose prompt's estimate erred most.

A completion enters with priority |group accuracy - value| (arXiv 2602.12642). Old log-probs are not kept: the trainer
computes them again with the current policy, which is the reference of the trajectory-balance loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paced_fast import pack
from paced_fast.batch import PromptTable, Rollouts
from paced_fast.config import ReplayConfig, stream_seed
from paced_kernels import PriorityTree


class ReplayBuffer:
    """A ring of C completions as tensors of fixed shape. M = longest completion."""

    def __init__(self, config: ReplayConfig, *, max_completion_tokens: int, seed: int, device: torch.device) -> None:
        """An empty ring of `config.capacity` slots."""
        self.config, self.seed = config, seed
        capacity = config.capacity
        self.token_ids = torch.zeros(capacity, max_completion_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(capacity, max_completion_tokens, device=device)
        self.lengths = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.prompt_index = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.rewards = torch.zeros(capacity, device=device)
        self.accuracy = torch.zeros(capacity, device=device)  # of the group it was sampled with
        self.policy_version = torch.full((capacity,), -1, dtype=torch.int64, device=device)  # -1: the slot is empty
        self.inserted = 0
        self.tree = PriorityTree(capacity, seed=stream_seed(seed, 0, "replay"), device=device, stream=1)

    def insert(self, rollouts: Rollouts, priority: Tensor, accuracy: Tensor) -> int:
        """Add the correct sequences of largest `priority` f32[B], and their groups' `accuracy`; returns how many."""
        order = torch.where(rollouts.rewards > 0.5, priority, -1.0).argsort(descending=True, stable=True)
        num_correct = int((rollouts.rewards > 0.5).sum())
        sequences = order[: min(num_correct, self.config.insert_per_step, self.config.capacity)].tolist()
        chosen = pack.select(rollouts, sequences)
        for tokens, logprobs, k in zip(
            chosen.token_ids.split(chosen.lengths),
            chosen.generator_logprobs.split(chosen.lengths),
            range(len(sequences)),
            strict=True,
        ):
            slot = (self.inserted + k) % self.config.capacity
            self.token_ids[slot, : len(tokens)] = tokens
            self.logprobs[slot, : len(tokens)] = logprobs
            self.lengths[slot] = len(tokens)
        slots = (self.inserted + torch.arange(len(sequences), device=self.lengths.device)) % self.config.capacity
        self.prompt_index[slots] = chosen.prompt_index
        self.rewards[slots] = chosen.rewards
        self.accuracy[slots] = accuracy[sequences]
        self.policy_version[slots] = chosen.policy_version
        self.inserted += len(sequences)
        return len(sequences)

    def priorities(self, values: Tensor) -> Tensor:
        """|group accuracy - value| f32[C] under the current values f32[N]; empty slots hold 0."""
        error = (self.accuracy - values[self.prompt_index]).abs()
        return torch.where(self.policy_version >= 0, error, 0.0)

    def draw(self, values: Tensor, version: int, table: PromptTable) -> Rollouts | None:
        """Distinct completions of at most `max_age` versions; None when there is none.

        Evenly, or in proportion to the refreshed priorities when `config.prioritized`.
        """
        fresh_enough = (self.policy_version >= 0) & (version - self.policy_version <= self.config.max_age)
        available = int(fresh_enough.sum())
        if available == 0:
            return None
        priority = self.priorities(values) + 1e-3 if self.config.prioritized else torch.ones_like(self.accuracy)
        self.tree.rebuild(torch.where(fresh_enough, priority.clamp(max=1.0), 0.0))
        self.tree.step.fill_(version)  # the draw belongs to the step, not to the number of draws before it
        slots = self.tree.sample_distinct(min(self.config.draw_per_step, available), method="race").idx
        lengths = tuple(self.lengths[slots].tolist())
        keep = torch.arange(self.token_ids.shape[1], device=slots.device) < self.lengths[slots][:, None]
        index = self.prompt_index[slots]
        return Rollouts(
            token_ids=self.token_ids[slots][keep],
            cu_seqlens=torch.nn.functional.pad(self.lengths[slots].cumsum(0), (1, 0)).to(torch.int32),
            lengths=lengths,
            prompt_ids=tuple(table.rows[i].token_ids for i in index.tolist()),
            prompt_index=index,
            rewards=self.rewards[slots],
            generator_logprobs=self.logprobs[slots][keep],
            policy_version=self.policy_version[slots],
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        tree = {f"tree.{name}": value for name, value in self.tree.state_dict().items()}
        return {**tree, **self._tensors(), "inserted": torch.tensor(self.inserted)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`."""
        self.tree.load_state_dict({k.removeprefix("tree."): v for k, v in state.items() if k.startswith("tree.")})
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        self.inserted = int(state["inserted"])

    def _tensors(self) -> dict[str, Tensor]:
        names = ("token_ids", "logprobs", "lengths", "prompt_index", "rewards", "accuracy", "policy_version")
        return {name: getattr(self, name) for name in names}
