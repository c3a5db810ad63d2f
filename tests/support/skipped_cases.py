"""Peaked inputs for the tests of what gradients leave out, and the bound of kernels/README.md in float64.

T = packed tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import LEAVES, Case, make_case, oracle
from torch import Tensor

SHARE = 2.0**-5
HIDDEN, VOCAB = 24, 1500


def peaked_case(lengths: list[int], *, steepness: float = 8.0, seed: int = 0, **options: Any) -> Case:
    """Logits of standard deviation `steepness`, tokens drawn from the policy itself: like a trained one's."""
    case = make_case(lengths, HIDDEN, VOCAB, torch.float64, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        case["hidden"] *= steepness / 2
        logits = case["hidden"] @ case["head_weight"].T + case["bias"]
        case["token_ids"] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return {**case, **options}


def gradient_of_logits(case: Case, **options: Any) -> Tensor:
    """[T, V] dloss / dz by autograd through full float64 logits: that of the bias, one row at a time."""
    rows = case["hidden"].shape[0]
    exact = {name: case[name].detach().double() for name in LEAVES}
    bias = exact["bias"].expand(rows, -1).clone().requires_grad_()
    # The oracle takes a bias of one row; the states carry the rest: [h, b_t] with the weight [W, I].
    wide = {
        **case,
        "hidden": torch.cat([exact["hidden"], bias * options.get("temperature", 1.0)], dim=1),
        "head_weight": torch.cat([exact["head_weight"], torch.eye(exact["bias"].shape[0], dtype=torch.float64)], dim=1),
        "bias": torch.zeros_like(exact["bias"]),
        "log_z": exact["log_z"],
    }
    wide["hidden"] = wide["hidden"].detach().requires_grad_()
    gradients = oracle(wide, **options).gradients["hidden"]
    return gradients[:, case["hidden"].shape[1] :] * options.get("temperature", 1.0)


def bounds(case: Case, share: float, **options: Any) -> dict[str, float]:
    """What the README allows in Frobenius norm, from the gradient of the logits in float64."""
    temperature = options.get("temperature", 1.0)
    gradient = gradient_of_logits(case, **options)
    masses = gradient.gather(1, case["token_ids"][:, None]).abs()
    weight, hidden = case["head_weight"].detach().double(), case["hidden"].detach().double()
    factor = share / temperature
    return {
        "hidden": factor * 2 * weight.norm(dim=1).max().item() * masses.norm().item(),
        "head_weight": factor * hidden.norm(dim=1).max().item() * masses.sum().item(),
    }
