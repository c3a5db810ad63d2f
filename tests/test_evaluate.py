"""Evaluation figures against enumeration, with a generator whose answers are known."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from paced_fast.batch import Completion, PromptRow, PromptTable
from paced_fast.errors import InputError
from paced_fast.evaluate import EvaluateArguments, Evaluation, evaluate, evaluate_run, main

ANSWERS = {  # slice, then what each of nine samples says; what is below 5 is right, and 9 is half right
    (1,): ("easy", [1, 1, 2, 3, 7, 8, 7, 1, 9]),
    (2,): ("hard", [6, 6, 6, 6, 6, 6, 6, 6, 6]),
    (3,): ("easy", [4, 4, 4, 4, 4, 4, 4, 4, 4]),
    (4,): ("odd", [0, 7, 7, 7, 7, 7, 7, 7, 7]),
}
TABLE = PromptTable(
    rows=tuple(
        PromptRow(prompt=str(ids), token_ids=ids, reward="exact", slice=name, columns={})
        for ids, (name, _) in ANSWERS.items()
    )
)


class Script:
    """Says what `ANSWERS` holds, prompt by prompt."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def generate(self, prompts: Any, *, group_size: int, **options: Any) -> list[Completion]:
        self.options = options
        return [
            Completion(token_ids=[ANSWERS[prompt][1][k]], logprobs=[-1.0], stopped=True)
            for prompt in prompts
            for k in range(group_size)
        ]


def run(samples: int = 9, headline: tuple[str, ...] = ()) -> Evaluation:
    return evaluate(
        Script(),
        TABLE,
        score=lambda rows, texts: [0.5 if text == "9" else float(int(text) < 5) for text in texts],
        decode=lambda ids: str(ids[0]),
        samples=samples,
        max_completion_tokens=3,
        temperature=0.5,
        seed=1,
        headline=headline,
    )


def chance(answers: list[int]) -> float:
    """pass@8 by trying every choice of eight samples."""
    choices = list(itertools.combinations(answers, 8))
    return sum(any(answer < 5 for answer in choice) for choice in choices) / len(choices)


def test_figures_are_means_over_prompts() -> None:
    result = run()
    assert result.prompt_accuracy == pytest.approx([5 / 9, 0.0, 1.0, 1 / 9])
    assert result.accuracy == pytest.approx((5 / 9 + 0 + 1 + 1 / 9) / 4)
    assert result.pass_at_8 == pytest.approx(sum(chance(answers) for _, answers in ANSWERS.values()) / 4)
    assert result.pass_at_8 is not None
    assert result.pass_at_8 < 0.75, "one right sample in nine may be the one left out"
    assert result.distinct_correct == pytest.approx((3 + 0 + 1 + 1) / 4)
    assert result.slices["easy"]["accuracy"] == pytest.approx((5 / 9 + 1) / 2)
    assert result.slices["easy"]["prompts"] == 2.0
    assert result.slices["odd"]["pass_at_8"] == pytest.approx(8 / 9)
    assert "prompt_accuracy" not in result.record()
    json.dumps(result.record(), allow_nan=False)


def test_the_headline_is_its_slices_only() -> None:
    result = run(headline=("odd", "hard"))
    assert result.accuracy == pytest.approx(1 / 18)
    assert result.distinct_correct == pytest.approx(0.5)
    assert result.slices == run().slices
    with pytest.raises(InputError, match=r"^--data.headline names 'absent', but the held-out slices are \['easy', "):
        run(headline=("odd", "absent"))


def test_fewer_than_eight_samples_have_no_pass_at_eight() -> None:
    result = run(samples=7)
    assert result.pass_at_8 is None
    assert result.samples == 7


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (None, {}, "is not a run folder"),
        ("{", {}, "config.json is not JSON"),
        ("{}", {}, "holds no such thing as a checkpoint"),
        ("{}", {"step": 7}, "holds no such thing as a checkpoint of step 7"),
        ("{}", {"samples": 0}, "--samples is 0: give 1 or more"),
    ],
)
def test_a_folder_that_cannot_be_evaluated_is_named(
    tmp_path: Path, content: str | None, arguments: dict[str, Any], words: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError) as raised:
        evaluate_run(EvaluateArguments(run_dir=str(tmp_path), **arguments))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrong_option_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "runs/x", "--sampels", "3"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert "--sampels" in complaint
