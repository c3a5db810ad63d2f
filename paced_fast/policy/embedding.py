"""Embeddings of prompts: the mean of their last layer's states, and the state of the last token.

Prompts are laid out one after another in a row without padding. A prefix that many of them begin with is computed once:
its keys and values are kept, and the rest of each prompt attends to them. Models that need a row per sequence get
padded rows of whole prompts.

S = prompts of a pass, T = their tokens behind the prefix, L = most of a prompt, P = tokens of the prefix, A = attention
heads, K = key heads, D = size of a head, H = size of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from paced_fast.data.packing import cu_seqlens, ranges
from paced_fast.data.transfer import to_device
from paced_fast.policy.attention import Kernel, Packed
from paced_fast.policy.micro_batches import PackedRow
from paced_fast.policy.prefixes import Behind, Prompt, by_prefix

RowStates = Callable[[PackedRow, Kernel, int], Tensor]
"""A row of T tokens, the kernel its layers attend with, and P -> states [T, H]."""


class Embedded(NamedTuple):
    """Prompts of one pass and what their embeddings are made of."""

    prompts: list[Prompt]
    mean: Tensor  # f32[S, H]
    last: Tensor  # f32[S, H]


def joined(parts: Iterable[Embedded], prompts: Sequence[Prompt], result: Tensor) -> Tensor:
    """Fill `result`, f32[N, H] for means or f32[N, 2H] for both, with the embeddings of `prompts`, each of which is in
    one of the parts."""
    places: dict[Prompt, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    for part in parts:
        values = torch.cat([part.mean, part.last], 1)[:, : result.shape[1]]
        own = [places[prompt] for prompt in part.prompts]
        sources = [k for k, targets in enumerate(own) for _ in targets]
        targets = [target for targets in own for target in targets]
        result[to_device(targets, torch.int64, result.device)] = values[to_device(sources, torch.int64, result.device)]
    return result


def padded(prompts: Iterable[Prompt], states: Callable[[Tensor], Tensor], max_tokens: int) -> Iterator[Embedded]:
    """Embed distinct prompts as rows of at most `max_tokens` padded tokens. `states`: i64[S, L] -> [S, L, H], on any
    device."""
    for chunk in _chunks(prompts, max_tokens):
        lengths = [len(prompt) for prompt in chunk]
        ids = torch.zeros(len(chunk), lengths[-1], dtype=torch.int64)
        for row, prompt in enumerate(chunk):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        grid = states(ids).float()  # zeros to the right, where no token looks
        sizes = to_device(lengths, torch.int64, grid.device)
        own = torch.arange(grid.shape[1], device=grid.device) < sizes[:, None]
        mean = (grid * own[:, :, None]).sum(1) / sizes[:, None]
        yield Embedded(chunk, mean, grid[torch.arange(len(chunk), device=grid.device), sizes - 1])


def packed(prompts: Iterable[Prompt], states: RowStates, max_tokens: int, device: torch.device) -> Iterator[Embedded]:
    """Embed distinct prompts in rows behind the prefixes that `by_prefix` finds; a pass holds keys of at most
    `max_tokens` padded tokens where one prompt has no more."""
    for group in by_prefix(prompts):
        yield from _behind(group, states, max_tokens, device)


def _behind(group: Behind, states: RowStates, max_tokens: int, device: torch.device) -> Iterator[Embedded]:
    before, kept, total = len(group.prefix), list[tuple[Tensor, Tensor]](), torch.zeros((), device=device)
    if before:
        row = _row([group.prefix], 0, device)
        read = states(row, RestsAttention(row.lengths, device, keep=kept), 0).float()
        total = read.sum(0)
        if group.prompts[0] == group.prefix:  # sorted, it is the first
            yield Embedded([group.prefix], total[None] / before, read[-1:])
    for chunk in _chunks((prompt for prompt in group.prompts if len(prompt) > before), max_tokens):
        row = _row([prompt[before:] for prompt in chunk], before, device)
        attention = RestsAttention(row.lengths, device, kept)
        found = states(row, attention, before).float()
        lengths = to_device(row.lengths, torch.int64, device)[:, None]
        grid = attention.grid(found) * (torch.arange(attention.longest, device=device) < lengths)[:, :, None]
        yield Embedded(chunk, (grid.sum(1) + total) / (lengths + before), found[row.hidden_index])


def _row(rests: Sequence[Prompt], before: int, device: torch.device) -> PackedRow:
    """What is left of prompts behind `before` tokens, each a block; `hidden_index` i64[S] are the last tokens."""
    lengths = tuple(len(rest) for rest in rests)
    sizes = torch.tensor(lengths)
    positions = ranges(torch.full_like(sizes, before), sizes)
    return PackedRow(
        input_ids=to_device([token for rest in rests for token in rest], torch.int64, device)[None],
        position_ids=to_device(positions, torch.int64, device)[None],
        hidden_index=to_device(sizes.cumsum(0) - 1, torch.int64, device),
        lengths=lengths,
        prefixes=(-1,) * len(lengths),
        cu_seqlens=cu_seqlens(lengths, device),
    )


class RestsAttention:
    """Kernel of one pass over a row of blocks that all go on from the same prefix; linear layers see no padding."""

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        kept: Iterable[tuple[Tensor, Tensor]] = (),  # of every layer [1, K, P, D] of the prefix
        *,
        keep: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Attend to `kept`, keys and values that an earlier pass over the prefix has put into its `keep`."""
        sizes, self.longest = torch.tensor(lengths), max(lengths)
        starts = sizes.cumsum(0) - sizes
        column = torch.arange(self.longest)
        places = torch.where(column < sizes[:, None], starts[:, None] + column, 0)
        self._places = to_device(places.flatten(), torch.int64, device)
        rows = torch.arange(len(sizes)) * self.longest
        self._back = to_device(ranges(rows, sizes), torch.int64, device)
        self._kept, self._keep = iter(kept), keep

    def grid(self, values: Tensor, dim: int = 0) -> Tensor:
        """[..., T, ...] -> [..., S, L, ...]; behind the end of a block stands some token of the row."""
        return values.index_select(dim, self._places).unflatten(dim, (-1, self.longest))

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float, window: int | None
    ) -> Tensor:
        """See `Kernel`; `packed.masks` are [L, P + L]."""
        if self._keep is not None:
            self._keep.append((key, value))
        queries, keys, values = (self.grid(tensor[0], 1).transpose(0, 1) for tensor in (query, key, value))
        if (before := next(self._kept, None)) is not None:
            keys, values = (
                torch.cat([held.expand(len(own), -1, -1, -1), own], 2)
                for held, own in zip(before, (keys, values), strict=True)
            )
        if (repeats := query.shape[1] // key.shape[1]) > 1:
            keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (keys, values))
        mask = None if before is None and (window is None or window >= self.longest) else packed.masks[window]
        output = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        return output.transpose(1, 2).flatten(0, 1).index_select(0, self._back)[None]


def _chunks(prompts: Iterable[Prompt], max_tokens: int) -> Iterator[list[Prompt]]:
    """Cut prompts, by rising length, into lists of at most `max_tokens` padded tokens; a list takes at least one."""
    current: list[Prompt] = []
    for prompt in sorted(prompts, key=len):
        if current and (len(current) + 1) * len(prompt) > max_tokens:
            yield current
            current = []
        current.append(prompt)
    if current:
        yield current
