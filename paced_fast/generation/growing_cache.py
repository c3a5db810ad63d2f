"""A cache of keys and values that is written in place while sequences grow.

transformers' own joins all keys and values with those of the new token at every token. S = sequences, K = key heads,
L = tokens, D = size of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS = 64
"""Tokens that fit in before the cache is copied to a larger place."""


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache that transformers would use, whose layers of plain keys and values grow in place.

    Layers with a sliding window, or with states of another kind, remain transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):
    """Keys and values [S, K, L, D] as views of larger tensors, so that a token is written behind those it follows."""

    def __init__(self) -> None:
        """Nothing is held yet."""
        super().__init__()
        self._rooms: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all of them, as views that the next call does not change."""
        if self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._appended(0, self.keys, key_states)
        self.values = self._appended(1, self.values, value_states)
        return self.keys, self.values

    def _appended(self, which: int, held: Tensor, added: Tensor) -> Tensor:
        before, tokens, room = held.shape[2], added.shape[2], self._rooms[which]
        # What is held may have been replaced since, by the rows that go on or by repetition.
        is_own = room is not None and held.data_ptr() == room.data_ptr() and held.shape[:2] == room.shape[:2]
        if room is None or not is_own or before + tokens > room.shape[2]:
            room = held.new_empty(*held.shape[:2], before + tokens + SPARE_TOKENS, held.shape[3])
            room.narrow(2, 0, before).copy_(held)
            self._rooms[which] = room
        room.narrow(2, before, tokens).copy_(added)
        return room.narrow(2, 0, before + tokens)
