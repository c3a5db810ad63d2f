"""Replay: a small ring of correct completions, those whose prompt's estimate erred most.

A completion enters with priority |group accuracy - value| (arXiv 2602.12642). Old log-probs are not kept: the trainer
computes them again with the current policy, which is the reference of the trajectory-balance loss.

Inserting and choosing are tensors of fixed shape on the device and never make the host wait. What was chosen goes to
the host with the prompts of the step, before anything is generated, because the host lays out the forward rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paced_fast import pack
from paced_fast.batch import PromptTable, Rollouts
from paced_fast.config import ReplayConfig, stream_seed
from paced_kernels import PriorityTree


class ReplayBuffer:
    """A ring of C completions as tensors of fixed shape. M = longest completion, D = completions drawn in a step."""

    def __init__(self, config: ReplayConfig, *, max_completion_tokens: int, seed: int, device: torch.device) -> None:
        """An empty ring of `config.capacity` slots."""
        self.config, self.seed = config, seed
        capacity = config.capacity
        # One slot more than the ring has: what does not enter is written there.
        rows = capacity + 1
        self._slots = {
            "token_ids": torch.zeros(rows, max_completion_tokens, dtype=torch.int64, device=device),
            "logprobs": torch.zeros(rows, max_completion_tokens, device=device),
            "lengths": torch.zeros(rows, dtype=torch.int64, device=device),
            "prompt_index": torch.zeros(rows, dtype=torch.int64, device=device),
            "rewards": torch.zeros(rows, device=device),
            "accuracy": torch.zeros(rows, device=device),  # of the group it was sampled with
            "policy_version": torch.full((rows,), -1, dtype=torch.int64, device=device),  # -1: the slot is empty
        }
        ring = {name: tensor[:capacity] for name, tensor in self._slots.items()}
        self.token_ids, self.logprobs, self.lengths = ring["token_ids"], ring["logprobs"], ring["lengths"]
        self.prompt_index, self.rewards = ring["prompt_index"], ring["rewards"]
        self.accuracy, self.policy_version = ring["accuracy"], ring["policy_version"]
        self.inserted = torch.zeros((), dtype=torch.int64, device=device)
        self.tree = PriorityTree(capacity, seed=stream_seed(seed, 0, "replay"), device=device, stream=1)

    def insert(self, rollouts: Rollouts, priority: Tensor, accuracy: Tensor) -> Tensor:
        """Add the correct sequences of largest `priority` f32[B], and their groups' `accuracy`; how many, i64[]."""
        capacity, device = self.config.capacity, self.lengths.device
        count = min(self.config.insert_per_step, capacity, rollouts.num_sequences)
        is_correct = rollouts.rewards > 0.5
        order = torch.where(is_correct, priority, -1.0).argsort(descending=True, stable=True)[:count]
        enters = is_correct[order]  # a priority is never negative, so these come first
        slots = torch.where(enters, (self.inserted + torch.arange(count, device=device)) % capacity, capacity)
        start = rollouts.cu_seqlens[order].long()
        lengths = rollouts.cu_seqlens[order + 1].long() - start
        columns = torch.arange(self.token_ids.shape[1], device=device)
        is_token = columns < lengths[:, None]
        # One element more than there are tokens, for the positions behind the last completion.
        position = (start[:, None] + columns).clamp(max=rollouts.num_tokens)
        written = {
            "token_ids": torch.nn.functional.pad(rollouts.token_ids, (0, 1))[position].where(is_token, 0),
            "logprobs": torch.nn.functional.pad(rollouts.generator_logprobs, (0, 1))[position].where(is_token, 0.0),
            "lengths": lengths,
            "prompt_index": rollouts.prompt_index[order],
            "rewards": rollouts.rewards[order],
            "accuracy": accuracy[order],
            "policy_version": rollouts.policy_version[order],
        }
        for name, values in written.items():
            self._slots[name].index_copy_(0, slots, values)
        entered = enters.sum()
        self.inserted += entered
        return entered

    def priorities(self, values: Tensor) -> Tensor:
        """|group accuracy - value| f32[C] under the current values f32[N]; empty slots hold 0."""
        error = (self.accuracy - values[self.prompt_index]).abs()
        return torch.where(self.policy_version >= 0, error, 0.0)

    def choose(self, values: Tensor, version: int) -> Tensor:
        """Slots, lengths and prompts i64[3, D] of distinct completions of at most `max_age` versions; slot -1: none.

        Evenly, or in proportion to the refreshed priorities when `config.prioritized`.
        """
        is_young = (self.policy_version >= 0) & (version - self.policy_version <= self.config.max_age)
        priority = self.priorities(values) + 1e-3 if self.config.prioritized else torch.ones_like(self.accuracy)
        self.tree.rebuild(torch.where(is_young, priority.clamp(max=1.0), 0.0))
        self.tree.size.zero_()  # of an empty ring nothing is drawn
        self.tree.step.fill_(version)  # the draw belongs to the step, not to the number of draws before it
        slots = self.tree.sample_distinct(self.config.draw_per_step, method="race").idx
        held = slots.clamp(min=0)
        return torch.stack([slots, self.lengths[held], self.prompt_index[held]])

    def take(self, chosen: list[list[int]], table: PromptTable) -> Rollouts | None:
        """The completions of a choice that has come to the host; None when it is empty."""
        columns = [column for column in zip(*chosen, strict=True) if column[0] >= 0]
        if not columns:
            return None
        slots, lengths, prompts = zip(*columns, strict=True)
        width, device = self.token_ids.shape[1], self.lengths.device
        tokens = [slot * width + i for slot, length in zip(slots, lengths, strict=True) for i in range(length)]
        rows = torch.tensor(slots, device=device)
        position = torch.tensor(tokens, dtype=torch.int64, device=device)
        return Rollouts(
            token_ids=self.token_ids.flatten()[position],
            cu_seqlens=pack.cu_seqlens(lengths, device),
            lengths=lengths,
            prompt_ids=tuple(table.rows[i].token_ids for i in prompts),
            prompt_index=self.prompt_index[rows],
            rewards=self.rewards[rows],
            generator_logprobs=self.logprobs.flatten()[position],
            policy_version=self.policy_version[rows],
        )

    def draw(self, values: Tensor, version: int, table: PromptTable) -> Rollouts | None:
        """`choose` and `take` at once; waits for the device."""
        return self.take(self.choose(values, version).tolist(), table)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        tree = {f"tree.{name}": value for name, value in self.tree.state_dict().items()}
        return {**tree, **self._tensors(), "inserted": self.inserted.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`."""
        self.tree.load_state_dict({k.removeprefix("tree."): v for k, v in state.items() if k.startswith("tree.")})
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        self.inserted.copy_(state["inserted"])

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor[: self.config.capacity] for name, tensor in self._slots.items()}
