"""The figures of a step: tensors on the device, brought to the host in one copy, made into a record.

P = prompts drawn, B = sequences trained on, N = prompts in the table, C = slots of the replay ring.
"""

from __future__ import annotations

from typing import Any

import torch

from paced_fast.data import packing
from paced_fast.data.records import StepResult
from paced_fast.data.step_record import ABSENT, StepRecord
from paced_fast.data.transfer import to_host
from paced_fast.evaluation import calibration
from paced_fast.generation.mismatch import mismatch_metrics
from paced_fast.paced.replay import ReplayBuffer

_BINS = 20


def fetch(result: StepResult, replay: ReplayBuffer | None, *, mismatch_cap: float) -> dict[str, Any]:
    """Compute every figure of the step and bring them to the host in one copy; ratios outside [1 / cap, cap] count as
    mismatched."""
    fresh, update = result.fresh, result.update
    sampled = fresh.rollouts.generator_logprobs
    measured = [i for i in range(fresh.rollouts.num_sequences) if i not in result.targets.from_generator]
    part = packing.part(fresh.rollouts, measured)
    own, theirs = result.targets.old_logprobs[part.tokens], part.rollouts.generator_logprobs
    mismatch = mismatch_metrics(theirs, own, part.rollouts.cu_seqlens, cap=mismatch_cap)
    log_ratio, weight = update.log_ratio[: fresh.rollouts.num_sequences], update.weight
    tensors = {
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "learning_rate": result.learning_rate,
        "taken": update.taken,
        "skipped": update.skipped,
        "prompts_visited_share": (result.visits > 0).float().mean(),
        "log_ratio_mean": log_ratio.mean(),
        "kl": (log_ratio.exp() - 1 - log_ratio).mean(),
        "effective_sample_share": weight.sum().square() / weight.square().sum().clamp(min=1e-30) / len(weight),
    }
    tensors |= {f"generator_mismatch_{name}": value for name, value in mismatch.items()}
    if fresh.rollouts.num_tokens:
        tensors["entropy"] = -sampled.mean()
    if result.head is not None:
        tensors["head_loss"], tensors["head_grad_norm"] = result.head
    if result.values is not None:
        values = result.values
        tensors["values_mean"] = values.mean()
        tensors["values_fresh"] = values[fresh.prompt_index]
        bins = (values * _BINS).nan_to_num().long().clamp(0, _BINS - 1)
        tensors["values_histogram"] = torch.zeros(_BINS, device=values.device).index_add_(
            0, bins, torch.ones_like(values)
        )
        if replay is not None:
            tensors["replay_version"] = replay.policy_version
            tensors["replay_priority"] = replay.priorities(values)
    if result.replayed is not None:
        replayed = result.replayed
        tensors["replayed_ids"] = replayed.token_ids[: replayed.lengths[0]]
        tensors["replayed_logprobs"] = replayed.generator_logprobs[: replayed.lengths[0]]
        tensors["replayed_version"] = replayed.policy_version[0]
        tensors["replayed_reward"] = replayed.rewards[0]
        tensors["replayed_prompt"] = replayed.prompt_index[0]
        if result.values is not None:
            tensors["replayed_value"] = result.values[replayed.prompt_index[:1]][0]
    return to_host(tensors)


def step_record(
    result: StepResult,
    host: dict[str, Any],
    *,
    step: int,
    rollouts: int,
    train_seconds: float,
    skipped_steps: int,
    seconds: dict[str, float],
    memory: dict[str, int],
    verdicts: dict[str, dict[str, int]],
    with_value: bool,
) -> StepRecord:
    """The record of a step, without what an engine adds.

    `host` is what `fetch` returned, `with_value` whether the value is an accuracy, and the other numbers are those of
    the fields of the same name.
    """
    return StepRecord(
        step=step,
        rollouts=rollouts,
        train_seconds=train_seconds,
        skipped_steps=skipped_steps,
        verdicts=verdicts,
        seconds=seconds,
        memory=memory,
        tokens_per_second=result.fresh.num_tokens / sum(seconds.values()),
        **{name: host[name] for name in _AS_FETCHED},
        **_sample_figures(result),
        **({name: host[name] for name in ("head_loss", "head_grad_norm")} if result.head is not None else {}),
        **(_value_figures(result, host, step) if with_value and result.values is not None else {}),
        entropy=host.get("entropy"),
    )


_AS_FETCHED = (
    *("loss", "grad_norm", "learning_rate", "prompts_visited_share"),
    *("log_ratio_mean", "kl", "effective_sample_share"),
    *(f"generator_mismatch_{name}" for name in ("mean", "max", "token_ratio", "sequence_ratio", "outside_share")),
)


def _sample_figures(result: StepResult) -> dict[str, Any]:
    """Figures of the completions and their rewards, all from the host."""
    fresh = result.fresh
    completions = [completion for group in fresh.groups for completion in group.completions]
    rewards = [reward for group in fresh.groups for reward in group.scored]
    shaping = [value for group in fresh.groups for value in group.shaping]
    sampled = [group.accuracy for group in (*fresh.groups, *fresh.dropped) if group.accuracy is not None]
    return {
        "reward_mean": sum(rewards) / len(rewards),
        "unscored_share": 1 - len(rewards) / len(completions),
        "unknown_ids": sum(not completion.token_ids for completion in completions),
        "mixed_group_share": calibration.mixed_group_share(sampled),
        "trained_sequences": result.rollouts.num_sequences,
        "mean_length": fresh.rollouts.num_tokens / max(1, fresh.rollouts.num_sequences),
        "truncated_share": sum(not completion.stopped for completion in completions) / len(completions),
        "shaping_mean": sum(shaping) / len(shaping) if shaping else ABSENT,
    }


def _value_figures(result: StepResult, host: dict[str, Any], step: int) -> dict[str, Any]:
    """Errors of the value as a forecast of this step's groups, made before it was trained on them; state of the replay
    ring."""
    pairs = zip(host["values_fresh"], result.fresh.groups, strict=True)
    known = [(value, group.accuracy) for value, group in pairs if group.accuracy is not None]
    predicted, accuracy = [value for value, _ in known], [measured for _, measured in known]
    figures: dict[str, Any] = {
        "value_mean": host["values_mean"],
        "value_brier": calibration.brier_score(predicted, accuracy),
        "value_ece": calibration.expected_calibration_error(predicted, accuracy),
        "value_rank_correlation": calibration.rank_correlation(predicted, accuracy),
        "value_fresh": predicted,
        "accuracy_fresh": accuracy,
        "value_histogram": host["values_histogram"],
    }
    if "replay_version" in host:
        ages = [step - version for version in host["replay_version"] if version >= 0]
        held = zip(host["replay_version"], host["replay_priority"], strict=True)
        figures |= {
            "replay_size": len(ages),
            "replay_age_mean": sum(ages) / len(ages) if ages else None,
            "replay_ages": ages,
            "replay_priorities": [priority for version, priority in held if version >= 0],
        }
    return figures
