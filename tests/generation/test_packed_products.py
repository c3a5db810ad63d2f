"""Sampling on a CPU multiplies by weights that were laid out once."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import tiny_policy
import torch
from torch import nn
from torch.nn.functional import linear

from paced_fast.generation import Sampling, TransformersGenerator, packed_products


def two_layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(160, 320), nn.Linear(320, 160, bias=False), nn.Linear(160, 8)).to(dtype)


def entered(model: nn.Module, *, rows: int = 4, tokens: int = 64) -> AbstractContextManager[int]:
    return packed_products.packed_products(model, rows=rows, tokens=tokens)


@pytest.fixture(autouse=True)
def _small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_products, "_LEAST_ELEMENTS", 2**14)


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")


@needs_onednn
def test_products_are_those_of_the_weights_at_the_start() -> None:
    model = two_layers()
    few, many = torch.randn(4, 3, 160), torch.randn(100, 160)
    with torch.inference_mode():
        wanted, wanted_many = model(few), model(many)
        with entered(model) as packed:
            assert packed == 2, "the last layer is too small to gain anything"
            torch.testing.assert_close(model(few), wanted, rtol=1e-5, atol=1e-5)
            other = torch.randn(7, 160)
            torch.testing.assert_close(linear(few, other), few @ other.T, rtol=1e-5, atol=1e-5)
            model[0].weight.zero_()
            model[0].bias.zero_()
            assert float(model[0](few).abs().max()) > 0.1, "the layout of the start is used"
            assert float(model[0](many).abs().max()) == 0.0, "many rows lay the weight out themselves"
        assert float(model[0](few).abs().max()) == 0.0, "nothing is left behind"
        assert wanted_many.shape == (100, 8)


@needs_onednn
def test_layers_are_themselves_again_after_an_error() -> None:
    model = two_layers()
    before = [dict(vars(layer)) for layer in model]

    def interrupted() -> None:
        with entered(model):
            assert "forward" in vars(model[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [dict(vars(layer)) for layer in model] == before


@needs_onednn
def test_a_tied_weight_is_laid_out_once_and_hooks_are_called() -> None:
    model = two_layers()
    model.append(nn.Linear(160, 320))
    model[3].weight = model[0].weight
    states, seen = torch.randn(2, 160), []
    with torch.inference_mode():
        wanted = model[3](states)
        model[3].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        with entered(model) as packed:
            assert packed == 3
            assert model[3].forward.args[1] is model[0].forward.args[1]
            torch.testing.assert_close(model[3](states), wanted, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


class _Halved(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) / 2


def test_layers_that_multiply_in_a_way_of_their_own_keep_it() -> None:
    """A class with another `forward`, an instance with one, and a part that is compiled."""
    model = nn.ModuleList([_Halved(160, 160), nn.Linear(160, 160), nn.Sequential(nn.Linear(160, 160))])
    model[1].forward = lambda states: states
    model[2].compile()
    before = vars(model[1])["forward"]
    with entered(model) as packed:
        assert packed == 0
        assert vars(model[1])["forward"] is before
    assert vars(model[1])["forward"] is before


@pytest.mark.parametrize(
    ("dtype", "tokens"), [(torch.bfloat16, 64), (torch.float64, 64), (torch.float32, packed_products.FEWEST_TOKENS - 1)]
)
def test_nothing_is_laid_out_where_it_does_not_pay(dtype: torch.dtype, tokens: int) -> None:
    with entered(two_layers(dtype), tokens=tokens) as packed:
        assert packed == 0


@needs_onednn
def test_a_model_samples_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_products, "_LEAST_ELEMENTS", 1)
    model = tiny_policy.model().eval()
    sampling = Sampling(samples=3, max_completion_tokens=20, temperature=1.0, seed=5)
    made = TransformersGenerator(model, stop_ids=[tiny_policy.STOP], max_batch_sequences=8)
    products: list[int] = []
    original = packed_products._product
    monkeypatch.setattr(packed_products, "_product", lambda *args: products.append(1) or original(*args))
    found = made.generate([(2, 3), (4, 5, 6)], sampling)
    assert len(products) > 20
    products.clear()
    monkeypatch.setattr(packed_products, "FEWEST_TOKENS", 21)
    wanted = made.generate([(2, 3), (4, 5, 6)], sampling)
    assert not products
    for one, other in zip(found, wanted, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-5, atol=1e-5)
