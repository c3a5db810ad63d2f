"""Layouts of forward rows: how sequences of a batch share a row.

T = packed completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paced_fast.data.packing import cu_seqlens, ranges
from paced_fast.data.records import Rollouts
from paced_fast.data.transfer import to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardRows:
    """R rows of at most L tokens, and where the states that predict each packed completion token are found."""

    input_ids: Tensor  # i64[R, L]
    position_ids: Tensor  # i64[R, L]
    attention_mask: Tensor  # bool[R, 1, L, L], True where a query may look
    hidden_index: Tensor  # i64[T], positions in the flattened [R * L] states, in packed order


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One row of L tokens without padding, cut into K blocks.

    A token sees what comes before it in its block, and with a prefix all of that other block too.
    """

    input_ids: Tensor  # i64[1, L]
    position_ids: Tensor  # i64[1, L], counted along each sequence
    hidden_index: Tensor  # i64[T], positions of the states that predict the packed completion tokens
    lengths: tuple[int, ...]  # K
    prefixes: tuple[int, ...]  # K, the block that comes before this one in its sequence, or -1
    cu_seqlens: Tensor  # i32[K + 1]


def forward_rows(rollouts: Rollouts, max_row_tokens: int) -> ForwardRows:
    """Lay the sequences out as rows of one prompt and its completions, at most `max_row_tokens` long where possible.

    A row always takes at least one completion, so a longer sequence makes a longer row. The layout is made of lengths
    alone: the tokens of completions stay on the device.
    """
    device = rollouts.token_ids.device
    plan = _plan_rows(rollouts, range(rollouts.num_sequences), max_row_tokens)
    layout, hidden = _layout(plan, rollouts)
    source, position, segment = to_device(layout, torch.int64, device)
    prompts = [token for row in plan for token in rollouts.prompt_ids[row.sequences[0]]]
    tokens = torch.cat([to_device(prompts, torch.int64, device), rollouts.token_ids])
    order = torch.arange(layout.shape[2], device=device)
    visible = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    mask = visible & (order[None, :] <= order[:, None]) & (segment[:, None, :] >= 0)
    mask |= order[None, :] == order[:, None]  # padding looks at itself: a row of nothing would be NaN
    return ForwardRows(
        input_ids=tokens[source],
        position_ids=position,
        attention_mask=mask[:, None],
        hidden_index=to_device(hidden, torch.int64, device),
    )


def _layout(plan: Sequence[_Row], rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """The rows as i64[3, R, L] and the place of every state i64[T], on the host.

    Where each position of a row finds its token (the prompts of all rows come first, then the packed completions), the
    position it stands for, and its segment: 0 prompt, k completion, -1 padding.
    """
    length = max((row.num_tokens for row in plan), default=1)
    prompt_lengths = [len(rollouts.prompt_ids[row.sequences[0]]) for row in plan]
    starts = [sum(prompt_lengths)]
    for number in rollouts.lengths:
        starts.append(starts[-1] + number)
    source, position, segment = layout = torch.zeros(3, len(plan), length, dtype=torch.int64)
    segment.fill_(-1)
    second = [0] * rollouts.num_sequences  # the place before that of the second state
    first = [0] * rollouts.num_sequences
    seen = 0
    for r, (row, prompt_length) in enumerate(zip(plan, prompt_lengths, strict=True)):
        start = prompt_length
        source[r, :start] = torch.arange(seen, seen + start)
        position[r, :start] = torch.arange(start)
        segment[r, :start] = 0
        seen += start
        for k, i in enumerate(row.sequences, start=1):
            # The last token of a completion predicts nothing, so it need not be computed.
            count = max(rollouts.lengths[i] - 1, 0)
            source[r, start : start + count] = torch.arange(starts[i], starts[i] + count)
            position[r, start : start + count] = torch.arange(prompt_length, prompt_length + count)
            segment[r, start : start + count] = k
            first[i], second[i] = r * length + prompt_length - 1, r * length + start - 1
            start += count
    return layout, _places(first, second, rollouts.lengths)


def packed_row(rollouts: Rollouts, *, share_prompts: bool) -> PackedRow:
    """Lay the sequences out one after another, each a block.

    With `share_prompts` a prompt is a block of its own, which those of its completions name as their prefix. The layout
    is made of lengths alone: the tokens of completions stay on the device.
    """
    device = rollouts.token_ids.device
    places: dict[tuple[int, ...], int] = {}  # where each prompt begins among the tokens of all prompts
    prompts: list[int] = []
    for prompt in rollouts.prompt_ids:
        if prompt not in places:
            places[prompt] = len(prompts)
            prompts.extend(prompt)
    # Pieces of a row: where their tokens are, how many, and the position of the first.
    starts, counts, positions = list[int](), list[int](), list[int]()
    lengths, prefixes = list[int](), list[int]()
    first, second = list[int](), list[int]()  # per sequence: the state of its first token, the place before the second
    shared: dict[tuple[int, ...], tuple[int, int]] = {}  # the block of each prompt, and its last place
    place, token = 0, len(prompts)
    for prompt, length in zip(rollouts.prompt_ids, rollouts.lengths, strict=True):
        count = max(length - 1, 0)  # the last token of a completion predicts nothing, so it need not be computed
        if not share_prompts or prompt not in shared:
            starts.append(places[prompt])
            counts.append(len(prompt))
            positions.append(0)
            place += len(prompt)
            shared[prompt] = (len(lengths), place - 1)
            lengths.append(len(prompt))
            prefixes.append(-1)
        block, last = shared[prompt]
        first.append(last)
        second.append(place - 1)
        if count > 0:
            starts.append(token)
            counts.append(count)
            positions.append(len(prompt))
            place += count
            if share_prompts:
                lengths.append(count)
                prefixes.append(block)
            else:
                lengths[-1] += count
        token += length
    sizes = torch.tensor(counts, dtype=torch.int64)
    source = to_device(ranges(torch.tensor(starts, dtype=torch.int64), sizes), torch.int64, device)
    position = to_device(ranges(torch.tensor(positions, dtype=torch.int64), sizes), torch.int64, device)
    tokens = torch.cat([to_device(prompts, torch.int64, device), rollouts.token_ids])
    return PackedRow(
        input_ids=tokens[source][None],
        position_ids=position[None],
        hidden_index=to_device(_places(first, second, rollouts.lengths), torch.int64, device),
        lengths=tuple(lengths),
        prefixes=tuple(prefixes),
        cu_seqlens=cu_seqlens(lengths, device),
    )


def _places(first: Sequence[int], second: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Position of the state of every packed token, on the host: `first` for the first of a sequence, the position after
    `second` for its second, and so on."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    places = ranges(torch.tensor(second, dtype=torch.int64), sizes)
    # The first token of a completion is predicted by the last state of its prompt.
    begins, has_tokens = sizes.cumsum(0) - sizes, sizes > 0
    places[begins[has_tokens]] = torch.tensor(first, dtype=torch.int64)[has_tokens]
    return places


def longest_row(rollouts: Rollouts, max_row_tokens: int) -> int:
    """The length that `forward_rows` would give its rows."""
    return max(row_lengths(rollouts, max_row_tokens), default=1)


def row_lengths(rollouts: Rollouts, max_row_tokens: int) -> list[int]:
    """Tokens of each row of `forward_rows`, without padding."""
    return [row.num_tokens for row in _plan_rows(rollouts, range(rollouts.num_sequences), max_row_tokens)]


def packed_micro_batches(
    rollouts: Rollouts, sequences: Sequence[int], max_tokens: int, *, share_prompts: bool
) -> list[list[int]]:
    """Split `sequences` into lists whose packed rows hold at most `max_tokens` tokens.

    Sequences stay whole, and with `share_prompts` groups too where they fit. The union of the lists is `sequences`.
    """
    if share_prompts:
        plan = _plan_rows(rollouts, sequences, max_tokens)
    else:
        plan = [_Row((i,), len(rollouts.prompt_ids[i]) + max(rollouts.lengths[i] - 1, 0)) for i in sequences]
    batches: list[list[int]] = []
    room: list[int] = []
    for row in sorted(plan, key=lambda row: -row.num_tokens):  # the longest first: each into the first that has room
        fits = next((k for k, left in enumerate(room) if row.num_tokens <= left), None)
        if fits is None:
            fits = len(batches)
            batches.append([])
            room.append(max_tokens)
        batches[fits].extend(row.sequences)
        room[fits] -= row.num_tokens
    return batches


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


def deal(rollouts: Rollouts, sequences: Sequence[int], ranks: int, max_tokens: int) -> list[list[int]]:
    """Share `sequences` out to `ranks` processes with about as many tokens each; every rank makes the same lists.

    Completions of a prompt stay together as long as that is not more than a rank's part.
    """
    if ranks == 1:
        return [list(sequences)]
    total = sum(row.num_tokens for row in _plan_rows(rollouts, sequences, max_tokens))
    plan = sorted(_plan_rows(rollouts, sequences, min(max_tokens, -(-total // ranks))), key=lambda row: -row.num_tokens)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in plan:
        least = tokens.index(min(tokens))
        dealt[least].extend(row.sequences)
        tokens[least] += row.num_tokens
    return dealt
