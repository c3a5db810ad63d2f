"""Weights against the engine's rounding, and the raw figures of the gap: worked cases, brute force, no host sync."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_policy
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from paced_fast.config import MismatchConfig
from paced_fast.data import packing
from paced_fast.errors import InputError
from paced_fast.generation.mismatch import mismatch_metrics, sequence_weights

LN = math.log
# Ratios of trainer to generator, token by token, of five sequences; the fourth is empty.
RATIOS = [[1.5, 1.5], [3.0, 0.6], [0.25, 1.0, 1.2], [], [1.1]]


def case(ratios: list[list[float]]) -> tuple[Tensor, Tensor, Tensor]:
    delta = torch.tensor([LN(r) for row in ratios for r in row])
    generator = -torch.rand(len(delta)) - 0.1
    return generator, generator + delta, packing.cu_seqlens([len(row) for row in ratios], tiny_policy.CPU)


def weights(mode: Any, ratios: list[list[float]] = RATIOS, cap: float = 2.0) -> list[float]:
    return sequence_weights(*case(ratios), MismatchConfig(mode=mode, cap=cap)).tolist()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("off", [1, 1, 1, 1, 1]),
        # 1.5 * 1.5 = 2.25 is cut to 2; 3 * .6 = 1.8 stays; .25 * 1.2 = .3 stays: only the upper side is cut.
        ("sequence_truncate", [2.0, 1.8, 0.3, 1, 1.1]),
        # 2.25 > 2 and .3 < .5 are out.
        ("sequence_mask", [0, 1.8, 0, 1, 1.1]),
        # 3 becomes 2, .25 becomes .5, then the products: 2.25, 1.2, .6.
        ("token_truncate", [2.25, 1.2, 0.6, 1, 1.1]),
        # 3 and .25 are outside [.5, 2]; a product of 2.25 is no token's ratio.
        ("token_mask", [2.25, 0, 0, 1, 1.1]),
    ],
)
def test_every_mode_on_a_case_worked_by_hand(mode: str, expected: list[float]) -> None:
    assert weights(mode) == pytest.approx(expected, rel=1e-5)


def test_the_cap_is_the_end_of_the_band() -> None:
    assert weights("sequence_truncate", [[2.9]], cap=3.0) == pytest.approx([2.9])
    assert weights("sequence_mask", [[0.4], [0.3]], cap=3.0) == pytest.approx([0.4, 0.0])
    assert weights("token_mask", [[2.9, 2.9], [3.1]], cap=3.0) == pytest.approx([8.41, 0.0])


@pytest.mark.parametrize("mode", ["sequence_truncate", "sequence_mask", "token_truncate", "token_mask"])
def test_long_sequences_stay_finite(mode: str) -> None:
    # 30 000 tokens that differ by .01: exp(300) overflows float32.
    long = [[math.exp(0.01)] * 30_000, [math.exp(-0.01)] * 30_000]
    found = weights(mode, long)
    expected = {"sequence_truncate": [2.0, math.exp(-20)], "sequence_mask": [0.0, 0.0]}
    assert found == pytest.approx(expected.get(mode, [math.exp(20), math.exp(-20)]), rel=1e-3)


def test_a_nan_stays_in_its_sequence() -> None:
    generator, old, cu = case([[1.0], [1.2, 1.1]])
    old[0] = math.nan
    for mode in ("sequence_truncate", "token_truncate"):
        found = sequence_weights(generator, old, cu, MismatchConfig(mode=mode))
        assert math.isnan(found[0])
        assert float(found[1]) == pytest.approx(1.32)
    for mode in ("sequence_mask", "token_mask"):
        found = sequence_weights(generator, old, cu, MismatchConfig(mode=mode))
        assert found.tolist() == pytest.approx([0.0, 1.32])


def test_weights_carry_no_gradient() -> None:
    generator, old, cu = case(RATIOS)
    old.requires_grad_()
    assert not sequence_weights(generator, old, cu, MismatchConfig(mode="token_truncate")).requires_grad


def test_metrics_are_those_of_the_definition_and_raw() -> None:
    generator, old, cu = case(RATIOS)
    found = {name: float(value) for name, value in mismatch_metrics(generator, old, cu, cap=2.0).items()}
    logs = [LN(r) for row in RATIOS for r in row]
    assert found == pytest.approx(
        {
            "mean": sum(map(abs, logs)) / 8,
            "max": LN(4),
            "token_ratio": sum(math.exp(abs(x)) for x in logs) / 8,
            # 2.25, uncut; the empty sequence counts 1.
            "sequence_ratio": (2.25 + 1.8 + 0.3 + 1 + 1.1) / 5,
            "outside_share": 2 / 8,
        },
        rel=1e-5,
    )


def test_a_filter_shows_in_the_mean_ratio() -> None:
    # Tokens kept by a filter of mass .8 get log-probs too high by log(1 / .8): the mean ratio is the kept mass.
    generator = torch.full((1000,), -1.0)
    old = generator + LN(0.8)
    cu = packing.cu_seqlens([1] * 1000, tiny_policy.CPU)
    assert float(mismatch_metrics(generator, old, cu, cap=2.0)["sequence_ratio"]) == pytest.approx(0.8, rel=1e-5)


def test_nothing_sampled_is_no_mismatch() -> None:
    empty, cu = torch.zeros(0), torch.zeros(3, dtype=torch.int32)
    found = mismatch_metrics(empty, empty, cu, cap=2.0)
    assert {name: float(value) for name, value in found.items()} == {
        "mean": 0.0,
        "max": 0.0,
        "token_ratio": 1.0,
        "sequence_ratio": 1.0,
        "outside_share": 0.0,
    }
    assert sequence_weights(empty, empty, cu, MismatchConfig(mode="token_mask")).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("mode", ["off", "sequence_truncate", "sequence_mask", "token_truncate", "token_mask"])
def test_no_value_reaches_the_host(mode: Any) -> None:
    # Traced with tensors that have shapes and no values: reading one, or a shape that depends on one, fails.
    def both(generator: Tensor, old: Tensor, cu: Tensor) -> tuple[Tensor, list[Tensor]]:
        settings = MismatchConfig(mode=mode)
        return sequence_weights(generator, old, cu, settings), [*mismatch_metrics(generator, old, cu, cap=2.0).values()]

    generator, old, cu = case(RATIOS)
    traced = make_fx(both, tracing_mode="fake")(generator, old, cu)
    assert torch.equal(traced(generator, old, cu)[0], sequence_weights(generator, old, cu, MismatchConfig(mode=mode)))


def test_a_band_without_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"--mismatch.cap is 1.0: give a value from"):
        tiny_policy.settings(mismatch__cap=1.0)
