"""A policy as a folder that others load: the numbers, the type, the tokenizer, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paced_fast import checkpoint
from paced_fast.export import ExportArguments, export, main
from paced_fast.prompts import character_tokenizer


def made(run: Path, *, exact: bool = False) -> dict[str, torch.Tensor]:
    """A run folder whose checkpoint has bf16 weights, and the float32 ones beside them where `exact`."""
    model = tiny_policy.model(seed=3)
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16)
    tokenizer = character_tokenizer("ab~#", pad="~", stop="#")

    def write_policy(folder: Path, state: dict[str, Any]) -> None:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)

    saver = checkpoint.Saver(run / "checkpoints", keep=1, write_policy=write_policy, background=False)
    tensors = {"optimizer.0.step": torch.tensor(1.0)} | (checkpoint.prefixed("policy", full) if exact else {})
    saver.save(4, tensors=tensors, model=model.state_dict(), state={})
    return full


def loaded(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == dtype, "what the configuration says"
    return model.state_dict()


@pytest.mark.parametrize("exact", [False, True])
def test_the_numbers_are_the_most_exact_there_are(tmp_path: Path, exact: bool) -> None:
    full = made(tmp_path / "run", exact=exact)
    rounded = {name: tensor.bfloat16() for name, tensor in full.items()}
    for kind, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        source = tmp_path / "run" if exact else tmp_path / "run" / "checkpoints" / "step_000004"
        target = tmp_path / "out" / kind
        target.parent.mkdir(exist_ok=True)
        assert export(ExportArguments(run_or_checkpoint=str(source), folder=str(target), dtype=kind)) == target
        found = loaded(target, dtype)
        expected = full if exact and kind == "float32" else rounded
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name].to(dtype))] == []
        assert AutoTokenizer.from_pretrained(target)("ba")["input_ids"] == [1, 0]
        assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step_000004"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    capsys.readouterr()
    cases = [
        (["nowhere", "out"], "there is no run or checkpoint nowhere"),
        ([str(tmp_path / "run"), str(tmp_path / "full")], "full is there already: give a folder that is empty"),
        ([str(tmp_path / "run"), str(tmp_path / "out"), "--step", "3"], "no checkpoint of step 3: .* those of step 4"),
        ([str(folder), str(tmp_path / "out"), "--step", "4"], "is a checkpoint, only runs have steps"),
        ([str(tmp_path / "run"), str(tmp_path / "full" / "file" / "out")], "cannot be written"),
        ([str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float16"], "dtype"),
    ]
    for words, told in cases:
        with pytest.raises(SystemExit) as raised:
            main(words)
        assert raised.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert re.search(told, error), error
    (folder / "state.json").write_text("[]")
    with pytest.raises(SystemExit):
        main([str(folder), str(tmp_path / "out")])
    assert "is damaged: state.json has changed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "run")
    main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert "wrote" in capsys.readouterr().out
