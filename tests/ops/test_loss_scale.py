"""One scale of the loss: README's lines, the operator, the adapters' loss, and the gradient of REINFORCE."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paced_fast.integrations.losses import loss_from_hidden, loss_from_logprobs
from paced_kernels import linear_logprobs, segment_sum, trajectory_balance_from_logprobs, trajectory_balance_loss

README = Path(__file__).resolve().parents[2] / "README.md"
LENGTHS, H, V, BETA, CAP = [3, 1, 4, 2], 5, 11, 0.1, 1.28
B, T = len(LENGTHS), sum(LENGTHS)


def readme_lines() -> str:
    """The block of README that defines the loss."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if "residual" in block and "log_ratio =" in block]
    return found


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Packed completions in float64, sampled by a policy that is near the present one."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, H, generator=draw, dtype=torch.float64)
    head = torch.randn(V, H, generator=draw, dtype=torch.float64, requires_grad=True)
    token_ids = torch.randint(0, V, (T,), generator=draw)
    logprobs = linear_logprobs(hidden, head, token_ids).detach()
    return {
        "hidden": hidden,
        "head": head,
        "token_ids": token_ids,
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0),
        "old": logprobs + 0.2 * torch.randn(T, generator=draw, dtype=torch.float64),
        "on_policy": logprobs,
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64),
        "value": torch.tensor([0.3, 0.6, 0.2, 0.9], dtype=torch.float64),
    }


def operator(batch: dict[str, Tensor], old: Tensor) -> dict[str, Tensor]:
    """The loss by each public function."""
    first = (batch["hidden"], batch["head"], batch["token_ids"], batch["cu_seqlens"])
    terms = {"rewards": batch["rewards"], "log_z": batch["value"] / BETA, "beta": BETA}
    sampled = {"ref_logprobs": old, "behavior_logprobs": old, "importance_cap": CAP}

    def logprobs() -> Tensor:  # a graph for each
        return linear_logprobs(*first[:3])

    adapters = {**terms, "old_logprobs": old, "importance_cap": CAP, "denominator": B}
    return {
        "operator": trajectory_balance_loss(*first, **terms, **sampled).loss,
        "from log-probs": trajectory_balance_from_logprobs(logprobs(), first[3], **terms, **sampled).loss,
        "adapters, hidden": loss_from_hidden(*first, **adapters).loss,
        "adapters, log-probs": loss_from_logprobs(logprobs(), cu_seqlens=first[3], **adapters).loss,
    }


def gradient(loss: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return torch.autograd.grad(loss, batch["head"])[0]


def sums(values: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in values.split(LENGTHS)])


def chosen(batch: dict[str, Tensor]) -> Tensor:
    """Log-probs of the tokens from full logits, [T]."""
    table = (batch["hidden"] @ batch["head"].T).log_softmax(-1)
    return table.gather(1, batch["token_ids"][:, None])[:, 0]


def test_the_lines_of_readme_are_what_every_function_computes(batch: dict[str, Tensor]) -> None:
    log_ratio = sums(chosen(batch)) - sums(batch["old"])
    weight = log_ratio.detach().exp().clamp(max=CAP)
    assert weight.max() == CAP
    assert weight.min() < 1
    names = {
        "seq_logprobs": sums(chosen(batch)),
        "old_seq_logprobs": sums(batch["old"]),
        "value": batch["value"],
        "beta": BETA,
        "reward": batch["rewards"],
        "weight": weight,
    }
    exec(readme_lines(), names)  # the project's own text
    loss = names["loss"]
    assert isinstance(loss, Tensor)
    wanted = gradient(loss, batch)
    for name, found in operator(batch, batch["old"]).items():
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(gradient(found, batch), wanted, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("which", ["operator", "from log-probs", "adapters, hidden", "adapters, log-probs"])
def test_on_policy_the_gradient_is_that_of_reinforce_with_the_value_as_baseline(
    batch: dict[str, Tensor], which: str
) -> None:
    reinforce = -((batch["rewards"] - batch["value"]) * sums(chosen(batch))).mean()
    found = operator(batch, batch["on_policy"])[which]
    torch.testing.assert_close(gradient(found, batch), gradient(reinforce, batch), rtol=1e-6, atol=1e-8)


def test_the_residual_is_in_nats_and_beta_makes_it_reward_units(batch: dict[str, Tensor]) -> None:
    out = trajectory_balance_loss(
        batch["hidden"],
        batch["head"],
        batch["token_ids"],
        batch["cu_seqlens"],
        rewards=batch["rewards"],
        log_z=batch["value"] / BETA,
        beta=BETA,
        ref_logprobs=batch["old"],
    )
    log_ratio = segment_sum(chosen(batch).detach() - batch["old"], batch["cu_seqlens"])
    u = batch["value"] + BETA * log_ratio - batch["rewards"]
    torch.testing.assert_close(BETA * out.residual, u)
    torch.testing.assert_close(out.loss.detach(), u.square().mean() / (2 * BETA))
