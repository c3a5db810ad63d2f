"""The cache that is written in place holds what transformers' own holds."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from paced_fast.generation import growing_cache as module
from paced_fast.generation.growing_cache import GrowingLayer, growing_cache


def states(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of 2 heads, of size 4 and 6."""
    return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 6)


def same(found: GrowingLayer, wanted: DynamicLayer) -> bool:
    return torch.equal(found.keys, wanted.keys) and torch.equal(found.values, wanted.values)


@pytest.mark.parametrize("spare", [0, 1, 5, 64])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_calls_gives_the_keys_and_values_of_a_dynamic_layer(
    monkeypatch: pytest.MonkeyPatch, spare: int, seed: int
) -> None:
    monkeypatch.setattr(module, "SPARE_TOKENS", spare)
    torch.manual_seed(seed)
    source = random.Random(seed)
    found, wanted = GrowingLayer(), DynamicLayer()
    both, rows, seen = (found, wanted), 2, []
    for call in ["update", *source.choices(["update", "repeat", "select", "reorder", "crop"], [12, 1, 2, 1, 1], k=60)]:
        if call == "update":
            own = states(rows, source.choice([1, 1, 1, 3]))
            keys, values = found.update(*own)
            expected = wanted.update(*own)
            assert torch.equal(keys, expected[0])
            assert torch.equal(values, expected[1])
            seen.append((keys, values, *(tensor.clone() for tensor in expected)))
        elif call == "repeat" and rows <= 4:
            for layer in both:
                layer.batch_repeat_interleave(3)
            rows *= 3
        elif call == "select" and rows > 1:
            chosen = torch.tensor(source.sample(range(rows), max(1, rows - 1)))
            for layer in both:
                layer.batch_select_indices(chosen)
            rows = len(chosen)
        elif call == "reorder":
            order = torch.tensor(source.choices(range(rows), k=rows))
            for layer in both:
                layer.reorder_cache(order)
        elif call == "crop" and found.get_seq_length() > 2:
            for layer in both:
                layer.crop(-1)
            seen.clear()  # what comes next is written over the tokens that were cut off
        assert same(found, wanted)
        assert found.get_seq_length() == wanted.get_seq_length()
        assert found.get_mask_sizes(1) == wanted.get_mask_sizes(1)
    for keys, values, *expected in seen:
        assert torch.equal(keys, expected[0]), "what an update returned is never changed"
        assert torch.equal(values, expected[1])


def test_a_token_is_written_behind_those_before_it() -> None:
    """After a prompt of 7 the first token moves it to a larger place, and then every 65th."""
    layer, places = GrowingLayer(), []
    layer.update(*states(3, 7))
    for _ in range(200):
        keys, values = layer.update(*states(3, 1))
        places.append((keys.data_ptr(), values.data_ptr()))
    moves = [t for t in range(1, 200) if places[t] != places[t - 1]]
    assert moves == [65, 130, 195]


def test_fewer_rows_of_the_same_memory_do_not_write_into_it() -> None:
    layer = GrowingLayer()
    layer.update(*states(3, 2))
    keys, _ = layer.update(*states(3, 1))
    layer.keys, layer.values = layer.keys[:2], layer.values[:2]
    layer.update(*states(2, 1))
    assert layer.keys.data_ptr() != keys.data_ptr()


def test_layers_with_windows_remain_those_of_transformers() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    for kind in (LlamaConfig, GemmaConfig):
        layers = growing_cache(kind(num_hidden_layers=3, **sizes)).layers
        assert [type(layer) for layer in layers] == [GrowingLayer] * 3
    windowed = growing_cache(MistralConfig(num_hidden_layers=2, sliding_window=4, **sizes)).layers
    assert [type(layer) for layer in windowed] == [DynamicSlidingWindowLayer] * 2
    mixed = Qwen2Config(num_hidden_layers=2, sliding_window=4, use_sliding_window=True, max_window_layers=1, **sizes)
    assert [type(layer) for layer in growing_cache(mixed).layers] == [GrowingLayer, DynamicSlidingWindowLayer]
