"""Runs of small models of several types, and runs that are refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
from safetensors.torch import load_file, save_file

from benchmarks.models import tiny_types
from paced_fast import evaluate
from paced_fast.config import Config
from paced_fast.errors import InputError
from paced_fast.run.plan import dry_run
from paced_fast.run.start.tables import read_tokenizer

pytestmark = pytest.mark.real_empty  # models on the meta device


def settings(folder: Path, name: str, changes: dict[str, Any], **more: Any) -> Config:
    """A run whose model is a small one of this type, with the tokenizer of `tiny`."""
    tokenizer = read_tokenizer("tiny")
    sizes = {} if "text_config" in changes else {"vocab_size": len(tokenizer)}
    tiny_types.tiny_model(name, **{**sizes, **changes}).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    given = {"model__name": str(folder / "model"), "steps": 1, **more}
    return tiny_run.config(tiny_run.write_rewards(folder), **given)


@pytest.mark.parametrize(
    ("name", "changes", "more", "layout"),
    [
        ("gpt2", {}, {}, "shared"),
        ("lfm2", {}, {"model__gradient_checkpointing": "on"}, "padded"),
        ("gemma2", {}, {}, "padded"),
        ("mamba2", {}, {"algorithm": "flowrl"}, "padded"),
        ("granite", {"logits_scaling": 8.0}, {"lora__rank": 2, "algorithm": "grpo"}, "shared"),
    ],
)
def test_a_run_samples_and_scores_alike(
    name: str, changes: dict[str, Any], more: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    config = settings(tmp_path, name, changes, **more)
    run = tiny_run.build(config, tmp_path / "run")
    assert run.trainer.policy.attention.name == layout
    record = run.stepper.step().record
    assert record.generator_mismatch_max < 1e-5
    assert record.skipped_steps == 0


SHORT = {"max_position_embeddings": 12}


@pytest.mark.parametrize(
    ("name", "changes", "more", "why", "is_planned"),
    [
        ("gpt2", SHORT, {}, r"a training prompt of 12 tokens .* a gpt2 model with 12 positions", True),
        ("llama", SHORT, {}, r"a training prompt of 12 tokens .* a llama model with 12 positions", True),
        ("xlm", {"n_words": 17}, {}, "in this model of type xlm tokens attend to later tokens", True),
        (
            "bert",
            {"is_decoder": False},
            {},
            "whose tokens attend to later tokens|models of type bert let tokens attend",
            None,
        ),
        ("falcon", {}, {"model__attention": "packed-sdpa"}, "attention packed-sdpa: models of type falcon", False),
    ],
    ids=["gpt2", "llama", "xlm", "bert", "falcon"],
)
def test_what_cannot_be_exact_is_refused_before_there_is_a_run_folder(
    name: str, changes: dict[str, Any], more: dict[str, Any], why: str, is_planned: bool | None, tmp_path: Path
) -> None:
    config = settings(tmp_path, name, changes, **more)
    with pytest.raises(InputError, match=why) as caught:
        tiny_run.build(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    if is_planned:  # needs the weights, or the prompts
        dry_run.make_plan(config, ranks=1)
    else:
        with pytest.raises(InputError, match=why):
            dry_run.make_plan(config, ranks=1)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_a_model_whose_weights_are_not_finite_is_refused(number: float, tmp_path: Path) -> None:
    config = settings(tmp_path, "llama", {})
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, 3:5] = number
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    told = r"^--model\.name: 2 of 1536 values of model.layers.1.mlp.up_proj.weight are infinite or NaN: [^\n]*$"
    with pytest.raises(InputError, match=told):
        tiny_run.build(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=told):
        evaluate.evaluate_target(evaluation(tmp_path, 4))


def test_completions_longer_than_the_model_are_refused_by_a_dry_run(tmp_path: Path) -> None:
    config = settings(tmp_path, "gpt2", {"max_position_embeddings": 12}, generation__max_completion_tokens=12)
    with pytest.raises(
        InputError, match="completions of up to 12 tokens leave no room for a prompt in a gpt2 model with 12 positions"
    ):
        dry_run.make_plan(config, ranks=1)


def test_a_warm_start_checks_its_demonstrations_first(tmp_path: Path) -> None:
    more = {"warm_start__first__steps": 1, "generation__max_completion_tokens": 1}
    config = settings(tmp_path, "llama", {"max_position_embeddings": 14}, **more)
    with pytest.raises(
        InputError, match=r"prompt and completion have \d+ tokens together and do not fit in a llama model"
    ):
        tiny_run.build(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def evaluation(folder: Path, tokens: int) -> evaluate.EvaluateArguments:
    """Two completions of so many tokens for each of six prompts."""
    return evaluate.EvaluateArguments(
        run_or_model=str(folder / "model"),
        data=("task:signed_sums?split=eval&size=6",),
        samples=2,
        max_completion_tokens=tokens,
        device="cpu",
        dtype="float32",
    )


def test_an_evaluation_checks_the_model_and_its_positions(tmp_path: Path) -> None:
    for name, changes, why in (
        ("gpt2", {"max_position_embeddings": 8}, "tokens is 9, and this is a gpt2 model with 8 positions: give fewer"),
        ("xlm", {"n_words": 17}, "in this model of type xlm tokens attend to later tokens"),
    ):
        (tmp_path / name).mkdir()
        settings(tmp_path / name, name, changes)
        with pytest.raises(InputError, match=why):
            evaluate.evaluate_target(evaluation(tmp_path / name, 9))


def test_a_hybrid_model_is_evaluated(tmp_path: Path) -> None:
    settings(tmp_path, "granitemoehybrid", {})
    assert evaluate.evaluate_target(evaluation(tmp_path, 4))["slices"]
