"""The benchmark of weight synchronisation, run by its command on a model of toy size; its table can be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm_sides import tiny_llama

from benchmarks import run
from benchmarks.pages import training


@pytest.mark.slow
@pytest.mark.process
def test_the_case_weight_sync_runs_and_its_table_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # as in `child_environment`
    folder, path = tmp_path / "model", tmp_path / "result.json"
    tiny_llama().save_pretrained(folder)
    words = ["--model", str(folder), "--updates", "1", "--modes", "shared", "--json", str(path)]
    run.main(["weight_sync", *words])
    result = json.loads(path.read_text())
    assert list(result["modes"]) == ["shared"]
    assert result["modes"]["shared"]["bytes"] == 0
    assert result["modes"]["shared"]["largest_difference"] < 1e-4
    text = training.weight_sync(result)
    assert result["environment"]["commit"] in text
    assert "| shared | 0 |" in text
