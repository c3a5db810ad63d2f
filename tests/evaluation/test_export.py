"""A policy as a folder that others load: the numbers, the type, the tokenizer, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import tiny_run
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from paced_fast import train
from paced_fast.data.prompts import character_tokenizer
from paced_fast.errors import InputError
from paced_fast.export import ExportArguments, export, main
from paced_fast.export import write as exporting
from paced_fast.run import checkpoint


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


@pytest.mark.parametrize(("exact", "kind"), [(True, "float32"), (False, "bfloat16")])
def test_without_a_type_it_is_the_most_exact_of_the_run_and_is_told(
    tmp_path: Path, exact: bool, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    full = made(tmp_path / "run", exact=exact)
    (tmp_path / "run" / "config.json").write_text("{}")
    out = tmp_path / "out"
    main([str(tmp_path / "run"), str(out)])
    assert f"wrote {out}, weights in {kind}\n" in capsys.readouterr().out
    dtype = getattr(torch, kind)
    found = loaded(out, dtype)
    wanted = {name: tensor if exact else tensor.bfloat16() for name, tensor in full.items()}
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    assert f"The weights are in {kind}." in (out / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_exported_merged_in_the_type_of_the_weights_under_them(tmp_path: Path, dtype: str) -> None:
    """The optimiser's float32 copies are of the adapters, so that they say nothing of the merged weights' type."""
    pytest.importorskip("peft", reason="needs peft")
    kind = getattr(torch, dtype)
    settings = tiny_run.config(
        tiny_run.write_rewards(tmp_path), steps=2, lora__rank=2, model__dtype=dtype, data__eval=(), evaluation__every=0
    )
    run = tmp_path / "run"
    train.run(dataclasses.replace(settings, run_dir=str(run)), tiny_run.quiet())
    merged = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_000002" / "policy", dtype="auto")
    start = AutoModelForCausalLM.from_pretrained(run / "initial", dtype="auto").state_dict()
    export(ExportArguments(run_or_checkpoint=str(run), folder=str(tmp_path / "auto")))
    assert exporting.stored_dtype(tmp_path / "auto") == dtype
    found = loaded(tmp_path / "auto", kind)
    expected = merged.state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert any(not torch.equal(found[name], start[name].to(kind)) for name in found), "the adapters are in them"
    assert f"The weights are in {dtype}." in (tmp_path / "auto" / "README.md").read_text()
    export(ExportArguments(run_or_checkpoint=str(run), folder=str(tmp_path / "wide"), dtype="float32"))
    wide = loaded(tmp_path / "wide", torch.float32)
    assert [name for name in expected if not torch.equal(wide[name], expected[name].float())] == []


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step_000004"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    capsys.readouterr()
    cases = [
        (["nowhere", "out"], "no such folder nowhere: give a run folder or a checkpoint"),
        ([str(tmp_path / "run"), str(tmp_path / "full")], "full exists already: give a folder that is empty"),
        ([str(tmp_path / "run"), str(tmp_path / "out"), "--step", "3"], "no checkpoint of step 3: .* those of step 4"),
        ([str(folder), str(tmp_path / "out"), "--step", "4"], "is one checkpoint: leave --step out"),
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
    assert "is damaged (state.json has changed)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_source_that_a_running_training_removes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name: getattr(module, name) for module, name in ((exporting, "load_model"), (exporting, "_take_exact"))}
    for name, is_before in (("load_model", True), ("load_model", False), ("_take_exact", True), ("_take_exact", False)):
        run = tmp_path / f"{name} {is_before}"
        made(run, exact=True)
        folder = run / "checkpoints" / "step_000004"

        def removing(
            *arguments: Any, name: str = name, is_before: bool = is_before, folder: Path = folder, **more: Any
        ) -> Any:
            if is_before:
                folder.rename(folder.with_name(".step_000004.removed"))
            result = own[name](*arguments, **more)
            if not is_before:
                folder.rename(folder.with_name(".step_000004.removed"))
            return result

        with monkeypatch.context() as patched:
            patched.setattr(exporting, name, removing)
            told = rf"^checkpoint {folder} was removed while it was read, because its run keeps only the newest .*: exp"
            with pytest.raises(InputError, match=told):
                export(ExportArguments(run_or_checkpoint=str(run), folder=str(tmp_path / "out")))
    run = tmp_path / "at the end"
    made(run)

    def none_left(path: Path) -> bool:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return True

    monkeypatch.setattr(exporting, "_holds_weights", none_left)
    with pytest.raises(InputError, match="was removed while it was read"):
        export(ExportArguments(run_or_checkpoint=str(run), folder=str(tmp_path / "out")))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "run")

    def fill(self: Any, folder: Path) -> None:
        folder.mkdir()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fill)
    with pytest.raises(InputError, match=r"out cannot be written \(Error while .* No space left on device"):
        export(ExportArguments(run_or_checkpoint=str(tmp_path / "run"), folder=str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_target_that_would_harm_a_run_or_the_shell_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    made(run)
    (run / "config.json").write_text("{}")
    shutil.copytree(run / "checkpoints" / "step_000004" / "policy", run / "initial")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    cases = {
        str(run / "checkpoints" / "step_000004" / "policy" / "out"): "is inside .*step_000004, which belongs to a run",
        str(run / "checkpoints" / "step_000004" / "out"): "is inside .*step_000004, which belongs to a run",
        str(run / "checkpoints" / "out"): "is inside .*checkpoints, which belongs to a run",
        "../run/initial/out": "is inside .*initial, which belongs to a run",
        ".": "empty is the working directory",
        "../empty/": "empty is the working directory",
    }
    for target, told in cases.items():
        with pytest.raises(InputError, match=told):
            export(ExportArguments(run_or_checkpoint=str(run), folder=target))
    assert checkpoint.verify(run / "checkpoints" / "step_000004") is None
    assert export(ExportArguments(run_or_checkpoint=str(run), step=0, folder=str(run / "out"))) == run / "out"


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "run")
    main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert "wrote" in capsys.readouterr().out
