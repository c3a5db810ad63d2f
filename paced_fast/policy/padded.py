"""Layout with one sequence per row, which every causal model computes correctly.

Rows that share a prompt, or that follow each other without padding, need attention that accepts a mask; recurrent
states, convolutions and custom biases do not. B = sequences, L = longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paced_fast.data.records import Rollouts
from paced_fast.data.transfer import to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedRows:
    """B rows of at most L tokens, each a prompt and a completion, with zeros to the right."""

    input_ids: Tensor  # i64[B, L]
    hidden_index: Tensor  # i64[T], positions in the flattened [B * L] states, in packed order


def padded_rows(rollouts: Rollouts) -> PaddedRows:
    """Lay every sequence out as a row, without the last token of its completion, which predicts nothing.

    A causal model never looks to the right, so padding needs no mask. The layout is made of lengths alone.
    """
    device = rollouts.token_ids.device
    sizes = _sizes(rollouts)
    width = max(sizes, default=1)
    tokens = [0, *(token for prompt in rollouts.prompt_ids for token in prompt)]
    source = torch.zeros(len(sizes), width, dtype=torch.int64)  # place 0 holds the token of padding
    prompt_start, token_start = 1, len(tokens)
    places = [torch.empty(0, dtype=torch.int64)]
    for row, (prompt, length, size) in enumerate(zip(rollouts.prompt_ids, rollouts.lengths, sizes, strict=True)):
        source[row, : len(prompt)] = torch.arange(prompt_start, prompt_start + len(prompt))
        source[row, len(prompt) : size] = torch.arange(token_start, token_start + size - len(prompt))
        places.append(torch.arange(length) + row * width + len(prompt) - 1)
        prompt_start += len(prompt)
        token_start += length
    every = torch.cat([to_device(tokens, torch.int64, device), rollouts.token_ids])
    return PaddedRows(
        input_ids=every[to_device(source, torch.int64, device)],
        hidden_index=to_device(torch.cat(places), torch.int64, device),
    )


def padded_micro_batches(rollouts: Rollouts, sequences: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split `sequences` into lists whose padded rows hold at most `max_tokens` tokens, those of like length together.

    A list always takes at least one. The union of the lists is `sequences`.
    """
    sizes = _sizes(rollouts)
    batches: list[list[int]] = []
    widest = 0
    for i in sorted(sequences, key=lambda i: -sizes[i]):
        if not batches or (len(batches[-1]) + 1) * widest > max_tokens:
            batches.append([])
            widest = sizes[i]
        batches[-1].append(i)
    return batches


def _sizes(rollouts: Rollouts) -> list[int]:
    return [len(prompt) + max(n - 1, 0) for prompt, n in zip(rollouts.prompt_ids, rollouts.lengths, strict=True)]
