"""Ways to decode with a model: with a cache (of keys and values, or of states), padded or not, or without a cache.

Each gives the logits of a pass over the whole sequence alone. S = sequences, L = tokens, V = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from paced_fast.generation.growing_cache import SPARE_TOKENS, GrowingLayer, growing_cache
from paced_fast.policy.families import (
    BROKEN,
    PADDABLE,
    Family,
    close,
    examine,
    probe_tokens,
    spare_tokens,
    takes,
    unshareable,
    without_cache,
)

logger = logging.getLogger(__name__)


class Reading:
    """`padded`: prompts of any lengths, with a cache. `even`: prompts of one length at a time, with a cache. `whole`:
    prompts of one length without a cache, so that every token costs a pass over all tokens before it."""

    def __init__(self, kind: Literal["padded", "even", "whole"]) -> None:
        """A way to decode, and how prompts are batched for it."""
        self.kind = kind

    def batches(self, order: Sequence[int], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
        """Cut `order`, prompts by rising length, into lists of at most `size` that can be read together."""
        current: list[int] = []
        for i in order:
            ends = self.kind != "padded" and current and lengths[current[0]] != lengths[i]
            if len(current) == size or ends:
                yield current
                current = []
            current.append(i)
        if current:
            yield current

    def reader(self, model: PreTrainedModel) -> PaddedReader | EvenReader | WholeReader:
        """Decoder of one batch."""
        return {"padded": PaddedReader, "even": EvenReader, "whole": WholeReader}[self.kind](model)


class PaddedReader:
    """Decoder of left-padded prompts; each prompt is read once and its cache repeated for the group."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Nothing is read yet."""
        self.model = model
        self.name = cache_name(model)
        self.cache = growing_cache(model.config)
        # One mask, ready to be added to the scores, serves all layers that see everything; transformers would make one
        # for every token, and attention turn it into numbers in every layer.
        is_plain = all(type(layer) is GrowingLayer for layer in self.cache.layers)
        self.adds_mask = is_plain and unshareable(model.config) is None
        self.mask: Tensor | None = None  # i64[S, L], or [S, 1, 1, L] to be added, with room for tokens to come
        self.length = 0
        self.positions = torch.empty(0)

    def read(self, ids: Tensor, mask: Tensor | None, group_size: int) -> Tensor:
        """Logits [S, V] of the first token; `ids` and `mask` i64[S / group_size, L], None without padding."""
        own = torch.ones_like(ids) if mask is None else mask
        self.positions, self.length = (own.cumsum(1) - 1).clamp(min=0), ids.shape[1]
        logits = self._forward(ids, mask)
        self.cache.batch_repeat_interleave(group_size)
        self.positions = own.sum(1).repeat_interleave(group_size, 0)[:, None]
        if mask is not None:
            if self.adds_mask:
                added = torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device)
                mask = added.masked_fill_(mask == 0, -torch.inf)[:, None, None]
            self.mask = mask.repeat_interleave(group_size, 0)
        return logits.repeat_interleave(group_size, 0)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.cache.batch_select_indices(rows)
        self.positions = self.positions[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def next(self, token: Tensor) -> Tensor:
        """Logits [S, V] of the token after `token` i64[S]."""
        self.length += 1
        mask = None
        if self.mask is not None:
            if self.length > self.mask.shape[-1]:
                self.mask = pad(self.mask, (0, SPARE_TOKENS), value=0 if self.adds_mask else 1)
            mask = self.mask.narrow(-1, 0, self.length)
        logits = self._forward(token[:, None], mask)
        self.positions = self.positions + 1
        return logits

    def _forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=self.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.name: self.cache},
        )
        return output.logits[:, -1].float()


def cache_name(model: PreTrainedModel) -> str:
    """Name of the argument by which the model's forward pass takes a cache; transformers 5.24 calls it `cache`."""
    names = ("past_key_values", "cache", "cache_params")
    return next((name for name in names if takes(model, name)), names[0])


class EvenReader:
    """Decoder of prompts of one length, each read for every sequence of its group: no padding, no mask, no
    positions."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Nothing is read yet."""
        self.model = model
        self.name = cache_name(model)
        self.cache: Any = growing_cache(model.config)

    def read(self, ids: Tensor, mask: Tensor | None, group_size: int) -> Tensor:
        """Logits [S, V] of the first token; `ids` i64[S / group_size, L] and nothing is masked."""
        return self._forward(ids.repeat_interleave(group_size, 0))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.cache.reorder_cache(rows)

    def next(self, token: Tensor) -> Tensor:
        """Logits [S, V] of the token after `token` i64[S]."""
        return self._forward(token[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, **{self.name: self.cache}, use_cache=True).logits[:, -1].float()


class WholeReader:
    """Decoder of prompts of one length, with a pass over the whole sequences per token."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Nothing is read yet."""
        self.model = model
        self.ids = torch.empty(0, 0, dtype=torch.int64)

    def read(self, ids: Tensor, mask: Tensor | None, group_size: int) -> Tensor:
        """Logits [S, V] of the first token; `ids` i64[S / group_size, L] and nothing is masked."""
        self.ids = ids.repeat_interleave(group_size, 0)
        return self._forward()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.ids = self.ids[rows]

    def next(self, token: Tensor) -> Tensor:
        """Logits [S, V] of the token after `token` i64[S]."""
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        return self._forward()

    def _forward(self) -> Tensor:
        return self.model(input_ids=self.ids, **without_cache(self.model)).logits[:, -1].float()


def reading_of(model: PreTrainedModel) -> Reading:
    """The fastest way that is exact for this model. Raises InputError for one that has no log-probs of completions."""
    if unshareable(model.config) is None:
        return Reading("padded")
    family = examine(model)
    reason = "its cache gives other logits than a whole pass"
    try:
        if getattr(family.settings, "model_type", "") in PADDABLE and _agrees_padded(model, family):
            return Reading("padded")
        if _agrees(model, family):
            return Reading("even")
    except BROKEN as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    told = "sampling is slow, because every token needs a pass over the whole sequence (%s): %s"
    logger.info(told, family.model_type, reason)
    return Reading("whole")


@torch.no_grad()
def _agrees(model: PreTrainedModel, family: Family) -> bool:
    """Whether decoding with a cache, with rows dropped on the way, gives the logits of whole passes."""
    for length in (1, spare_tokens(family)):
        rows = torch.tensor(probe_tokens(model.config, family.settings, (length + 5,) * 3), device=model.device)
        prompts, reader = rows[:, :length], EvenReader(model)
        found = [reader.read(prompts, None, 1)]
        found += [reader.next(rows[:, t]) for t in range(length, length + 2)]
        kept = torch.tensor([2, 0], device=model.device)
        reader.keep(kept)
        found += [reader.next(rows[kept, t]) for t in range(length + 2, length + 5)]
        for row, places in ((2, (2, 2, 2, 0, 0, 0)), (0, (0, 0, 0, 1, 1, 1))):
            wanted = model(input_ids=rows[row : row + 1], **without_cache(model)).logits[0].float()
            own = torch.stack([logits[place] for logits, place in zip(found, places, strict=True)])
            if not close(own, wanted[length - 1 :], model.dtype):
                return False
    return True


@torch.no_grad()
def _agrees_padded(model: PreTrainedModel, family: Family) -> bool:
    """The same check for prompts of two lengths, the shorter padded on the left."""
    longest = spare_tokens(family) + 1
    lengths, padding = (2, longest), [0] * (longest - 2)
    rows = probe_tokens(model.config, family.settings, [length + 4 for length in lengths])
    ids = torch.tensor([padding + rows[0][:2], rows[1][:longest]], device=model.device)
    mask = torch.tensor([padding + [1] * 2, [1] * longest], device=model.device)
    reader = PaddedReader(model)
    found = [reader.read(ids, mask, 2)]
    for t in range(4):
        tokens = torch.tensor([rows[r][length + t] for r, length in enumerate(lengths)], device=model.device)
        found.append(reader.next(tokens.repeat_interleave(2)))
    for r, length in enumerate(lengths):
        wanted = model(input_ids=torch.tensor([rows[r]], device=model.device), **without_cache(model)).logits[0].float()
        if not close(torch.stack([logits[2 * r + 1] for logits in found]), wanted[length - 1 :], model.dtype):
            return False
    return True
