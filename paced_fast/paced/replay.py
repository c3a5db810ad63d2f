"""Replay: a small ring buffer of correct completions of the prompts whose estimate was furthest off.

A completion enters with priority |group accuracy - value| (arXiv 2602.12642). Old log-probs are not kept: the trainer
computes them again with the current policy, which is the reference of the trajectory-balance loss. The completions of a
prompt are drawn together, because they share its forward pass.

Inserting and choosing use tensors of fixed shape on the device and never make the host wait. The choice goes to the
host together with the prompts of the step, before generation, because the host lays out the forward rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paced_fast.config import ReplayConfig, stream_seed
from paced_fast.data import packing
from paced_fast.data.records import PromptTable, Rollouts
from paced_fast.data.transfer import to_device
from paced_kernels import PriorityTree


class ReplayBuffer:
    """Ring of C completions as tensors of fixed shape. M = longest completion, D = completions drawn per step."""

    def __init__(self, config: ReplayConfig, *, max_completion_tokens: int, seed: int, device: torch.device) -> None:
        """Make an empty ring of `config.capacity` slots."""
        self.config = config
        capacity = config.capacity
        # One extra slot takes the writes of completions that do not enter.
        rows = capacity + 1
        self._slots = {
            "token_ids": torch.zeros(rows, max_completion_tokens, dtype=torch.int64, device=device),
            "logprobs": torch.zeros(rows, max_completion_tokens, device=device),
            "lengths": torch.zeros(rows, dtype=torch.int64, device=device),
            "prompt_index": torch.zeros(rows, dtype=torch.int64, device=device),
            "rewards": torch.zeros(rows, device=device),
            "shaping": torch.zeros(rows, device=device),
            "accuracy": torch.zeros(rows, device=device),  # of the group it was sampled with
            "policy_version": torch.full((rows,), -1, dtype=torch.int64, device=device),  # -1: the slot is empty
        }
        ring = {name: tensor[:capacity] for name, tensor in self._slots.items()}
        self.token_ids, self.logprobs, self.lengths = ring["token_ids"], ring["logprobs"], ring["lengths"]
        self.prompt_index, self.rewards, self.shaping = ring["prompt_index"], ring["rewards"], ring["shaping"]
        self.accuracy, self.policy_version = ring["accuracy"], ring["policy_version"]
        self.inserted = torch.zeros((), dtype=torch.int64, device=device)
        self.tree = PriorityTree(capacity, seed=stream_seed(seed, 0, "replay"), device=device, stream=1)

    def insert(self, rollouts: Rollouts, values: Tensor, accuracy: Tensor) -> Tensor:
        """Insert the correct sequences of largest priority; returns how many entered, i64[].

        Unscored sequences never enter. `values` f32[N] are the estimates and `accuracy` f32[B] the accuracies of the
        sequences' groups.
        """
        capacity, device = self.config.capacity, self.lengths.device
        count = min(self.config.insert_per_step, capacity, rollouts.num_sequences)
        priority = (accuracy - values[rollouts.prompt_index]).abs()
        may_enter = rollouts.rewards > 0.5
        may_enter &= to_device(list(rollouts.scored), torch.bool, device)
        order = torch.where(may_enter, priority, -1.0).argsort(descending=True, stable=True)[:count]
        enters = may_enter[order]  # a priority is never negative, so these come first
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
            "shaping": rollouts.shaping[order],
            "accuracy": accuracy[order],
            "policy_version": rollouts.policy_version[order],
        }
        for name, values in written.items():
            self._slots[name].index_copy_(0, slots, values)
        entered = enters.sum()
        self.inserted += entered
        return entered

    def priorities(self, values: Tensor) -> Tensor:
        """Priorities f32[C] under the current values f32[N]; empty slots hold 0."""
        return torch.where(self.policy_version >= 0, (self.accuracy - values[self.prompt_index]).abs(), 0.0)

    def choose(self, num_prompts: int, version: int | Tensor) -> Tensor:
        """Choose distinct completions up to `max_age` versions old; returns slots, lengths and prompts i64[3, D] (slot
        -1: none).

        The prompts come in random order, each with all of its completions, up to D. `num_prompts` is the size of the
        table; `version` is a number on the host or i64[] on the device.
        """
        device, capacity = self.lengths.device, self.config.capacity
        now = version if isinstance(version, Tensor) else torch.full((), version, device=device)
        is_young = (self.policy_version >= 0) & (now - self.policy_version <= self.config.max_age)
        self.tree.rebuild(torch.ones_like(self.rewards), allowed=is_young)
        self.tree.size.zero_()  # nothing is drawn from an empty ring
        self.tree.step.copy_(now)  # the draw belongs to the step, not to the number of draws before it
        drawn = self.tree.sample_distinct(capacity, method="race").idx  # every young slot in random order, then -1
        # A prompt's place is that of its first slot in that order; empty places count for nobody.
        place = torch.arange(capacity, device=device)
        prompts = torch.where(drawn >= 0, self.prompt_index[drawn.clamp(min=0)], num_prompts)
        first = torch.full((num_prompts + 1,), capacity, device=device).scatter_reduce_(0, prompts, place, "amin")
        first[num_prompts] = capacity
        order = first[prompts].argsort(stable=True)[: self.config.draw_per_step]
        slots = drawn[order]
        held = slots.clamp(min=0)
        return torch.stack([slots, self.lengths[held], self.prompt_index[held]])

    def take(
        self, slots: Sequence[int], lengths: Sequence[int], prompts: Sequence[int], table: PromptTable
    ) -> Rollouts | None:
        """Rollouts of a choice that has come to the host; None when it is empty."""
        found = [column for column in zip(slots, lengths, prompts, strict=True) if column[0] >= 0]
        if not found:
            return None
        slots, lengths, prompts = zip(*found, strict=True)
        width, device = self.token_ids.shape[1], self.lengths.device
        tokens = [slot * width + i for slot, length in zip(slots, lengths, strict=True) for i in range(length)]
        rows = to_device(slots, torch.int64, device)
        position = to_device(tokens, torch.int64, device)
        return Rollouts(
            token_ids=self.token_ids.flatten()[position],
            cu_seqlens=packing.cu_seqlens(lengths, device),
            lengths=tuple(lengths),
            prompt_ids=tuple(table.rows[i].token_ids for i in prompts),
            prompt_index=self.prompt_index[rows],
            rewards=self.rewards[rows],
            shaping=self.shaping[rows],
            scored=(True,) * len(lengths),
            generator_logprobs=self.logprobs.flatten()[position],
            policy_version=self.policy_version[rows],
        )

    def state_dict(self) -> dict[str, Tensor]:
        """State of the ring, as tensors."""
        tree = {f"tree.{name}": value for name, value in self.tree.state_dict().items()}
        return {**tree, **self._tensors(), "inserted": self.inserted.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`."""
        self.tree.load_state_dict({k.removeprefix("tree."): v for k, v in state.items() if k.startswith("tree.")})
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        self.inserted.copy_(state["inserted"])

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor[: self.config.capacity] for name, tensor in self._slots.items()}
