"""What was understood of the data, shown before anything runs: text, tokens, answer, and the answer's reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_chat

from paced_fast import train

REWARD = """
from collections import Counter

class Counting:
    counts = Counter()

    def __call__(self, prompts, completions, **columns):
        self.counts["seen"] += len(completions)
        return [float(a in c) for a, c in zip(columns["answer"], completions)]

counting = Counting()

def contains(prompts, completions, **columns):
    return [float(a in c) for a, c in zip(columns["answer"], completions)]

def boxed(prompts, completions, answer, **columns):
    return [float(f"boxed{{{a}}}" in c) for a, c in zip(answer, completions)]

def tagged(prompts, completions, answer, **columns):
    return [float(f"<answer>{a}</answer>" in c) for a, c in zip(answer, completions)]

def last_word(completions, answer, **columns):
    return [float(c.split()[-1:] == [a]) for c, a in zip(completions, answer)]

def never(prompts, completions, **columns):
    return [0.25] * len(completions)

def for_one(prompts, completions, **columns):
    return [1.0]

def forgot(completions):
    scores = [0.0] * len(completions)

def silent(prompts, completions, **columns):
    return [None] * len(completions)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a chat model, three rows and rewards."""
    tiny_chat.save(tmp_path / "model", tiny_chat.tokenizer(tiny_chat.THINKING))
    tiny_chat.save(tmp_path / "plain", tiny_chat.tokenizer(None))
    rows: list[dict[str, Any]] = [
        {"question": f"What is {i} + 1?", "answer": str(i + 1), "level": level} for i, level in enumerate("aab")
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.csv").write_text("problem,target\n7 * 6 = \x1b?,42\n")
    (tmp_path / "r.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = ("--generation.max-completion-tokens", "16")
"""So that prompts and completions fit in the positions of the model."""


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    train.main([*words, *SHORT, "--check"])
    return capsys.readouterr().out


def test_check_shows_the_first_row_of_every_file_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    text = told(
        *(capsys, "--model", "model", "--data", "train.jsonl?slice_by=level", "--eval-data", "held.csv"),
        *("--data.system-prompt", "Be brief.", "--data.template-args", "enable_thinking=false", "--reward", "number"),
    )
    seen = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 0 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    seen += "<think></think>"
    made = tiny_chat.tokenizer()
    shown = "\n".join(f"  | {line}" for line in seen.split("\n"))
    assert (
        f"first training row, train.jsonl:1 (slice a)\n  the model reads "
        f"{len(made(seen, add_special_tokens=False)['input_ids'])} tokens:\n{shown}\n"
        "  expected answer: 1\n  reward number of this answer: 1, as it should be\n"
    ) in text
    assert "first held-out row, held.csv:2 (slice held)\n" in text
    assert "  | 7 * 6 = \\x1b?<|im_end|>\n" in text, "what a terminal would obey is written out"
    assert "3 training prompts (slices: a, b), 1 held-out prompt; template: chat; stop tokens: <|endoftext|>" in text
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("exact", "reward exact of this answer: 1, as it should be"),
        ("r.py:contains", "reward r.py:contains of this answer: 1, as it should be"),
        ("r.py:boxed", "reward r.py:boxed of this answer: 0; inside \\boxed{} it is 1, so the prompt should ask for"),
        ("r.py:tagged", "reward r.py:tagged of this answer: 0; inside <answer> tags it is 1, so the prompt should ask"),
        ("r.py:never", "WARNING: reward r.py:never of this answer: 0.25, where 1 is expected: either the reward wants"),
        ("r.py:silent", "WARNING: reward r.py:silent of this answer: no verdict (None), where 1 is expected: either"),
    ],
)
def test_the_reward_of_the_answer_itself(
    folder: Path, capsys: pytest.CaptureFixture[str], reward: str, words: str
) -> None:
    assert f"\n  {words}" in told(capsys, "--model", "model", "--data", "train.jsonl", "--reward", reward)


@pytest.mark.parametrize(("reward", "likes_text"), [("r.py:last_word", True), ("r.py:never", False)])
def test_a_reward_that_compares_texts_is_told_of_answers_that_are_numbers(
    folder: Path, capsys: pytest.CaptureFixture[str], reward: str, likes_text: bool
) -> None:
    (folder / "a.jsonl").write_text('{"prompt": "1 + 1", "answer": 2}\n')
    text = told(capsys, "--model", "model", "--data", "a.jsonl", "--reward", reward)
    words = (
        f"\n  WARNING: reward {reward} of this answer: 0; it is 1 with the text '2' in place of 2: compare with str("
    )
    assert (words in text) == likes_text
    assert ("either the reward wants more" in text) != likes_text


@pytest.mark.process
@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("math", "reward math of this answer: 1, as it should be"),
        ("math_strict", "reward math_strict of this answer: 0; inside \\boxed{} it is 1, so the prompt should ask for"),
    ],
)
def test_what_the_rewards_of_mathematics_want(
    folder: Path, capsys: pytest.CaptureFixture[str], reward: str, words: str
) -> None:
    assert f"\n  {words}" in told(capsys, "--model", "model", "--data", "train.jsonl", "--reward", reward)


def test_a_row_without_an_answer_says_what_the_reward_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.jsonl").write_text('{"prompt": "p", "goal": 3}\n')
    text = told(capsys, "--model", "model", "--data", "a.jsonl", "--reward", "r.py:never")
    assert "  expected answer: none in the data; the reward r.py:never is given the prompt, goal\n" in text


@pytest.mark.parametrize("row", [{"prompt": "p", "answer": "3"}, {"prompt": "p", "goal": 3}])
def test_a_function_that_judges_no_group_is_found_before_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any]
) -> None:
    (folder / "a.jsonl").write_text(json.dumps(row))
    for name, words in (
        ("for_one", "returned 1 rewards for 2 completions: return one per completion"),
        ("forgot", "returned None, not a list: return a list with one number per completion"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--model", "plain", "--data", "a.jsonl", "--reward", f"r.py:{name}", "--check"])
        assert f"the reward function 'r.py:{name}' {words}" in capsys.readouterr().err


def test_a_model_without_a_chat_template_reads_the_text_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "--model", "plain", "--data", "train.jsonl", "--reward", "number")
    assert "tokens:\n  | What is 0 + 1?\n  expected answer: 1\n" in text
    assert "template: plain;" in text
    with pytest.raises(SystemExit):
        train.main(["--model", "plain", "--data", "train.jsonl", "--data.system-prompt", "Be brief.", "--check"])
    assert capsys.readouterr().err == (
        "error: --data.system-prompt needs a chat template, and the tokenizer of plain has none: leave it out, or give "
        "--data.template 'a text with {prompt} in it'\n"
    )


def test_own_model_data_and_reward_train_resume_and_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "model", "--data", "train.jsonl", "--reward", "r.py:counting", "--steps", "1"]
    small = ["--generation.prompts-per-step=2", "--generation.group-size=2", "--generation.max-completion-tokens=4"]
    train.main([*words, *small, "--run.no-report", "--run.threads=1"])
    text = capsys.readouterr().out
    assert text.index("reward r.py:counting of this answer: 1") < text.index("memory plan") < text.index("step 1/1")
    assert "no held-out prompts, so accuracy is not measured: give --eval-data FILE, or divide the data" in text
    run = folder / "runs" / "model-paced-0"
    saved = json.loads((run / "config.json").read_text())
    assert (saved["preset"], saved["data"]["template"], saved["model"]["device"]) == ("own", "chat", "cpu")
    assert (saved["data"]["train"], saved["reward"]["name"]) == (["train.jsonl"], "r.py:counting"), "as typed"
    assert "train.jsonl?" not in text
    train.main(["--resume", "runs/model-paced-0", "--steps", "2"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["verdicts"] == {"r.py:counting": {"seen": 4}}, "of what the policy wrote, and of nothing else"
    with pytest.raises(SystemExit):
        train.main(["--resume", "runs/model-paced-0", "--reward", "r.py:never"])
    assert capsys.readouterr().err == (
        "error: --resume runs/model-paced-0: --reward.name was r.py:counting in that run and is r.py:never now: leave "
        "it out to continue the run (--resume runs/model-paced-0 needs nothing else), or start a new run with --config "
        "runs/model-paced-0/config.json\n"
    )


def test_a_target_is_not_taken_for_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """A row of signed_sums names the number that an expression must come to; the number itself is no expression."""
    text = told(capsys, "tiny")
    assert "\n  a right completion comes to " in text
    assert "WARNING" not in text
    assert "expected answer" not in text


def test_check_refuses_what_the_run_would_refuse_later(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "taught.jsonl").write_text('{"question": "What is 2 + 1?", "answer": "3", "worked": "2 + 1 = 3"}')
    phases = ("--warm-start.first.sources", "taught.jsonl?demonstration=worked", "--warm-start.first.steps", "1")
    text = told(capsys, "--model", "model", "--data", "train.jsonl", "--reward", "number", *phases)
    assert "first row of the warm start, taught.jsonl:1\n  is taught to answer with: 2 + 1 = 3\n" in text
    (folder / "shown.jsonl").write_text('{"task": "Say 3.", "result": "3"}')
    (folder / "asked.jsonl").write_text('{"question": "Say 4.", "worked": "4"}')
    two = (phases[0], "shown.jsonl?prompt=task&demonstration=result", "asked.jsonl?demonstration=worked", *phases[2:])
    text = told(capsys, "--model", "model", "--data", "train.jsonl", "--reward", "number", *two)
    assert "first row of the warm start, shown.jsonl:1\n  is taught to answer with: 3\n" in text, "without an answer"
    judged = ("--data", "shown.jsonl?prompt=task&demonstration=result")
    second = ("--warm-start.second.sources", "train.jsonl", "--warm-start.second.steps", "1")
    (folder / "long.jsonl").write_text(json.dumps({"question": "?", "answer": "3", "worked": "1 + 1 = 2 " * 99}))
    long = (phases[0], "long.jsonl?demonstration=worked", *phases[2:])
    settings = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "plain" / "config.json").write_text(json.dumps({**settings, "architectures": ["BertForMaskedLM"]}))
    for model, words, message in (
        ("model", (*SHORT[:1], "250"), "error: --model.name: a training prompt of "),
        ("model", judged, "shown.jsonl:1 has no field 'answer', only task, result: name another"),
        ("model", long, "error: prompt and completion have "),
        ("model", (*phases, *second), "warm start: 3 of 3 rows have no demonstration: name the field"),
        ("plain", (), "a BertForMaskedLM does not generate text): give a causal language model"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--model", model, "--data", "train.jsonl", "--reward", "number", *SHORT, *words, "--check"])
        assert message in capsys.readouterr().err
