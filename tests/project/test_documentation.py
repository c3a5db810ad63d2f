"""The code that README and the pages of docs/ show is run as it stands there, at toy size."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from doc_blocks import Block, blocks, run_python

from paced_fast import api

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART, README = ROOT / "docs" / "quickstart.md", ROOT / "README.md"
BLOCKS = {README: 5, QUICKSTART: 5, ROOT / "docs" / "other-trainers.md": 4, ROOT / "docs" / "data-and-rewards.md": 1}
"""Pages with code, and how many blocks of Python each has at least."""
SHOWN_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOY: dict[str, Any] = {
    "generation.prompts_per_step": 2,
    "generation.group_size": 4,
    "generation.max_completion_tokens": 3,
    "evaluation.final_samples": 2,
    "run.threads": 1,
    "run.report": False,
}
TOY_OPTIONS = [
    f"--{name.replace('_', '-')}" + (f" {value}" if value is not False else "") for name, value in TOY.items()
]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small chat model, in the place of the one that pages show; the working directory is empty."""
    folder = tiny_chat.save(tmp_path / "model", tiny_chat.tokenizer(), stops=[256])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def toy(real: Callable[..., Any], model: str) -> Callable[..., Any]:
    """The function with a small model and a few tokens, whatever a page asks for."""

    def small(first: Any, *args: Any, **options: Any) -> Any:
        if real.__name__ == "evaluate":
            return real(first, *args, **{**options, "samples": 2, "progress": False})
        first = model if first == SHOWN_MODEL else first
        rest = {name: value for name, value in options.items() if name not in ("steps", "generation")}
        return real(first, *args, **rest, steps=1, progress=False, settings=TOY)

    return small


def names_of_pages(model: str) -> dict[str, Any]:
    """What the blocks of a page take for granted: a policy, a batch, and numbers of a completion.

    T = packed completion tokens, B = 4 completions, L = padded length.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    prompts, lengths = torch.randint(10, 200, (4, 3)), [2, 4, 1, 3]
    mask = torch.zeros(4, 7, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, 3 : 3 + length] = 1
    ids = torch.cat([prompts, torch.randint(10, 200, (4, 4))], 1)
    made = AutoModelForCausalLM.from_pretrained(model)
    head = torch.nn.Linear(8, 30, bias=False)

    class Rollouts:
        token_ids = torch.randint(0, 30, (sum(lengths),))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
        prompts = torch.tensor([0, 0, 1, 1])
        old_logprobs = torch.full((sum(lengths),), -3.0)

    from paced_kernels import linear_logprobs, trajectory_balance_loss

    class Policy:
        pass

    Policy.head = head  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "torch": torch,
        "linear_logprobs": linear_logprobs,
        "trajectory_balance_loss": trajectory_balance_loss,
        "seq_logprobs": torch.tensor([-3.0, -4.0, -2.0, -5.0], requires_grad=True),
        "old_seq_logprobs": torch.tensor([-3.1, -4.0, -2.0, -5.0]),
        "value": torch.tensor([0.5, 0.5, 0.2, 0.2]),
        "reward": torch.tensor([1.0, 0.0, 0.0, 1.0]),
        "weight": torch.ones(4),
        "beta": 0.05,
        "hidden": torch.randn(sum(lengths), 8),
        "policy": Policy,
        "rollouts": Rollouts,
        "log_z": torch.zeros(2, requires_grad=True),
        "model": made,
        "input_ids": ids,
        "attention_mask": torch.cat([torch.ones_like(prompts), mask[:, 3:]], 1),
        "completion_mask": mask,
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0]),
        "optimizer": torch.optim.SGD(made.parameters(), lr=1e-3),
    }


NEEDS = {"paced_fast.integrations.trl": "trl", "datasets": "datasets"}
"""Modules that a block imports, and the optional package that each needs."""


def lacks(block: Block) -> bool:
    """Whether a block needs an optional package that is not installed."""
    return any(name in block.text and util.find_spec(package) is None for name, package in NEEDS.items())


@pytest.mark.process
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page == QUICKSTART else page for page in BLOCKS],
    ids=lambda page: page.stem,
)
def test_every_block_of_python_runs(page: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train", "evaluate"):
        monkeypatch.setattr(api, name, toy(getattr(api, name), model))
    names, found = names_of_pages(model), blocks(page)
    python = [block for block in found if block.language == "python"]
    assert len(python) >= BLOCKS[page]
    for block in found:
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
    with redirect_stdout(io.StringIO()):
        for block in python:
            if block.title:
                run_python(block, page, {})
            elif not lacks(block):
                run_python(block, page, names)
    if page == QUICKSTART:
        result = names["result"]
        assert isinstance(result, api.Result)
        assert result.summary["steps"] == 1
        assert Path("exported_from_python", "model.safetensors").is_file()
        assert names["loss"].requires_grad
        assert (Path.cwd() / "runs" / "compare.html").is_file()


def test_every_page_with_code_is_run() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert {page for page in pages if any(block.language == "python" for block in blocks(page))} == set(BLOCKS)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(("page", "least"), [(README, 1), (QUICKSTART, 4)], ids=["README", "quickstart"])
def test_every_command_runs(
    page: Path, least: int, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = blocks(page)
    for block in found:
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
    lines = [line for block in found if block.language == "sh" for line in block.text.splitlines() if line.strip()]
    assert len(lines) >= least
    run = import_module("paced_fast.__main__").main
    for line in lines:
        program, *words = shlex.split(line.replace(SHOWN_MODEL, model))
        assert (program, words[:2]) == ("python", ["-m", "paced_fast"])
        words = words[2:]
        if words[0] == "train":
            toy_words = [
                word for option in TOY_OPTIONS for word in option.replace("run.report", "run.no-report").split()
            ]
            words = [*_without(words, ["--steps", *TOY_OPTIONS]), "--steps", "1", *toy_words]
        if words[0] == "evaluate":
            words = [*_without(words, ["--samples"]), "--samples", "2"]
        monkeypatch.setattr(sys, "argv", ["paced_fast", *words])
        run(words)
    assert list(Path("runs").glob("*/metrics.jsonl"))
    if page == QUICKSTART:
        assert Path("exported", "model.safetensors").is_file()
        assert Path("runs", "first", "metrics.jsonl").is_file()
    capsys.readouterr()


def _without(words: list[str], options: list[str]) -> list[str]:
    """The words without these options and their values."""
    names = {option.split()[0] for option in options}
    kept, skips = [], False
    for word in words:
        skips = word in names or (skips and not word.startswith("--"))
        if not skips:
            kept.append(word)
    return kept


def test_a_block_that_fails_is_shown_with_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\nassert x == 2\n```\n")
    (block,) = blocks(page)
    with pytest.raises(AssertionError) as caught:
        run_python(block, page, {})
    assert caught.traceback[-1].lineno == 4  # counted from 0
    assert str(caught.traceback[-1].path) == str(page)
