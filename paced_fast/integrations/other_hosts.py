"""Trajectory balance for the loss interfaces of prime-rl, SkyRL, NeMo-RL, slime and OpenRLHF.

Written from the hosts' source; never run inside them. These hosts pass log-probs and advantages. With the old policy as
reference, the group's estimate of beta * log Z is its mean reward. An advantage of reward - group mean, *not* divided
by a standard deviation, is therefore all that the loss needs: u = beta * log ratio - advantage, and the loss is
w u^2 / (2 beta) per sequence. Each function needs this advantage on every token of a completion and refuses advantages
that differ between tokens. The numbers do not show a division by the standard deviation; it is refused where the host
passes its configuration. Signatures: prime-rl 559b447 (0.8) and a later loss.py, SkyRL a956457 (0.4),
ec60959 and 03d74ca, NeMo-RL 7ea279a, 8c6a8a8, 002cdc2 (loss interface) and 00925dd (advantages), slime 624b824 (0.3.1),
2fc4883 and 00c2d6d, OpenRLHF 3c3be62 (0.11.2) and 012aae8 (f5b3f08 is older, its loss returns three values, not four).
B = sequences, L = padded length, T = tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paced_fast.errors import InputError
from paced_fast.integrations.losses import Balance, loss_from_logprobs, one_a_row


def from_advantages(
    logprobs: Tensor,  # [B, L]
    old_logprobs: Tensor,  # [B, L]
    advantages: Tensor,  # [B, L]
    *,
    mask: Tensor,  # [B, L]
    beta: float,
    importance_cap: float,
    denominator: float | Tensor,
) -> Balance:
    """`loss_from_logprobs` from advantages that are each sequence's reward minus the mean of its group."""
    shown = mask.bool()
    row = one_a_row("advantages", advantages, shown, "reward minus group mean on every token")
    return loss_from_logprobs(
        logprobs,
        mask=shown,
        rewards=row,
        log_z=torch.zeros_like(row),
        beta=beta,
        denominator=denominator,
        old_logprobs=old_logprobs.detach(),
        weights=shown.any(1).float(),
        importance_cap=importance_cap,
    )


def prime_rl_loss(inputs: Any, beta: float = 0.05, importance_cap: float = 1.28) -> Any:
    """prime-rl's custom loss, called with one sequence at a time.

    ::

        [trainer.loss]
        type = "custom"
        import_path = "paced_fast.integrations.other_hosts.prime_rl_loss"
        [trainer.loss.kwargs]
        beta = 0.05
        [orchestrator.algo]
        type = "grpo"                        # reward minus group mean, not divided by a standard deviation
        loss_aggregation = "prompt"          # later versions; without it the divisor counts tokens

    A call sees one sequence, so log Z can only come from the advantage; a learned log Z is not possible here.
    prime-rl divides the sum of the losses by the sum of its token weights. That sum is the number of tokens, which
    scales the step, or with "prompt", where each token weighs 1 / (tokens of its group), the number of prompts. These
    weights only form the host's divisor; they are not part of the residual. Leave out `length_penalty` and
    `length_weighted_baseline`: both shift the mean. By default prime-rl drops groups that are all right or all wrong
    before the loss, so their residuals are missing once the policy has moved.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    if inputs.loss_weights is not None:
        one_a_row("loss_weights", inputs.loss_weights[None], inputs.loss_mask[None], "one weight per sequence")
    out = from_advantages(
        inputs.trainer_logprobs[None],
        inputs.inference_logprobs[None],
        inputs.advantages[None],
        mask=inputs.loss_mask[None],
        beta=beta,
        importance_cap=importance_cap,
        denominator=1.0,
    )
    return LossOutputs(loss=out.loss, metrics={"tb_residual": out.residual[0], "tb_log_ratio": out.log_ratio[0]})


def skyrl_policy_loss(
    *, sequences: int, beta: float = 0.05, importance_cap: float = 1.28
) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Return a policy loss for SkyRL's registry; register it in your entry point before the run starts.

    ::

        from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
        PolicyLossRegistry.register("paced_tb", skyrl_policy_loss(sequences=policy_mini_batch_size * samples))
        # trainer.algorithm.policy_loss_type=paced_tb trainer.algorithm.advantage_estimator=grpo
        # trainer.algorithm.grpo_norm_by_std=false trainer.algorithm.use_kl_loss=false
        # trainer.algorithm.loss_reduction=seq_mean_token_sum_norm trainer.algorithm.max_seq_len=4096
        # with samples = generator.n_samples_per_prompt

    SkyRL divides advantages before the loss, then sums over micro-batches and ranks. Only its reduction
    "seq_mean_token_sum_norm" divides every sequence by the same number, `sequences` * max_seq_len. This function undoes
    that division and takes the mean over the `sequences` of a mini-batch (prompts * samples). `sequences` must be
    exact, because it scales the advantage within the residual; step-wise training, where it varies, is not supported.
    """

    def paced_tb(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        del rollout_logprobs
        if config.loss_reduction != "seq_mean_token_sum_norm":
            raise InputError(
                f"trainer.algorithm.loss_reduction={config.loss_reduction} divides sequences by different numbers: "
                "set seq_mean_token_sum_norm"
            )
        _check_skyrl(config)
        mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        out = from_advantages(
            log_probs,
            old_log_probs,
            advantages * (sequences * config.max_seq_len),
            mask=mask,
            beta=beta,
            importance_cap=importance_cap,
            denominator=float(sequences),
        )
        return out.loss, {"clip_ratio": 0.0, "tb_residual": out.residual.square().mean().sqrt().item()}

    return paced_tb


def _check_skyrl(config: Any) -> None:
    for name in ("grpo_norm_by_std", "advantage_batch_normalize", "use_kl_loss", "use_entropy_loss", "use_tis"):
        if getattr(config, name, False):
            raise InputError(
                "policy_loss_type=paced_tb takes raw rewards and no further loss terms: set "
                f"trainer.algorithm.{name}=false"
            )
    if getattr(config, "advantage_estimator", "grpo") != "grpo":
        raise InputError(
            f"trainer.algorithm.advantage_estimator={config.advantage_estimator} is not reward minus the group's mean: "
            "set grpo"
        )
    correction = getattr(config, "off_policy_correction", None)
    for name in ("tis_ratio_type", "sequence_mask_metric"):
        if getattr(correction, name, None) is not None:
            raise InputError(
                f"trainer.algorithm.off_policy_correction.{name} is not supported by policy_loss_type=paced_tb: set "
                "null"
            )


class NemoRlLoss:
    """Loss function for NeMo-RL; pass it to the policy's `train` instead of ClippedPGLossFn.

    ::

        loss_fn = NemoRlLoss(beta=0.05)
        # grpo.adv_estimator.name=grpo grpo.adv_estimator.normalize_rewards=false
        # grpo.adv_estimator.use_leave_one_out_baseline=false (older: grpo.normalize_rewards=false ...)
        # loss_fn.reference_policy_kl_penalty=0 loss_fn.force_on_policy_ratio=false
        policy.train(data, loss_fn)

    Both estimator options default to true in NeMo-RL and must be false: with a leave-one-out baseline the advantage is
    G / (G - 1) times this one (G = group size), which does not match log Z. The sum is divided by the number of
    sequences in the global batch, which NeMo-RL passes.
    """

    def __init__(self, beta: float = 0.05, importance_cap: float = 1.28) -> None:
        from nemo_rl.algorithms.loss import interfaces

        self.loss_type = interfaces.LossType.SEQUENCE_LEVEL
        self.input_type = interfaces.LossInputType.LOGPROB
        kinds = getattr(interfaces, "MetricNormalizer", None)  # later versions undo the division of each metric
        if kinds is not None:
            self.metric_normalizations = {"loss": kinds.SEQUENCES, "num_valid_samples": kinds.NONE}
        self.beta, self.importance_cap = beta, importance_cap

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the micro-batch sum / sequences in the global batch, and metrics; column t predicts token t + 1."""
        del global_valid_toks
        if "prev_logprobs" not in data:
            raise InputError("this batch has no prev_logprobs: set loss_fn.force_on_policy_ratio=false")
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        out = from_advantages(
            next_token_logprobs,
            data["prev_logprobs"][:, 1:],
            data["advantages"][:, 1:],
            mask=mask,
            beta=self.beta,
            importance_cap=self.importance_cap,
            denominator=global_valid_seqs,
        )
        return out.loss, {"loss": out.loss.item(), "num_valid_samples": data["sample_mask"].sum().item()}


def slime_loss(
    args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Custom loss for slime.

    ::

        --loss-type custom_loss
        --custom-loss-function-path paced_fast.integrations.other_hosts.slime_loss
        --advantage-estimator grpo --disable-grpo-std-normalization
        --kl-coef 0 --entropy-coef 0

    slime divides by the global batch itself, so this loss is a sum over sequences. beta is 0.05; the importance cap is
    1 + `args.eps_clip_high`. Context parallelism is refused, because a rank would hold only part of a sequence. The old
    policy is the same as in slime's own loss: the rollout policy with --use-rollout-logprobs, otherwise the trainer's.
    If slime skips that pass because the policy is unchanged, it is the policy in training.
    """
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy

    del sum_of_sample_mean
    _check_slime(args)
    padded = {"max_seq_lens": batch.get("max_seq_lens")}  # older versions only; 00c2d6d has no such parameter
    known = inspect.signature(get_log_probs_and_entropy).parameters
    found = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
        **{name: value for name, value in padded.items() if name in known},
    )
    found = found[1] if isinstance(found, tuple) else found  # before 0.3 only the dictionary was returned
    own = list(found["log_probs"])
    old = batch["rollout_log_probs"] if getattr(args, "use_rollout_logprobs", False) else batch.get("log_probs")
    pad = nn.utils.rnn.pad_sequence
    out = from_advantages(
        pad(own, batch_first=True),
        pad([row.detach() for row in old or own], batch_first=True),
        pad(list(batch["advantages"]), batch_first=True),
        mask=pad(list(batch["loss_masks"]), batch_first=True),
        beta=0.05,
        importance_cap=1.0 + args.eps_clip_high,
        denominator=1.0,
    )
    return out.loss, {"tb_residual": out.residual.abs().sum(), "tb_log_ratio": out.log_ratio.sum()}


def _check_slime(args: Any) -> None:
    for name, right, remedy in (
        ("context_parallel_size", 1, "needs whole sequences on each rank: set --context-parallel-size 1"),
        ("calculate_per_token_loss", False, "is a sum over sequences: leave --calculate-per-token-loss out"),
        ("rewards_normalization", True, "needs reward minus group mean: leave --disable-rewards-normalization out"),
        ("grpo_std_normalization", False, "needs rewards that are not scaled: set --disable-grpo-std-normalization"),
        ("normalize_advantages", False, "needs rewards that are not scaled: leave --normalize-advantages out"),
        ("rollout_top_p", 1.0, "scores the whole vocabulary: leave --rollout-top-p at 1"),
    ):
        if getattr(args, name, right) != right:
            raise InputError(f"slime_loss {remedy}")


class OpenRlhfLoss(nn.Module):
    """Replacement for OpenRLHF's PolicyLoss; OpenRLHF has no registry of losses.

    ::

        import openrlhf.trainer.ray.ppo_actor as ppo_actor
        ppo_actor.PolicyLoss = OpenRlhfLoss        # before the trainer is built, in every actor
        # --algo.advantage.estimator dr_grpo --rollout.n_samples_per_prompt 8 --algo.kl.init_coef 0
        # (versions without dotted flags: --advantage_estimator dr_grpo --n_samples_per_prompt 8 --init_kl_coef 0)

    OpenRLHF averages over the micro-batches of a step, so this loss is a mean over the sequences of a micro-batch.
    """

    def __init__(self, beta: float = 0.05, importance_cap: float = 1.28, **settings: Any) -> None:
        super().__init__()
        for name, value in settings.items():  # the host's settings; clipping has no counterpart here and no effect
            if (name in ("policy_loss_type", "loss_mode") and value not in (None, "ppo")) or (
                "is_correction" in name and value
            ):
                raise InputError(f"{name}={value!r} belongs to the loss that OpenRlhfLoss replaces: leave it out")
        self.beta, self.importance_cap = beta, importance_cap

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        del rollout_log_probs
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        out = from_advantages(
            log_probs,
            old_log_probs,
            advantages,
            mask=mask,
            beta=self.beta,
            importance_cap=self.importance_cap,
            denominator=float(len(log_probs)),
        )
        return out.loss, torch.zeros_like(out.loss), -out.log_ratio.mean(), None
