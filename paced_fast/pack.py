"""Completions -> packed rollouts -> micro-batches -> rows of the policy's forward pass.

A forward row holds one prompt followed by several of its completions, each of which sees the prompt and itself only.
The prompt is so computed once for a group and not once for each of its completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paced_fast.batch import Completion, Rollouts


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardRows:
    """R rows of at most L tokens, and where the states that predict each packed completion token are found."""

    input_ids: Tensor  # i64[R, L]
    position_ids: Tensor  # i64[R, L]
    attention_mask: Tensor  # bool[R, 1, L, L], True where a query may look
    hidden_index: Tensor  # i64[T], positions in the flattened [R * L] states, in packed order


def pack(
    completions: Sequence[Completion],
    prompt_ids: Sequence[tuple[int, ...]],
    prompt_index: Sequence[int],
    rewards: Sequence[float],
    policy_version: int,
    device: torch.device,
) -> Rollouts:
    """B completions with their prompts as one packed record on `device`."""
    lengths = tuple(len(completion.token_ids) for completion in completions)
    tokens = [token for completion in completions for token in completion.token_ids]
    logprobs = [logprob for completion in completions for logprob in completion.logprobs]
    return Rollouts(
        token_ids=torch.tensor(tokens, dtype=torch.int64, device=device),
        cu_seqlens=cu_seqlens(lengths, device),
        lengths=lengths,
        prompt_ids=tuple(prompt_ids),
        prompt_index=torch.tensor(list(prompt_index), dtype=torch.int64, device=device),
        rewards=torch.tensor(list(rewards), dtype=torch.float32, device=device),
        generator_logprobs=torch.tensor(logprobs, dtype=torch.float32, device=device),
        policy_version=torch.full((len(lengths),), policy_version, dtype=torch.int64, device=device),
    )


def select(rollouts: Rollouts, sequences: Sequence[int]) -> Rollouts:
    """The named sequences, in the given order."""
    device = rollouts.token_ids.device
    token_index = token_positions(rollouts, sequences)
    index = torch.tensor(list(sequences), dtype=torch.int64, device=device)
    lengths = tuple(rollouts.lengths[i] for i in sequences)
    return Rollouts(
        token_ids=rollouts.token_ids[token_index],
        cu_seqlens=cu_seqlens(lengths, device),
        lengths=lengths,
        prompt_ids=tuple(rollouts.prompt_ids[i] for i in sequences),
        prompt_index=rollouts.prompt_index[index],
        rewards=rollouts.rewards[index],
        generator_logprobs=rollouts.generator_logprobs[token_index],
        policy_version=rollouts.policy_version[index],
    )


def concat(first: Rollouts, second: Rollouts) -> Rollouts:
    """All sequences of `first`, then all of `second`."""
    lengths = first.lengths + second.lengths
    return Rollouts(
        token_ids=torch.cat([first.token_ids, second.token_ids]),
        cu_seqlens=cu_seqlens(lengths, first.token_ids.device),
        lengths=lengths,
        prompt_ids=first.prompt_ids + second.prompt_ids,
        prompt_index=torch.cat([first.prompt_index, second.prompt_index]),
        rewards=torch.cat([first.rewards, second.rewards]),
        generator_logprobs=torch.cat([first.generator_logprobs, second.generator_logprobs]),
        policy_version=torch.cat([first.policy_version, second.policy_version]),
    )


def token_positions(rollouts: Rollouts, sequences: Sequence[int]) -> Tensor:
    """Packed positions i64[t] of the tokens of `sequences`, in that order."""
    starts = [0]
    for length in rollouts.lengths:
        starts.append(starts[-1] + length)
    positions = [p for i in sequences for p in range(starts[i], starts[i + 1])]
    return torch.tensor(positions, dtype=torch.int64, device=rollouts.token_ids.device)


def forward_rows(rollouts: Rollouts, max_row_tokens: int) -> ForwardRows:
    """Lay the sequences out as rows of one prompt and its completions, at most `max_row_tokens` long where possible.

    A row always takes at least one completion, so a longer sequence makes a longer row.
    """
    device = rollouts.token_ids.device
    plan = _plan_rows(rollouts, range(rollouts.num_sequences), max_row_tokens)
    length = max((row.num_tokens for row in plan), default=1)
    input_ids = torch.zeros(len(plan), length, dtype=torch.int64)
    position_ids = torch.zeros(len(plan), length, dtype=torch.int64)
    segment = torch.full((len(plan), length), -1, dtype=torch.int64)  # 0 prompt, k completion, -1 padding
    hidden: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * rollouts.num_sequences
    tokens = rollouts.token_ids.cpu().split(rollouts.lengths)
    for r, row in enumerate(plan):
        prompt = rollouts.prompt_ids[row.sequences[0]]
        start = len(prompt)
        input_ids[r, :start] = torch.tensor(prompt, dtype=torch.int64)
        position_ids[r, :start] = torch.arange(start)
        segment[r, :start] = 0
        for k, i in enumerate(row.sequences, start=1):
            # The last token of a completion predicts nothing, so it need not be computed.
            count = max(rollouts.lengths[i] - 1, 0)
            input_ids[r, start : start + count] = tokens[i][:count]
            position_ids[r, start : start + count] = torch.arange(len(prompt), len(prompt) + count)
            segment[r, start : start + count] = k
            last_of_prompt = torch.tensor([len(prompt) - 1])
            states = torch.cat([last_of_prompt, torch.arange(start, start + count)])[: rollouts.lengths[i]]
            hidden[i] = states + r * length
            start += count
    order = torch.arange(length)
    visible = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    mask = visible & (order[None, :] <= order[:, None]) & (segment[:, None, :] >= 0)
    mask |= torch.eye(length, dtype=torch.bool)  # padding looks at itself: a row of nothing would be NaN
    return ForwardRows(
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        attention_mask=mask[:, None].to(device),
        hidden_index=torch.cat([*hidden, torch.empty(0, dtype=torch.int64)]).to(device),
    )


def micro_batches(rollouts: Rollouts, sequences: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split `sequences` into lists whose forward rows hold at most `max_tokens` tokens, padding included.

    Sequences stay whole; rows of similar length go together. The union of the lists is `sequences`.
    """
    plan = sorted(_plan_rows(rollouts, sequences, max_tokens), key=lambda row: -row.num_tokens)
    batches: list[list[int]] = []
    widest = rows = 0
    for row in plan:
        if not batches or (rows + 1) * widest > max_tokens:
            batches.append([])
            widest, rows = row.num_tokens, 0
        batches[-1].extend(row.sequences)
        rows += 1
    return batches


@dataclass(frozen=True, slots=True)
class _Row:
    sequences: tuple[int, ...]
    num_tokens: int


def _plan_rows(rollouts: Rollouts, sequences: Sequence[int], max_row_tokens: int) -> list[_Row]:
    """Group sequences by prompt, in order of first appearance, and cut the groups into rows."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in sequences:
        groups.setdefault(rollouts.prompt_ids[i], []).append(i)
    rows: list[_Row] = []
    for prompt, members in groups.items():
        current: list[int] = []
        size = len(prompt)
        for i in members:
            more = max(rollouts.lengths[i] - 1, 0)
            if current and size + more > max_row_tokens:
                rows.append(_Row(tuple(current), size))
                current, size = [], len(prompt)
            current.append(i)
            size += more
        rows.append(_Row(tuple(current), size))
    return rows


def cu_seqlens(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Prefix sums i32[B + 1] of the lengths."""
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return cu.to(device)
