"""The adapters of hosts that are not installed, called with the arguments that were read in their sources."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

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


class LossInputs(NamedTuple):
    """prime-rl's dataclass in src/prime_rl/trainer/rl/loss.py; the last three have defaults there too."""

    trainer_logprobs: Tensor  # [seq]
    inference_logprobs: Tensor  # [seq]
    ref_logprobs: Tensor | None
    advantages: Tensor  # [seq]
    loss_mask: Tensor  # bool[seq]
    loss_weights: Tensor | None = None  # [seq]
    trainer_mask_logprobs: Tensor | None = None
    inference_mask_logprobs: Tensor | None = None


def prime_rl(function: Callable[..., Any], inputs: LossInputs, kwargs: dict[str, Any]) -> Any:
    """CustomLoss.loss of the same file."""
    return function(inputs, **kwargs)


@pytest.mark.parametrize("is_weighted", [False, True])  # loss_aggregation = "prompt": 1 / (tokens of the group)
def test_prime_rl_gets_one_sequence_at_a_time(monkeypatch: pytest.MonkeyPatch, is_weighted: bool) -> None:
    host(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=types.SimpleNamespace)
    new, old, advantages, mask = batch()
    for i in range(3):
        weights = mask[i] / 8.0 if is_weighted else None
        inputs = LossInputs(new[i], old[i], None, advantages[i], mask[i], weights)
        out = prime_rl(other_hosts.prime_rl_loss, inputs, {"beta": BETA})
        assert out.loss.item() == pytest.approx(losses()[i].item(), rel=1e-5)
    inputs = LossInputs(new[0], old[0], None, advantages[0], mask[0], torch.arange(4.0))
    with pytest.raises(InputError, match="loss_weights differ between tokens"):
        prime_rl(other_hosts.prime_rl_loss, inputs, {})


class AlgorithmConfig(NamedTuple):
    """What is read of SkyRL's AlgorithmConfig (skyrl/train/config/config.py), with its defaults."""

    loss_reduction: str = "token_mean"
    max_seq_len: int | None = None
    grpo_norm_by_std: bool = True
    advantage_batch_normalize: bool = False
    use_kl_loss: bool = True
    use_entropy_loss: bool = False
    advantage_estimator: str = "grpo"
    off_policy_correction: Any = None


def skyrl(function: Callable[..., Any], config: AlgorithmConfig, rows: slice, sequences: int = 3) -> Any:
    """A micro-batch of SkyRL 03d74ca: advantages divided by `apply_loss_reduction_to_advantages_minibatch`, then
    three positional and three keyword arguments, as in `_forward_backward_micro` of workers/worker.py.
    """
    new, old, advantages, mask = batch()
    scaled = advantages / (sequences * (config.max_seq_len or 1))
    return function(
        new[rows], old[rows], scaled[rows], config=config, loss_mask=mask[rows].float(), rollout_logprobs=None
    )


def test_skyrl_undoes_its_division_and_sums_to_a_mean() -> None:
    function = other_hosts.skyrl_policy_loss(sequences=3)
    config = AlgorithmConfig("seq_mean_token_sum_norm", 50, False, False, False)
    parts = [skyrl(function, config, rows) for rows in (slice(0, 2), slice(2, 3))]
    assert sum(part[0].item() for part in parts) == pytest.approx(losses().mean().item(), rel=1e-5)
    assert parts[0][1]["clip_ratio"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_reduction": "sequence_mean"}, "loss_reduction=sequence_mean divides sequences by different numbers"),
        ({"grpo_norm_by_std": True}, "grpo_norm_by_std=false"),
        ({"advantage_batch_normalize": True}, "advantage_batch_normalize=false"),
        ({"use_kl_loss": True}, "use_kl_loss=false"),
        ({"use_entropy_loss": True}, "use_entropy_loss=false"),
        ({"advantage_estimator": "rloo"}, "advantage_estimator=rloo is not reward minus the group's mean"),
        ({"off_policy_correction": types.SimpleNamespace(tis_ratio_type="token")}, "tis_ratio_type is not supported"),
    ],
)
def test_skyrl_refuses_what_its_configuration_does_to_advantages(change: dict[str, Any], message: str) -> None:
    config = AlgorithmConfig("seq_mean_token_sum_norm", 50, False, False, False)._replace(**change)
    with pytest.raises(InputError, match=message):
        skyrl(other_hosts.skyrl_policy_loss(sequences=3), config, slice(0, 3))


def test_nemo_rl_divides_by_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = types.SimpleNamespace(SEQUENCE_LEVEL="sequence", LOGPROB="logprob", SEQUENCES="sequences", NONE="none")
    host(monkeypatch, "nemo_rl.algorithms.loss.interfaces", LossType=kinds, LossInputType=kinds)
    sys.modules["nemo_rl.algorithms.loss"].interfaces = sys.modules["nemo_rl.algorithms.loss.interfaces"]  # pyright: ignore
    assert not hasattr(other_hosts.NemoRlLoss(), "metric_normalizations")  # 7ea279a has no MetricNormalizer
    sys.modules["nemo_rl.algorithms.loss.interfaces"].MetricNormalizer = kinds  # pyright: ignore
    assert other_hosts.NemoRlLoss().metric_normalizations == {"loss": "sequences", "num_valid_samples": "none"}
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


def ragged(values: Tensor) -> list[Tensor]:
    return [row[:n] for row, n in zip(values, LENGTHS.tolist(), strict=True)]


def slime_batch(old: Tensor | None, advantages: Tensor, mask: Tensor) -> dict[str, Any]:
    found = {"unconcat_tokens": [], "total_lengths": [], "response_lengths": LENGTHS.tolist()}
    found |= {"max_seq_lens": [4, 4, 4]}  # what slime hands on for padded layouts
    found |= {"advantages": ragged(advantages), "loss_masks": ragged(mask.float())}
    return found if old is None else found | {"log_probs": ragged(old)}


@pytest.mark.parametrize("version", ["2fc4883", "624b824", "00c2d6d"])
def test_slime_gets_a_sum_over_ragged_sequences(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    new, old, advantages, mask = batch()
    own = {"log_probs": ragged(new)}

    def log_probs(
        logits: Tensor,
        *,
        args: Any,
        unconcat_tokens: list[Tensor],
        total_lengths: list[int],
        response_lengths: list[int],
        with_entropy: bool = False,
        non_loss_data: bool = True,
        max_seq_lens: list[int] | None = None,
    ) -> Any:
        assert max_seq_lens == [4, 4, 4]
        return own if version == "2fc4883" else (None, own)

    def newest(
        logits: Tensor,
        *,
        args: Any,
        unconcat_tokens: list[Tensor],
        total_lengths: list[int],
        response_lengths: list[int],
        with_entropy: bool = False,
        non_loss_data: bool = True,
        top_p_token_ids: list[list[int]] | None = None,
        top_p_token_offsets: list[list[int]] | None = None,
    ) -> Any:
        return torch.empty(0), own

    name = "slime.backends.megatron_utils.loss"
    host(monkeypatch, name, get_log_probs_and_entropy=newest if version == "00c2d6d" else log_probs)
    args = types.SimpleNamespace(eps_clip_high=0.28)
    loss, _ = other_hosts.slime_loss(args, slime_batch(old, advantages, mask), torch.zeros(1), lambda x: x)
    assert loss.item() == pytest.approx(losses().sum().item(), rel=1e-5)


def test_slime_takes_the_old_policy_that_its_own_loss_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old, advantages, mask = batch()
    name = "slime.backends.megatron_utils.loss"
    host(monkeypatch, name, get_log_probs_and_entropy=lambda *_, **__: (None, {"log_probs": ragged(new)}))
    args = types.SimpleNamespace(eps_clip_high=0.28, use_rollout_logprobs=True)
    given = slime_batch(new.detach(), advantages, mask) | {"rollout_log_probs": ragged(old)}
    loss, _ = other_hosts.slime_loss(args, given, torch.zeros(1), lambda x: x)
    assert loss.item() == pytest.approx(losses().sum().item(), rel=1e-5)
    # slime leaves the pass out where the policy that samples is the one that learns: no ratio, yet a gradient.
    args.use_rollout_logprobs = False
    loss, _ = other_hosts.slime_loss(args, slime_batch(None, advantages, mask), torch.zeros(1), lambda x: x)
    assert loss.item() == pytest.approx((SIGNAL.square() / (2 * BETA)).sum().item(), rel=1e-5)
    loss.backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -SIGNAL[:, None] * mask)


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ({"context_parallel_size": 2}, "--context-parallel-size 1"),
        ({"calculate_per_token_loss": True}, "leave --calculate-per-token-loss out"),
        ({"rewards_normalization": False}, "leave --disable-rewards-normalization out"),
        ({"grpo_std_normalization": True}, "--disable-grpo-std-normalization"),
        ({"normalize_advantages": True}, "leave --normalize-advantages out"),
        ({"rollout_top_p": 0.9}, "leave --rollout-top-p at 1"),
    ],
)
def test_slime_without_raw_whole_sequences_is_refused(
    monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any], remedy: str
) -> None:
    host(monkeypatch, "slime.backends.megatron_utils.loss", get_log_probs_and_entropy=None)
    _, old, advantages, mask = batch()
    args = types.SimpleNamespace(eps_clip_high=0.28, **setting)
    with pytest.raises(InputError, match=remedy):
        other_hosts.slime_loss(args, slime_batch(old, advantages, mask), torch.zeros(1), lambda x: x)


def test_openrlhf_gets_a_mean_and_four_values() -> None:
    new, old, advantages, mask = batch()
    made = other_hosts.OpenRlhfLoss(clip_eps_low=0.2, clip_eps_high=0.28)
    loss, _, kl, _ = made(new, old, advantages, action_mask=mask)
    assert loss.item() == pytest.approx(losses().mean().item(), rel=1e-5)
    assert kl.item() == pytest.approx(-(CHANGE * LENGTHS).mean().item(), rel=1e-4)
    loss.backward()
    assert new.grad is not None
    assert torch.equal(new.grad != 0, mask)


@pytest.mark.parametrize("setting", [{"policy_loss_type": "gspo"}, {"enable_vllm_is_correction": True}])
def test_openrlhf_is_not_asked_for_another_loss(setting: dict[str, Any]) -> None:
    other_hosts.OpenRlhfLoss(clip_eps_low=0.2, policy_loss_type="ppo", enable_vllm_is_correction=False)
    with pytest.raises(InputError, match="belongs to the loss that OpenRlhfLoss replaces"):
        other_hosts.OpenRlhfLoss(**setting)


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
    with pytest.raises(InputError, match="give either mask"):
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
