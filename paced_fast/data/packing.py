"""Completions -> packed rollouts -> micro-batches -> rows of the policy's forward pass.

Two layouts share a prompt among its completions, each of which sees the prompt and itself only: rows of one group each,
padded to one length, with a mask (`forward_rows`), and all groups in one row, cut into blocks (`packed_row`). The
prompt is thus computed once per group, not once per completion. A third layout repeats the prompt before every
completion, for kernels that support plain sequences only (`packed_row` without sharing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paced_fast.data.records import Completion, Rollouts
from paced_fast.data.transfer import to_device


@dataclass(frozen=True, slots=True)
class Part:
    """Some sequences of a batch, and their positions and those of their tokens in it."""

    rollouts: Rollouts
    sequences: Tensor  # i64[b], positions among the sequences of the batch
    tokens: Tensor  # i64[t], positions among its packed tokens


def pack(
    completions: Sequence[Completion],
    prompt_ids: Sequence[tuple[int, ...]],
    prompt_index: Sequence[int],
    rewards: Sequence[float | None],
    policy_version: int,
    device: torch.device,
    shaping: Sequence[float] = (),
) -> Rollouts:
    """Pack B completions with their prompts into one record on `device`; a reward of None is unscored."""
    lengths = tuple(len(completion.token_ids) for completion in completions)
    tokens = [token for completion in completions for token in completion.token_ids]
    logprobs = [logprob for completion in completions for logprob in completion.logprobs]
    return Rollouts(
        token_ids=to_device(tokens, torch.int64, device),
        cu_seqlens=cu_seqlens(lengths, device),
        lengths=lengths,
        prompt_ids=tuple(prompt_ids),
        prompt_index=to_device(list(prompt_index), torch.int64, device),
        rewards=to_device([reward or 0.0 for reward in rewards], torch.float32, device),
        shaping=to_device(list(shaping) or [0.0] * len(lengths), torch.float32, device),
        scored=tuple(reward is not None for reward in rewards),
        generator_logprobs=to_device(logprobs, torch.float32, device),
        policy_version=torch.full((len(lengths),), policy_version, dtype=torch.int64, device=device),
    )


def part(rollouts: Rollouts, sequences: Sequence[int]) -> Part:
    """Select sequences in the given order, with their positions."""
    device = rollouts.token_ids.device
    tokens = token_positions(rollouts, sequences)
    index = to_device(list(sequences), torch.int64, device)
    lengths = tuple(rollouts.lengths[i] for i in sequences)
    chosen = Rollouts(
        token_ids=rollouts.token_ids[tokens],
        cu_seqlens=cu_seqlens(lengths, device),
        lengths=lengths,
        prompt_ids=tuple(rollouts.prompt_ids[i] for i in sequences),
        prompt_index=rollouts.prompt_index[index],
        rewards=rollouts.rewards[index],
        shaping=rollouts.shaping[index],
        scored=tuple(rollouts.scored[i] for i in sequences),
        generator_logprobs=rollouts.generator_logprobs[tokens],
        policy_version=rollouts.policy_version[index],
    )
    return Part(chosen, index, tokens)


def select(rollouts: Rollouts, sequences: Sequence[int]) -> Rollouts:
    """The named sequences, in the given order."""
    return part(rollouts, sequences).rollouts


def concat(first: Rollouts, second: Rollouts) -> Rollouts:
    """Concatenate two batches."""
    lengths = first.lengths + second.lengths
    return Rollouts(
        token_ids=torch.cat([first.token_ids, second.token_ids]),
        cu_seqlens=cu_seqlens(lengths, first.token_ids.device),
        lengths=lengths,
        prompt_ids=first.prompt_ids + second.prompt_ids,
        prompt_index=torch.cat([first.prompt_index, second.prompt_index]),
        rewards=torch.cat([first.rewards, second.rewards]),
        shaping=torch.cat([first.shaping, second.shaping]),
        scored=first.scored + second.scored,
        generator_logprobs=torch.cat([first.generator_logprobs, second.generator_logprobs]),
        policy_version=torch.cat([first.policy_version, second.policy_version]),
    )


def token_positions(rollouts: Rollouts, sequences: Sequence[int]) -> Tensor:
    """Packed positions i64[t] of the tokens of `sequences`, in that order."""
    chosen = torch.tensor(list(sequences), dtype=torch.int64)
    lengths = torch.tensor(rollouts.lengths, dtype=torch.int64)
    starts = (lengths.cumsum(0) - lengths)[chosen]
    return to_device(ranges(starts, lengths[chosen]), torch.int64, rollouts.token_ids.device)


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """starts[i], starts[i] + 1, ... of each length, one after another; all on the host."""
    total = int(lengths.sum())
    before = lengths.cumsum(0) - lengths
    return torch.arange(total) + (starts - before).repeat_interleave(lengths)


def cu_seqlens(lengths: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Prefix sums [B + 1] of the lengths."""
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    cu[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return to_device(cu, dtype, device)
