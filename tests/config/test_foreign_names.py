"""Options of other trainers lead to the setting that does the same, and to no other."""

from __future__ import annotations

import dataclasses
from importlib import util

import pytest

from paced_fast.config import Config, cli, flatten, modes
from paced_fast.config.foreign_names import NAMES, counterpart, suggestion
from paced_fast.errors import InputError

SETTINGS = {f"--{name.replace('_', '-')}" for name in flatten(Config())}
SHORT = {"--model", "--data", "--eval-data", "--reward"}
KNOWN = [*modes.NAMES, *SHORT, *SETTINGS]

EXPECTED = [
    ("--learning-rate 1e-6", "--optimizer.learning-rate"),
    ("--learning_rate 1e-6", "--optimizer.learning-rate"),
    ("--lr 1e-6", "--optimizer.learning-rate"),
    ("--num-generations 8", "--generation.group-size"),
    ("--max-completion-length 256", "--generation.max-completion-tokens"),
    ("--max_prompt_length=512", "--data.max-prompt-tokens"),
    ("--output-dir x", "--run-dir"),
    ("--wandb", "--run.loggers"),
    ("--report-to wandb", "--run.loggers"),
    ("--dataset x", "--data"),
    ("--model-name-or-path x", "--model"),
    ("--lora-r 16", "--lora.rank"),
    ("--use-vllm true", "--generator"),
    ("--bf16", "--model.dtype"),
    ("actor_rollout_ref.rollout.n=8", "--generation.group-size"),
    ("actor_rollout_ref.actor.optim.lr=1e-6", "--optimizer.learning-rate"),
    ("data.max_response_length=1024", "--generation.max-completion-tokens"),
    ("+trainer.total_training_steps=9", "--steps"),
]


@pytest.mark.parametrize(("words", "option"), EXPECTED)
@pytest.mark.parametrize("before", [[], ["tiny"], ["tiny", "--steps", "3"]], ids=["first", "preset", "later"])
def test_a_foreign_option_leads_to_ours(words: str, option: str, before: list[str]) -> None:
    with pytest.raises(InputError, match=rf": did you mean {option}\?") as raised:
        cli.parse([*before, *words.split()])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--epochs", "did you mean --steps? A run has a number of steps; each draws --generation.prompts-per-step"),
        ("--batch-size", "did you mean --generation.prompts-per-step or --optimizer.micro-batch-tokens? The first is"),
        ("--per-device-train-batch-size", "did you mean --generation.prompts-per-step or --optimizer.micro-batch-"),
        ("--beta", "did you mean --loss.beta? It weighs staying near the policy of the step before, not near a"),
        ("--load-in-4bit", "Quantised weights are not trained here; --lora.rank trains adapters"),
        ("--kl-coef", "No KL term to a frozen reference: --loss.beta weighs"),
    ],
)
def test_what_is_not_quite_the_same_is_explained(option: str, words: str) -> None:
    with pytest.raises(InputError) as raised:
        cli.parse(["tiny", option, "1"])
    assert str(raised.value).startswith(f"unknown option {option}: {words}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--learning_rate 1e-5 --num_generations 8 --zz 1 --lr 2 --yy 2",
            "unknown options: --learning_rate, --lr (did you mean --optimizer.learning-rate?); --num_generations (did "
            "you mean --generation.group-size?); --zz, --yy (--help-all lists all options)",
        ),
        # what is wrong beside them waits until they are gone
        ("--reward f --zz 1 --steps x --epochz 2", "unknown options: --zz, --epochz (--help-all lists all options)"),
        (
            "data.train_files=x trainer.nnodes=2 trainer.test_freq=5",
            "unknown settings: data.train_files (did you mean --data? A file, a folder or a data set of the hub, as in "
            "--data train.jsonl.); trainer.nnodes (Start with torchrun --nnodes N.); trainer.test_freq (did you mean "
            "--evaluation.every?)",
        ),
    ],
)
def test_all_unknown_options_of_a_command_are_named_at_once(words: str, told: str) -> None:
    with pytest.raises(InputError) as raised:
        cli.parse(words.split())
    assert str(raised.value) == told


def test_every_name_leads_to_options_that_exist_and_is_none_itself() -> None:
    assert {option for found in NAMES.values() for option in found.options} <= SETTINGS | SHORT
    assert not [name for name in NAMES if f"--{name}" in KNOWN]
    for name, found in NAMES.items():
        assert found.options or found.note, name
        assert name == name.lower().replace("_", "-"), name
        assert not found.note or found.note.endswith("."), name
        mentioned = [word.strip(".,:;'") for word in found.note.split() if word.startswith("--")]
        elsewhere = {"--nproc-per-node", "--nnodes"}  # of torchrun
        assert {word for word in mentioned if word not in elsewhere} <= set(KNOWN), name


def test_the_last_part_of_several_settings_names_all_of_them() -> None:
    assert suggestion("--hidden-size", KNOWN) in (
        "did you mean --model.hidden-size or --log-z.hidden-size?",
        "did you mean --log-z.hidden-size or --model.hidden-size?",
    )
    assert suggestion("--tau", KNOWN) == "did you mean --scheduler.tau?"
    for option in ("--num-workers", "--zz", "--batch", "--rate", "--generator-name-x"):
        assert suggestion(option, KNOWN) == "--help-all lists all options", option


@pytest.mark.skipif(util.find_spec("trl") is None, reason="needs TRL: pip install -e '.[trl]'")
def test_no_option_of_trl_is_taken_for_another_setting() -> None:
    from trl import GRPOConfig, ModelConfig, ScriptArguments

    names = {
        field.name.replace("_", "-")
        for kind in (GRPOConfig, ModelConfig, ScriptArguments)
        for field in dataclasses.fields(kind)
    }
    assert len(names) > 150
    guessed = {name for name in names if counterpart(name) is None and "did you" in suggestion(f"--{name}", KNOWN)}
    assert guessed == {"seed"}, "which is an option here too"
    assert len([name for name in names if counterpart(name) is not None]) > 40
