"""What log-probs lose on tensor cores that cut sums off: bounds, and where the target's logit should come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import cut_off, tensor_core_nats
from truncating_products import logprob_errors, tensor_core_logits

LEADS_ALONE = {"peak": 6.0}
CASES: list[dict[str, Any]] = [
    LEADS_ALONE,
    {"peak": 0.0},
    {"peak": 12.0, "rivals": 3},
    {"peak": 6.0, "rivals": 3, "shared": 16.0},
    {"peak": 0.0, "shared": 20.0},  # all logits are near 20
    {"peak": 12.0, "shared": 20.0},
]


def test_sums_are_cut_off_as_worked_out_by_hand() -> None:
    hidden, weight = torch.zeros(3, 32).bfloat16(), torch.zeros(1, 32).bfloat16()
    weight[0, :] = 1.0
    hidden[0, 0], hidden[0, 16] = 1.0, 2.0**-25  # a quarter of a unit: kept by the instruction, cut off at its end
    hidden[1, 0], hidden[1, 1], hidden[1, 2:6] = 1.0, 2.0**-23, 2.0**-25  # four quarters in one instruction are a unit
    hidden[2, 0], hidden[2, 16:20] = -1.0, 2.0**-26  # each eighth is cut off before the four are added
    found = tensor_core_logits(hidden, weight)[:, 0]
    assert found.tolist() == [1.0, 1.0 + 2 * 2.0**-23, -1.0]


@pytest.mark.parametrize("hidden_size", [896, 4096])
def test_the_bound_on_log_probs_holds_and_is_not_idle(hidden_size: int) -> None:
    shares = []
    for case in CASES:
        errors, largest = logprob_errors(6, hidden_size, 600, **case)
        worst = errors["same"].abs().max().item()
        assert worst < tensor_core_nats(hidden_size, largest)
        assert errors["same"].mean().abs() < cut_off(hidden_size, largest) / 4
        shares.append(worst / cut_off(hidden_size, largest))
    assert 0.1 < max(shares) < 0.4


def test_the_worst_case_is_better_with_the_targets_logit_from_the_same_product() -> None:
    """Apart from it, all that the other logits lose stays; from it, only what they lose less or more.

    Where the target leads alone it loses more than the rest, and the same product is the worse of the two, by less than
    what it gains elsewhere.
    """
    found = {str(case): logprob_errors(8, 896, 1000, **case)[0] for case in CASES}
    worst = {name: max(errors[name].abs().max().item() for errors in found.values()) for name in ("apart", "same")}
    mean = {name: max(abs(errors[name].mean().item()) for errors in found.values()) for name in ("apart", "same")}
    assert 4 * worst["same"] < worst["apart"] < 3e-5
    assert 6 * mean["same"] < mean["apart"]
    alone = {name: errors.abs().max().item() for name, errors in found[str(LEADS_ALONE)].items()}
    assert alone["apart"] < alone["same"] < worst["apart"] / 4
