"""The card of an exported policy: what it says, that Hugging Face reads it, and what it does without."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from huggingface_hub import ModelCard

from paced_fast import train
from paced_fast.config.presets import preset
from paced_fast.export import ExportArguments, export
from paced_fast.run.record.model_card import model_card


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    settings = tiny_run.config(tiny_run.write_rewards(root), steps=4, run_dir=str(root / "run"))
    train.run(settings, tiny_run.quiet())
    (root / "run" / "report.html").write_text('<html><body data-refresh="15">the report</body></html>')
    return root / "run"


def test_an_export_has_a_card_and_the_report(run: Path, tmp_path: Path) -> None:
    target = export(ExportArguments(run_or_checkpoint=str(run), folder=str(tmp_path / "sums")))
    card = ModelCard.load(target / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("transformers", None, None)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval"]
    results = {found.dataset_name: found.metric_value for found in card.data.eval_results or []}
    assert results["held-out prompts"] == round(last["accuracy"], 4)
    assert results.keys() == {"held-out prompts", *last["slices"]}
    text = card.text
    assert "# sums" in text
    assert "after 4 steps of the algorithm `paced` (preset `tiny`, seed 0)" in text
    low, high = last["accuracy_interval"]
    assert f"{last['accuracy']:.1%} [{low:.1%}, {high:.1%}] |" in text
    assert "after step 4" in text
    assert "| `generation.prompts_per_step` | 32 | 4 |" in text
    assert "`optimizer.eps`" not in text
    assert not re.search(r"`(run_dir|resume|run\..*|warm_start\.cache_dir)` \|", text), "nothing that the policy owes"
    assert "split=train&size=40` |" in text
    assert "| torch | " in text
    assert 'from_pretrained("sums"' in text
    assert (target / "report.html").read_text() == "<html><body>the report</body></html>"


def test_the_card_of_a_step_has_the_results_of_that_step(run: Path) -> None:
    text = model_card(run, 2, "x")
    assert text is not None
    assert "after 2 of 4 steps" in text
    assert "after step 2" in text
    start = model_card(run, 0, "x")
    assert start is not None
    assert "after 0 of 4 steps" in start


def write(run: Path, model: str, **more: Any) -> Path:
    run.mkdir()
    config = preset("tiny")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=model))
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(config) | more))
    return run


def test_base_model_and_licence_are_named_where_they_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    card = ModelCard(str(model_card(write(tmp_path / "local", str(base)), 3, "x")))
    assert (card.data.license, card.data.base_model) == ("mit", None), "a path on one machine is no name"
    asked: list[tuple[str, str]] = []

    def cached(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(base / "README.md")

    monkeypatch.setattr("paced_fast.run.record.model_card.try_to_load_from_cache", cached)
    card = ModelCard(str(model_card(write(tmp_path / "hub", "org/model"), 3, "x")))
    assert (card.data.license, card.data.base_model) == ("mit", "org/model")
    card = ModelCard(str(model_card(write(tmp_path / "ours", "smollm2"), 3, "x")))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert asked == [("org/model", "README.md"), ("HuggingFaceTB/SmolLM2-135M-Instruct", "README.md")]


def test_data_are_named_as_they_were_typed_with_their_reward(tmp_path: Path) -> None:
    data = {"train": ["a.jsonl", "b.jsonl?reward=number", "no:source"], "eval": ["a|b.csv"]}
    text = str(model_card(write(tmp_path / "run", "tiny", data=data, reward={"name": "r.py:f"}), 3, "x"))
    rows = [line for line in text.splitlines() if line.startswith(("| training", "| held out"))]
    assert rows == [
        "| training | `a.jsonl` | `r.py:f` |",
        "| training | `b.jsonl?reward=number` | `number` |",
        "| training | `no:source` | `r.py:f` |",
        "| held out | `a\\|b.csv` | `r.py:f` |",
    ]
    text = str(model_card(write(tmp_path / "plain", "tiny", data=data | {"eval": []}, reward={"name": None}), 3, "x"))
    assert "| training | `a.jsonl` | by the format of the rows |" in text


def test_a_card_does_without_what_a_run_lacks(tmp_path: Path) -> None:
    assert model_card(tmp_path, 3, "x") is None
    run = write(tmp_path / "run", "tiny")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "eval": null}\ntorn')
    text = str(model_card(run, 3, "a|b <c>\n"))
    assert "# a\\|b &lt;c>" in text
    assert "## Results" not in text
    assert "## Versions" not in text
    assert "Those of preset `tiny`." in text


def test_a_slice_that_was_forgotten_is_on_the_card(tmp_path: Path) -> None:
    run = write(tmp_path / "run", "tiny")
    evaluations = [
        {"accuracy": a, "samples": 4, "prompt_accuracy": [a] * 9, "slices": {"trivial": {"accuracy": a}}}
        for a in (0.9, 0.5)
    ]
    evaluations[0]["prompt_slices"] = ["trivial"] * 9
    lines = [json.dumps({"step": step, "eval": found}) for step, found in enumerate(evaluations)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert "Forgetting: slice trivial fell from 90.0% to 50.0%" in str(model_card(run, 1, "x"))
