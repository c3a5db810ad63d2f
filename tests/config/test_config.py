"""Settings: every number is bounded, conflicts are named, and what each algorithm's name stands for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny_policy

from paced_fast.config import Algorithm, Config, GeneratorName, Rule, digest, flatten, stream_seed
from paced_fast.config.bounds import settings
from paced_fast.config.paced import ALGORITHMS, RULES
from paced_fast.config.presets import preset
from paced_fast.config.resolve import resolve
from paced_fast.config.saved import config_from_dict
from paced_fast.errors import InputError
from paced_fast.paced.losses import POLICY_LOSSES
from paced_fast.paced.scheduler import DRAWS
from paced_fast.paced.targets import REGRESSIONS
from paced_fast.run.start.generator import GENERATORS

NUMBERS = [name for name, value in flatten(Config()).items() if type(value) in (int, float)]
"""Dotted names of all settings that are numbers."""
BOUNDS = {name: setting.bounds for name, setting in settings(Config).items() if setting.bounds is not None}


def test_every_number_has_bounds() -> None:
    assert set(BOUNDS) == set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_range_is_named_with_its_range(name: str) -> None:
    low, high = BOUNDS[name]
    option = f"--{name.replace('_', '-')}"
    for value in [low - 1, math.nan, -math.inf, *([high * 2 + 1] if math.isfinite(high) else [])]:
        with pytest.raises(InputError) as raised:
            tiny_policy.settings(**{name.replace(".", "__"): value})
        message = str(raised.value)
        wanted = f"a value from {low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
        assert message == f"{option} is {value}: give {wanted}"
        assert "\n" not in message


CONTRADICTIONS = [
    ({"scheduler__bandwidth": math.inf}, "--scheduler.bandwidth is inf: give a value from 0.001 to 1e[+]06"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_settings_that_would_be_ignored_or_cancel_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_policy.settings("paced", **changes)


EXPECTED = {
    # algorithm: intercept, rule, replay, head loss, head used, its value is an accuracy
    "paced": ("value", "greedy", "off", "bce", True, True),
    "paced_paper": ("value", "greedy", "on", "tb", True, True),
    "tb": ("value", "uniform", "off", "bce", True, True),
    "tb_group": ("group_mean", "uniform", "off", "tb", False, False),
    "flowrl": ("value", "uniform", "off", "tb", True, False),
    "grpo": ("group_mean", "uniform", "off", "tb", False, False),
}


def test_every_algorithm_and_every_schedule_has_all_its_parts() -> None:
    names = list(get_args(Algorithm))
    assert names == list(ALGORITHMS) == list(EXPECTED)
    assert set(names) == set(POLICY_LOSSES) == set(REGRESSIONS)
    assert set(get_args(Rule)) - {"auto"} == set(RULES) == set(DRAWS)
    assert set(get_args(GeneratorName)) - {"auto"} == set(GENERATORS)


@pytest.mark.parametrize("algorithm", sorted(EXPECTED))
def test_auto_means_what_the_algorithm_says(algorithm: str) -> None:
    config = tiny_policy.settings(algorithm)
    assert EXPECTED[algorithm] == (
        config.loss.intercept,
        config.scheduler.rule,
        config.replay.mode,
        config.log_z.loss,
        config.uses_head,
        config.value_is_accuracy,
    )
    assert resolve(config) == config
    # The engine's layout, the machine and the model decide: not known before they are there.
    left = [name for name, value in flatten(config).items() if value == "auto"]
    assert left == [
        "model.attention",
        "model.gradient_checkpointing",
        "model.liger",
        "reward.sandbox",
        "weight_sync.mode",
        "distributed.mode",
        "distributed.gradients",
    ]


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("tb_group", {"scheduler__rule": "tree"}),
        ("grpo", {"scheduler__rule": "greedy"}),
        ("tb_group", {"replay__mode": "on"}),
        ("paced", {"loss__intercept": "group_mean", "replay__mode": "off"}),
    ],
)
def test_whatever_reads_the_value_brings_the_head(algorithm: str, changes: dict[str, Any]) -> None:
    assert tiny_policy.settings(algorithm, **changes).value_is_accuracy


def test_a_group_mean_without_selection_or_replay_needs_no_head() -> None:
    assert not tiny_policy.settings(
        "paced", loss__intercept="group_mean", replay__mode="off", scheduler__rule="uniform"
    ).uses_head


@pytest.mark.parametrize(
    ("algorithm", "changes", "words"),
    [
        (
            "grpo",
            {"replay__mode": "on"},
            "--replay.mode on needs --algorithm paced, paced_paper, tb or tb_group, not grpo",
        ),
        ("flowrl", {"replay__mode": "on"}, "--replay.mode on needs"),
        (
            "flowrl",
            {"generation__group_size": 1},
            "--generation.group-size is 1: give 2 or more for --algorithm flowrl",
        ),
        ("grpo", {"generation__group_size": 1}, "--generation.group-size is 1: give 2 or more for --algorithm grpo"),
        (
            "tb_group",
            {"generation__group_size": 1},
            "--generation.group-size is 1: give 2 or more for --loss.intercept",
        ),
        ("flowrl", {"scheduler__rule": "tree"}, "--scheduler.rule tree needs a value that predicts accuracy"),
        ("tb_group", {"loss__intercept": "value"}, "--loss.intercept value does not work with --algorithm tb_group"),
        ("grpo", {"loss__intercept": "value"}, "--loss.intercept value does not work with --algorithm grpo"),
        ("flowrl", {"loss__intercept": "group_mean"}, "--loss.intercept group_mean does not work with"),
        ("paced", {"optimizer__minibatches": 33}, "--optimizer.minibatches is 33, but a step draws only 32 prompts"),
        ("paced", {"data__train": ()}, "--data names no source of training prompts"),
        ("paced", {"warm_start__second__sources": ()}, "--warm-start.second.steps is 70, but"),
    ],
)
def test_conflicts_are_named(algorithm: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as raised:
        tiny_policy.settings(algorithm, **changes)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_settings_survive_json() -> None:
    config = tiny_policy.settings("tb", loss__beta=0.125, data__headline=("k3", "k4"), run__loggers=("wandb",))
    import json

    assert config_from_dict(Config, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_run_from_before_the_memory_had_none() -> None:
    saved = dataclasses.asdict(tiny_policy.settings("paced"))
    assert saved["log_z"]["memory"] == "on"
    for name in ("memory", "past_groups", "past_per_fresh", "prior", "decay", "embedding"):
        del saved["log_z"][name]
    saved["log_z"] |= {"updates_per_step": 1, "loss": "tb"}
    old = resolve(config_from_dict(Config, saved)).log_z
    assert old == tiny_policy.settings("paced", log_z__memory="off").log_z
    assert (old.memory, old.updates_per_step, old.embedding) == ("off", 1, "mean")


@pytest.mark.parametrize(
    ("algorithm", "changes", "memory", "updates", "embedding"),
    [
        ("paced", {}, "on", 4, "mean_and_last"),
        ("paced", {"log_z__updates_per_step": 8}, "on", 8, "mean_and_last"),
        ("paced", {"log_z__memory": "off"}, "off", 1, "mean"),
        ("paced_paper", {}, "off", 1, "mean"),
        ("paced_paper", {"log_z__memory": "on"}, "on", 4, "mean_and_last"),
        ("flowrl", {}, "off", 1, "mean"),
        ("grpo", {}, "off", 1, "mean"),  # without a head there is nothing to remember
        ("grpo", {"scheduler__rule": "tree"}, "on", 4, "mean_and_last"),
    ],
)
def test_what_the_memory_means(
    algorithm: str, changes: dict[str, Any], memory: str, updates: int, embedding: str
) -> None:
    log_z = tiny_policy.settings(algorithm, **changes).log_z
    assert (log_z.memory, log_z.updates_per_step, log_z.embedding) == (memory, updates, embedding)


def test_a_log_z_that_is_no_accuracy_has_no_memory() -> None:
    with pytest.raises(InputError, match=r"--log-z.memory on needs a value that predicts accuracy, .*: give off$"):
        tiny_policy.settings("flowrl", log_z__memory="on")


def test_digests_and_seeds_change_with_every_part() -> None:
    base = preset("tiny")
    other = tiny_policy.replaced(base, warm_start__first__steps=451)
    assert digest(base.warm_start.first) != digest(other.warm_start.first)
    assert digest(base.warm_start.first, "a") != digest(base.warm_start.first, "b")
    assert digest(base.model) == digest(preset("tiny").model)
    seeds = {stream_seed(s, t, n) for s in range(5) for t in range(50) for n in ("generate/0", "generate/1", "pool")}
    assert len(seeds) == 750
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(1, 11, "x") != stream_seed(11, 1, "x")


def test_the_share_of_settings_with_a_sentence_is_all() -> None:
    """`--help` prints the docstring below a field; a field without one would have none."""
    import ast

    from paced_fast import config as package

    nodes = [n for path in Path(package.__path__[0]).glob("*.py") for n in ast.parse(path.read_text()).body]
    classes = [n for n in nodes if isinstance(n, ast.ClassDef) and n.name.endswith(("Config", "Phase"))]
    assert len(classes) > 10
    for node in classes:
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                name = ast.unparse(field.target)
                is_group = ast.unparse(field.annotation).endswith(("Config", "Phase")) and node.name == "Config"
                assert is_group or isinstance(after, ast.Expr), f"{node.name}.{name}"
