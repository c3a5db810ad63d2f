"""The adapters of hosts that are not installed, called with the arguments that were read in their sources."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from paced_fast.errors import InputError
from paced_fast.integrations import other_hosts
from paced_fast.integrations.losses import group_log_z, loss_from_logprobs

LENGTHS = torch.tensor([3, 1, 4])
SIGNAL = torch.tensor([0.5, -0.25, -0.25])
CHANGE = torch.tensor([0.1, -0.3, 0.2])
BETA, CAP = 0.05, 1.28


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old ones, advantages and mask [3, 4]; each token's log ratio is its row's change."""
    mask = torch.arange(4) < LENGTHS[:, None]
    old = -torch.rand(3, 4)
    return (old + CHANGE[:, None]).requires_grad_(), old, SIGNAL[:, None] * mask, mask


def losses() -> Tensor:
    ratio = CHANGE * LENGTHS
    return ratio.exp().clamp(max=CAP) * (BETA * ratio - SIGNAL).square() / (2 * BETA)


def host(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


def test_prime_rl_gets_one_sequence_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=types.SimpleNamespace)
    new, old, advantages, mask = batch()
    for i in range(3):
        inputs = types.SimpleNamespace(
            trainer_logprobs=new[i],
            inference_logprobs=old[i],
            ref_logprobs=None,
            advantages=advantages[i],
            loss_mask=mask[i],
            loss_weights=None,
        )
        out = other_hosts.prime_rl_loss(inputs, beta=BETA)
        assert out.loss.item() == pytest.approx(losses()[i].item(), rel=1e-5)


def test_skyrl_sums_what_it_has_scaled() -> None:
    new, old, advantages, mask = batch()
    loss, metrics = other_hosts.skyrl_policy_loss(scale=1 / 24)(
        new, old, advantages / 24, config=None, loss_mask=mask.float(), rollout_logprobs=None
    )
    assert loss.item() == pytest.approx(losses().sum().item() / 24, rel=1e-5)
    assert metrics["clip_ratio"] == 0.0


def test_nemo_rl_divides_by_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = types.SimpleNamespace(SEQUENCE_LEVEL="sequence", LOGPROB="logprob")
    host(monkeypatch, "nemo_rl.algorithms.loss.interfaces", LossType=kinds, LossInputType=kinds)
    new, old, advantages, mask = batch()
    first = torch.full((3, 1), 7.0)  # the first column predicts nothing
    data = {
        "token_mask": torch.cat([first * 0, mask.float()], 1),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0]),
        "prev_logprobs": torch.cat([first, old], 1),
        "advantages": torch.cat([first, advantages], 1),
    }
    function = other_hosts.NemoRlLoss()
    assert (function.loss_type, function.input_type) == ("sequence", "logprob")
    loss, _ = function(
        next_token_logprobs=new, data=data, global_valid_seqs=torch.tensor(8.0), global_valid_toks=torch.tensor(50.0)
    )
    assert loss.item() == pytest.approx(losses()[:2].sum().item() / 8, rel=1e-5)
    del data["prev_logprobs"]
    with pytest.raises(InputError, match="force_on_policy_ratio=false"):
        function(data=data, next_token_logprobs=new, global_valid_seqs=torch.ones(()), global_valid_toks=torch.ones(()))


@pytest.mark.parametrize("is_pair", [True, False])  # 2fc4883 returns the dictionary alone
def test_slime_gets_a_sum_over_ragged_sequences(monkeypatch: pytest.MonkeyPatch, is_pair: bool) -> None:
    new, old, advantages, mask = batch()

    def ragged(values: Tensor) -> list[Tensor]:
        return [row[:n] for row, n in zip(values, LENGTHS.tolist(), strict=True)]

    def log_probs(logits: Tensor, *, max_seq_lens: list[int], **_: Any) -> Any:
        assert max_seq_lens == [4, 4, 4]
        found = {"log_probs": ragged(new)}
        return (None, found) if is_pair else found

    host(monkeypatch, "slime.backends.megatron_utils.loss", get_log_probs_and_entropy=log_probs)
    lists = {"unconcat_tokens": [], "total_lengths": [], "response_lengths": LENGTHS.tolist()}
    lists["max_seq_lens"] = [4, 4, 4]  # what slime hands on for padded layouts
    given = {**lists, "log_probs": ragged(old), "advantages": ragged(advantages), "loss_masks": ragged(mask.float())}
    args = types.SimpleNamespace(eps_clip_high=0.28)
    loss, _ = other_hosts.slime_loss(args, given, torch.zeros(1), lambda x: x)
    assert loss.item() == pytest.approx(losses().sum().item(), rel=1e-5)
    args.context_parallel_size = 2
    with pytest.raises(InputError, match="context-parallel-size 1"):
        other_hosts.slime_loss(args, given, torch.zeros(1), lambda x: x)
    args = types.SimpleNamespace(eps_clip_high=0.28, calculate_per_token_loss=True)
    with pytest.raises(InputError, match="leave --calculate-per-token-loss out"):
        other_hosts.slime_loss(args, given, torch.zeros(1), lambda x: x)


def test_openrlhf_gets_a_mean_and_four_values() -> None:
    new, old, advantages, mask = batch()
    made = other_hosts.OpenRlhfLoss(clip_eps_low=0.2, clip_eps_high=0.28)
    loss, _, kl, _ = made(new, old, advantages, action_mask=mask)
    assert loss.item() == pytest.approx(losses().mean().item(), rel=1e-5)
    assert kl.item() == pytest.approx(-(CHANGE * LENGTHS).mean().item(), rel=1e-4)
    loss.backward()
    assert new.grad is not None
    assert torch.equal(new.grad != 0, mask)


def test_advantages_of_tokens_are_refused() -> None:
    new, old, advantages, mask = batch()
    advantages[0, 0] = 3.0
    with pytest.raises(InputError, match="advantages differ between tokens"):
        other_hosts.OpenRlhfLoss()(new, old, advantages, action_mask=mask)


def test_padded_and_packed_are_one_loss_and_a_split_group_is_an_error() -> None:
    new, old, _, mask = batch()
    common = {"rewards": SIGNAL, "log_z": CHANGE, "beta": 0.3, "denominator": 5.0}
    padded = loss_from_logprobs(new, mask=mask, old_logprobs=old, **common)
    cu_seqlens = torch.tensor([0, 3, 4, 8])
    packed = loss_from_logprobs(new[mask], cu_seqlens=cu_seqlens, old_logprobs=old[mask], **common)
    assert torch.equal(padded.loss, packed.loss)
    with pytest.raises(InputError, match="not both"):
        loss_from_logprobs(new, **common)
    with pytest.raises(InputError, match="group 'b' has 1 of 2 completions"):
        group_log_z(torch.zeros(3), ["a", "a", "b"], group_size=2)
    found = group_log_z(torch.tensor([1.0, 3.0, 8.0, 5.0]), [0, 1, 1, 0], scored=torch.tensor([1, 1, 0, 1]).bool())
    assert found.tolist() == [3.0, 3.0, 3.0, 3.0]


def test_as_many_sequences_as_tokens_are_not_taken_for_one_another() -> None:
    # Four tokens in four sequences, two of them empty: four sums would be read as the log-probs of four tokens.
    out = loss_from_logprobs(
        torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True),
        cu_seqlens=torch.tensor([0, 3, 4, 4, 4]),
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0]),
        log_z=torch.tensor([10.0, 8.0, 6.0, 20.0]),
        beta=0.05,
        denominator=1.0,
    )
    # The policy is its own reference: value - reward.
    assert out.residual.tolist() == pytest.approx([-0.5, 0.4, 0.3, 0.0], abs=1e-6)
    assert out.log_ratio.tolist() == [0.0] * 4
