"""Whole runs of stored models: cut or not, adapted or not, they end as the same policy, and it is the one kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import tiny_run
import tiny_stored
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from paced_fast import train
from paced_fast.config import ModelConfig
from paced_fast.data import prompts, tasks
from paced_fast.errors import InputError
from paced_fast.evaluate import EvaluateArguments, evaluate_target
from paced_fast.export import ExportArguments, export
from paced_fast.policy import load_model
from paced_fast.run import checkpoint

GENERATION = json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": 1}, indent=5).encode()


def stored(kind: str, folder: Path) -> Path:
    """A model of that kind which knows the letters of the task, and generation settings that do not validate."""
    tokenizer = prompts.character_tokenizer(
        tasks.SIGNED_SUMS_ALPHABET, pad=tasks.SIGNED_SUMS_PAD, stop=tasks.SIGNED_SUMS_STOP
    )
    made = tiny_stored.model(
        kind, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(GENERATION)
    return folder


def go(settings: Any, folder: Path, **changes: Any) -> list[float]:
    """Train into `folder`; the losses of all steps."""
    train.run(tiny_policy.replaced(settings, run_dir=str(folder), **changes), tiny_run.quiet())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["step"]]


@pytest.mark.parametrize(("kind", "rank"), [("qwen3_moe-tied", 2), ("mixtral", 0)])
def test_a_cut_run_of_a_stored_model_is_the_uncut_one(tmp_path: Path, kind: str, rank: int) -> None:
    base = stored(kind, tmp_path / "base")
    settings = tiny_run.config(
        tiny_run.write_rewards(tmp_path),
        steps=2,
        model__name=str(base),
        lora__rank=rank,
        lora__alpha=8,
        evaluation__every=0,
        run__checkpoint_every=1,
    )
    whole = go(settings, tmp_path / "whole")
    go(settings, tmp_path / "halves", steps=1)
    assert go(settings, tmp_path / "halves", resume="auto") == whole
    first = load_model(ModelConfig(), str(tmp_path / "whole" / "initial")).state_dict()
    one, two = (
        load_model(ModelConfig(), str(tmp_path / name / "checkpoints" / "step_000002" / "policy")).state_dict()
        for name in ("whole", "halves")
    )
    assert all(torch.equal(one[name], two[name]) for name in first)
    experts = [name for name in first if "experts" in name]
    assert len(experts) == 4
    assert not any(torch.equal(first[name], one[name]) for name in experts)
    out = export(ExportArguments(run_or_checkpoint=str(tmp_path / "whole"), folder=str(tmp_path / "out")))
    for folder in (tmp_path / "whole" / "initial", tmp_path / "whole" / "checkpoints" / "step_000002" / "policy", out):
        assert (folder / "generation_config.json").read_bytes() == GENERATION


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_adapters_that_learn_nothing_change_nothing_in_what_is_kept(tmp_path: Path, kind: str) -> None:
    base = stored(kind, tmp_path / "base")
    settings = tiny_run.config(
        tiny_run.write_rewards(tmp_path), steps=1, model__name=str(base), lora__rank=2, optimizer__learning_rate=0.0
    )
    go(settings, tmp_path / "run")
    wanted = tiny_stored.logits(AutoModelForCausalLM.from_pretrained(base).eval())
    out = export(
        ExportArguments(run_or_checkpoint=str(tmp_path / "run"), folder=str(tmp_path / "out"), dtype="float32")
    )
    for folder in (tmp_path / "run" / "checkpoints" / "step_000001" / "policy", out):
        found = tiny_stored.logits(AutoModelForCausalLM.from_pretrained(folder).eval())
        assert torch.equal(found, wanted)
    run, model = (
        evaluate_target(EvaluateArguments(run_or_model=str(path), samples=2, data=settings.data.eval, **more))
        for path, more in ((tmp_path / "run", {}), (out, {"max_completion_tokens": 5, "template": "{prompt}"}))
    )
    assert run["accuracy"] == model["accuracy"]
    assert run["slices"] == model["slices"]


def test_a_run_whose_policy_is_not_whole_is_not_evaluated(tmp_path: Path) -> None:
    """As a version left it that lost the experts of an adapted mixture."""
    base = stored("mixtral", tmp_path / "base")
    settings = tiny_run.config(tiny_run.write_rewards(tmp_path), steps=1, model__name=str(base))
    go(settings, tmp_path / "run")
    good = tmp_path / "run" / "checkpoints" / "step_000001" / "policy"
    state = AutoModelForCausalLM.from_pretrained(good).state_dict()

    def write(folder: Path, state: dict[str, Tensor]) -> None:
        shutil.copytree(good, folder, dirs_exist_ok=True)
        wrong = {name.replace("experts.", "experts.base_layer."): tensor for name, tensor in state.items()}
        save_file(wrong, folder / "model.safetensors", metadata={"format": "pt"})

    saver = checkpoint.Saver(tmp_path / "run" / "checkpoints", keep=2, write_policy=write, background=False)
    saver.save(2, tensors={"optimizer.0.step": torch.tensor(1.0)}, model=state, state={})
    told = r"step_000002/policy' .*\(the names of its weights have the prefix of a wrapper: .*base_layer.* from PEFT\)"
    with pytest.raises(InputError, match=told):
        evaluate_target(EvaluateArguments(run_or_model=str(tmp_path / "run"), samples=1))
    with pytest.raises(InputError, match=told):
        export(ExportArguments(run_or_checkpoint=str(tmp_path / "run"), folder=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_nothing_is_claimed_for_a_model_that_is_not_whole(tmp_path: Path) -> None:
    base = stored("llama", tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).model.save_pretrained(base)
    settings = tiny_run.config(tiny_run.write_rewards(tmp_path), model__name=str(base))
    with pytest.raises(InputError, match=r"it lacks 1 of 21 weights, lm_head\.weight"):
        go(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
