"""Every arm against the formula of its paper: settings of the arm, numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import tiny_policy
import torch
from torch import Tensor

from benchmarks.training.efficiency import arms, goals, suites
from paced_fast.config import Config, LogZConfig
from paced_fast.config.paced import RULES
from paced_fast.data.records import Fresh, Group, Targets, UpdateResult
from paced_fast.paced.log_z import LogZ
from paced_fast.paced.losses import POLICY_LOSSES, grpo
from paced_fast.paced.scheduler import PromptScheduler
from paced_fast.paced.targets import REGRESSIONS

TINY = suites.find("tiny")
CPU = torch.device("cpu")
REWARDS = (1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)
"""Two groups of four: means 1/2 and 3/4."""


def settings(arm: str) -> Config:
    """Settings of an arm, for groups of four."""
    config = arms.arm_config(TINY, arm, rate=1e-4, seed=3)
    return dataclasses.replace(
        config, generation=dataclasses.replace(config.generation, group_size=4, prompts_per_step=2)
    )


def batch() -> tuple[Any, Fresh]:
    rollouts = tiny_policy.rollouts((3, 1, 2, 4, 2, 2, 3, 1), group_size=4, rewards=REWARDS)
    fresh = Fresh(
        rollouts=rollouts,
        groups=[],
        dropped=[],
        prompt_index=torch.tensor([0, 1]),
        accuracy=torch.tensor([0.5, 0.75]),
        scored=torch.ones(8, dtype=torch.bool),
    )
    return rollouts, fresh


def head_target(config: Config, log_ratio: Tensor, **targets: Any) -> Tensor:
    rollouts, _ = batch()
    update = UpdateResult(*([torch.zeros(())] * 2), log_ratio, torch.ones(8), *([torch.zeros(())] * 2))
    target, _ = REGRESSIONS[config.algorithm].head_target(config, rollouts, targets.get("targets"), update)  # type: ignore[arg-type]
    return target


def test_arms_differ_from_the_base_only_in_what_they_say() -> None:
    base = arms.arm_config(TINY, "grpo", rate=1e-4, seed=3)
    assert (base.algorithm, base.scheduler.rule, base.seed, base.warm_start.seed) == ("grpo", "uniform", 3, 3)
    for name in arms.ARMS:
        config = arms.arm_config(TINY, name, rate=1e-4, seed=3)
        assert config.optimizer == base.optimizer
        assert (config.warm_start, config.data) == (base.warm_start, base.data)
        groups = {"group_size": arms.ARMS[name].group_size, "prompts_per_step": 128 // arms.ARMS[name].group_size}
        assert config.generation == dataclasses.replace(base.generation, **groups), "as many rollouts a step"
        assert (config.steps, config.evaluation) == (150, base.evaluation)
    changed = arms.changed_settings(TINY, arms.arm_config(TINY, "pcl", rate=1e-4, seed=3))
    assert changed.items() >= {**arms.ARMS["pcl"].changes, "optimizer.learning_rate": 1e-4}.items() - {
        ("scheduler.tau", 0.5),  # as in the preset
        ("scheduler.rule", "greedy"),
        ("log_z.loss", "tb"),
    }
    # What follows from them is written down too, and nothing that belongs to the seed or to a folder.
    assert changed["loss.intercept"] == "group_mean"
    paper = arms.changed_settings(TINY, arms.arm_config(TINY, "paced_paper", rate=1e-4, seed=3))
    assert paper["replay.mode"] == "on"
    assert {name.partition(".")[0] for name in changed} == {
        *("algorithm", "optimizer", "loss", "log_z", "scheduler", "generation"),
    }


def test_grpo_normalises_within_the_group() -> None:
    """Group 1: deviations +-1/2, their root mean square over 3 is sqrt(1/3); group 2: +1/4 and -3/4, sqrt(1/4)."""
    config = settings("grpo")
    rollouts, fresh = batch()
    advantage = REGRESSIONS["grpo"].signal(config, rollouts, fresh)
    a, b, c = 0.5 * math.sqrt(3), 0.25 / 0.5, -0.75 / 0.5
    assert advantage.tolist() == pytest.approx([a, -a, -a, a, b, b, b, c], rel=1e-5)
    for name in ("grpo", "dynamic", "history", "mopps", "pcl"):
        assert POLICY_LOSSES[settings(name).algorithm] is grpo, "the peers differ in their prompts alone"


def test_dynamic_sampling_takes_mixed_groups_alone() -> None:
    config = settings("dynamic")
    assert RULES[config.scheduler.rule].mixed_groups_only
    groups = [Group(0, [], [1.0, 0.0], []), Group(0, [], [1.0, 1.0], []), Group(0, [], [0.0, 0.0], [])]
    assert [group.is_mixed for group in groups] == [True, False, False]


def test_history_draws_in_proportion_to_the_last_variance() -> None:
    """Accuracies 0, 1/4, 1/2, 1, unseen: p (1 - p) is 0, 3/16, 1/4, 0, 1/4, up to a factor of 4."""
    config = settings("history").scheduler
    chooser = PromptScheduler(5, config, seed=0, device=CPU)
    chooser.observe(torch.arange(4), torch.tensor([0.0, 0.25, 0.5, 1.0]))
    chooser.draw(2, config.warmup_steps + 1, None)
    weights = chooser.tree.get(torch.arange(5)).double() / 2**27
    assert weights.tolist() == pytest.approx([0.0, 0.75, 1.0, 0.0, 1.0], abs=1e-7)


def test_mopps_has_the_papers_numbers() -> None:
    config = settings("mopps").scheduler
    assert (config.rule, config.pool_factor, config.tau) == ("mopps", 16, 0.5)
    chooser = PromptScheduler(2, config, seed=0, device=CPU)
    chooser.observe(torch.tensor([1]), torch.tensor([0.75]), torch.tensor([4]))
    assert chooser.posterior is not None
    # lambda 1 + (1 - lambda) 1 + 3 and + 1
    assert (float(chooser.posterior.alpha[1]), float(chooser.posterior.beta[1])) == (4.0, 2.0)


def test_pcl_fits_its_value_to_group_means_and_takes_the_nearest_to_one_half_of_four_batches() -> None:
    """The gradient of the mean over completions of (v - r)^2 is that of the mean over groups of (v - mean)^2."""
    config = settings("pcl")
    target = head_target(config, log_ratio=torch.linspace(-3, 3, 8))
    assert target.tolist() == pytest.approx(list(REWARDS), abs=1e-5)
    head = LogZ(torch.randn(2, 4), config.log_z, seed=0, bounded=True)
    index = torch.tensor([0] * 4 + [1] * 4)
    values = torch.sigmoid(head._logits(head.inputs))
    by_completion = (values[index] - target).square().mean()
    by_group = (values - torch.tensor([0.5, 0.75])).square().mean()
    parameters = list(head.mlp.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (by_completion, by_group))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    head.config = dataclasses.replace(head.config, updates_per_step=1)
    loss, _ = head.fit(index, target)
    # What the head minimises is that loss: over both groups, plus the variance within, which is 1/4 and 3/16.
    assert float(loss) == pytest.approx(float(by_group.detach()) + (1 / 4 + 3 / 16) / 2, rel=1e-4)

    chooser = PromptScheduler(100, config.scheduler, seed=0, device=CPU)
    values = torch.linspace(0, 1, 100)
    for step in range(6, 30):
        chosen = chooser.draw(5, step, values)
        pool = chooser._uniform(20, torch.tensor(step), 0, None)
        nearest = pool[(values[pool] - 0.5).abs().argsort(stable=True)[:5]]
        assert chosen.tolist() == nearest.tolist()


def test_gflowrl_takes_the_group_mean_for_log_z() -> None:
    config = settings("gflowrl")
    rollouts, fresh = batch()
    regression = REGRESSIONS[config.algorithm]
    intercept = regression.intercept(config, rollouts, fresh, None)
    assert intercept.tolist() == [0.5] * 4 + [0.75] * 4
    assert regression.signal(config, rollouts, fresh).tolist() == list(REWARDS)
    assert (config.scheduler.rule, config.replay.mode, config.uses_head) == ("uniform", "off", False)


def test_flowrl_scales_the_normalised_reward_and_keeps_the_initial_policy() -> None:
    config = settings("flowrl")
    rollouts, fresh = batch()
    signal = REGRESSIONS["flowrl"].signal(config, rollouts, fresh)
    assert float(signal[0]) == pytest.approx(15 * 0.5 * math.sqrt(3), rel=1e-5)
    assert config.traits.keeps_initial_policy
    # Sequence 0 has 3 tokens; its reference is 0.2 nats a token below, and the policy moved by 0.3 nats in all.
    drift = torch.zeros(rollouts.num_tokens)
    drift[:3] = 0.2
    targets = Targets(
        signal=signal,
        intercept=torch.zeros(8),
        old_logprobs=drift,
        ref_logprobs=torch.zeros_like(drift),
        weights=torch.ones(8),
    )
    target = head_target(config, torch.tensor([0.3] + [0.0] * 7), targets=targets)
    assert float(target[0]) == pytest.approx(float(signal[0]) - (3 * 0.2 + 0.3) / 3, rel=1e-5)


def test_the_papers_pair_is_the_balance_residual_and_the_nearest_of_a_pool() -> None:
    config = settings("paced_paper")
    assert (config.scheduler.rule, config.scheduler.exploration, config.replay.mode) == ("greedy", 0.0, "on")
    log_ratio = torch.tensor([0.4] + [0.0] * 7)
    # beta (log Z + s - s_old) = r: log Z's value at which the residual vanishes is 1 - .05 * .4.
    assert float(head_target(config, log_ratio)[0]) == pytest.approx(1 - 0.05 * 0.4)
    values = torch.tensor([0.3, 0.9])
    rollouts, fresh = batch()
    intercept = REGRESSIONS["paced"].intercept(config, rollouts, fresh, values)
    assert intercept.tolist() == pytest.approx([0.3] * 4 + [0.9] * 4)


def test_every_setting_of_the_head_is_weighed_for_the_arms_that_have_the_papers() -> None:
    """A new setting of log Z changes what `pcl` and `paced_paper` run, unless it belongs to the memory."""
    of_memory = {"past_groups", "past_per_fresh", "prior", "decay"}
    same = {"learning_rate", "hidden_size", "max_grad_norm", "updates_per_step", "cache_dtype", "scored_per_step"}
    wanted = {"loss": "tb", "memory": "off", "embedding": "mean"}
    assert {field.name for field in dataclasses.fields(LogZConfig)} == of_memory | same | set(wanted)
    for name in ("pcl", "paced_paper"):
        found = dataclasses.asdict(arms.arm_config(TINY, name, rate=1e-4, seed=3).log_z)
        assert {key: found[key] for key in wanted} == wanted


def test_selection_and_replay_are_the_halves_of_paced() -> None:
    whole, selection, replay = (settings(name) for name in ("paced", "selection", "replay"))
    assert dataclasses.replace(selection, replay=whole.replay) == whole
    assert dataclasses.replace(replay, scheduler=whole.scheduler, replay=whole.replay) == whole
    assert (selection.replay.mode, replay.replay.mode, replay.scheduler.rule) == ("off", "on", "uniform")


def test_the_method_is_the_presets_default_and_both_sizes_of_groups_are_compared() -> None:
    for suite in (TINY, suites.find("small"), suites.find("smollm2")):
        default, arm = suite.config(), arms.arm_config(suite, "groups_of_4", rate=1e-4, seed=0)
        method = arms.arm_config(suite, goals.METHOD, rate=1e-4, seed=0)
        assert (method.algorithm, method.generation) == (default.algorithm, default.generation)
        wider = arms.arm_config(suite, "selection", rate=1e-4, seed=0)
        assert (arm.generation.group_size, wider.generation.group_size) == (4, 8)
        assert dataclasses.replace(wider, generation=arm.generation) == arm
        assert wider.rollouts_per_step == arm.rollouts_per_step
    toy = arms.arm_config(suites.find("tiny-quick"), "grpo", rate=1e-4, seed=0)
    assert (toy.generation.group_size, toy.generation.prompts_per_step) == (4, 2), "a prompt for each minibatch"


def test_the_oracle_is_drawn_by_the_tree_without_replay() -> None:
    config = settings("oracle")
    assert (config.scheduler.rule, config.replay.mode) == ("tree", "off")
    assert [name for name, arm in arms.ARMS.items() if arm.by_oracle] == ["oracle"]
    assert "not counted" in arms.ARMS["oracle"].words
