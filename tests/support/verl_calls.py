"""A program: verl itself finds and calls the adapter; prints "fine". Run by test_integrations_verl.py."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
import verl  # noqa: F401  (loads the plugins)
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from paced_fast.errors import InputError

PROMPTS = [[5, 6], [5, 6], [7], [7]]
RESPONSES = [[1, 2, 3], [4], [1, 2], [3, 3, 3, 3]]
ADVANTAGES = [0.5, -0.5, 0.25, -0.25]
REF_SHIFT = [0.3, -0.2, 0.1, 0.4]


def nested(rows: list[list[float]] | list[list[int]]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def main() -> None:
    """The engine's layout: nested tensors, log-probs of prompt and response."""
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=4,
        loss_agg_mode="seq-mean-token-sum",
        clip_ratio_high=0.28,
        policy_loss=PolicyLossConfig(loss_mode="paced_tb"),
    )
    lengths = [len(r) for r in RESPONSES]
    old = [[-0.5 * (k + 1) for k in range(n)] for n in lengths]
    change = [[0.1] * n for n in lengths]
    data = TensorDict(
        {
            "prompts": nested(PROMPTS),
            "responses": nested(RESPONSES),
            "response_mask": nested([[1] * n for n in lengths]),
            "old_log_probs": nested(old),
            "ref_log_prob": nested([[x - s for x in row] for row, s in zip(old, REF_SHIFT, strict=True)]),
            "advantages": nested([[a] * n for a, n in zip(ADVANTAGES, lengths, strict=True)]),
        },
        batch_size=[4],
    )
    tensordict_utils.assign_non_tensor(data, dp_size=2, batch_num_tokens=10, global_batch_size=8)
    # The engine's log-prob at a position is that of the next token.
    rows = [
        [0.0] * (len(p) - 1) + [x + c for x, c in zip(o, cs, strict=True)] + [0.0]
        for p, o, cs in zip(PROMPTS, old, change, strict=True)
    ]
    output = {"log_probs": nested(rows)}

    assert get_adv_estimator_fn("paced_tb").__module__ == "paced_fast.integrations.verl"
    assert get_policy_loss_fn("paced_flowrl").__module__ == "paced_fast.integrations.verl"

    loss, metrics = ppo_loss(config, output, data)
    assert "actor/tb_residual_rms" in metrics
    beta, cap = 0.05, 1.28
    wanted = 0.0
    for n, advantage in zip(lengths, ADVANTAGES, strict=True):
        weight = min(2.718281828459045 ** (0.1 * n), cap)
        wanted += weight * (beta * 0.1 * n - advantage) ** 2 / (2 * beta)
    assert abs(float(loss) - wanted / 4) < 1e-5, (float(loss), wanted / 4)

    from paced_fast.integrations.verl import flowrl_loss

    loss, _ = functools.partial(flowrl_loss, config=config, group_size=2)(model_output=output, data=data)
    wanted = 0.0
    for i, n in enumerate(lengths):
        pair = (i // 2 * 2, i // 2 * 2 + 1)
        log_z = sum(15 * ADVANTAGES[j] - REF_SHIFT[j] for j in pair) / 2
        residual = log_z + 0.1 + REF_SHIFT[i] - 15 * ADVANTAGES[i]
        wanted += min(2.718281828459045 ** (0.1 * n), 10.0) * residual**2
    assert abs(float(loss) - wanted / 4) < 1e-4, (float(loss), wanted / 4)
    with pytest.raises(InputError, match="2 of 4 completions"):
        flowrl_loss(config, output, data, group_size=4)
    sys.stdout.write("fine\n")


if __name__ == "__main__":
    main()
