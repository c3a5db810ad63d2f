"""Sampling on a CPU multiplies by weights that were laid out once."""

from __future__ import annotations

import pytest
import tiny_policy
import torch
from torch import nn
from torch.nn.functional import linear

from paced_fast.generation import Sampling, TransformersGenerator, packed_products
from paced_fast.generation import transformers_generator as generator_module


def two_layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(160, 320), nn.Linear(320, 160, bias=False), nn.Linear(160, 8)).to(dtype)


def entered(model: nn.Module, *, rows: int = 4, tokens: int = 64) -> object:
    return packed_products.packed_products(model, rows=rows, tokens=tokens)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
def test_products_are_those_of_the_weights_at_the_start() -> None:
    model = two_layers()
    few, many = torch.randn(4, 3, 160), torch.randn(100, 160)
    with torch.inference_mode():
        wanted, wanted_many = model(few), model(many)
        with entered(model) as packed:
            # The last layer is too small to gain anything.
            assert set(packed._packed) == {id(model[0].weight), id(model[1].weight)}
            torch.testing.assert_close(model(few), wanted, rtol=1e-5, atol=1e-5)
            other = torch.randn(7, 160)
            torch.testing.assert_close(linear(few, other), few @ other.T, rtol=1e-5, atol=1e-5)
            model[0].weight.zero_()
            model[0].bias.zero_()
            assert float(model[0](few).abs().max()) > 0.1, "the layout of the start is used"
            assert float(model[0](many).abs().max()) == 0.0, "many rows lay the weight out themselves"
        assert float(model[0](few).abs().max()) == 0.0, "nothing is left behind"
        assert wanted_many.shape == (100, 8)


@pytest.mark.parametrize(
    ("dtype", "tokens"), [(torch.bfloat16, 64), (torch.float64, 64), (torch.float32, packed_products.FEWEST_TOKENS - 1)]
)
def test_nothing_is_laid_out_where_it_does_not_pay(dtype: torch.dtype, tokens: int) -> None:
    with entered(two_layers(dtype), tokens=tokens) as packed:
        assert packed is None


def test_a_model_samples_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_products, "_LEAST_ELEMENTS", 1)
    model = tiny_policy.model().eval()
    sampling = Sampling(samples=3, max_completion_tokens=20, temperature=1.0, seed=5)
    made = TransformersGenerator(model, stop_ids=[tiny_policy.STOP], max_batch_sequences=8)
    laid_out: list[int] = []
    original = packed_products._Packed

    class Counted(original):
        def __init__(self, weights: object, rows: int) -> None:
            super().__init__(weights, rows)
            laid_out.append(len(self._packed))

    monkeypatch.setattr(packed_products, "_Packed", Counted)
    found = made.generate([(2, 3), (4, 5, 6)], sampling)
    assert laid_out[0] > 2
    monkeypatch.setattr(generator_module, "packed_products", lambda *_, **__: packed_products.nullcontext())
    wanted = made.generate([(2, 3), (4, 5, 6)], sampling)
    assert len(laid_out) == 1
    for one, other in zip(found, wanted, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-5, atol=1e-5)
