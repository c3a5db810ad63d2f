"""Evaluation figures against enumeration, with a generator whose answers are known; the command from end to end."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import re
import shlex
import shutil
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import torch
from rich.console import Console

from paced_fast import train
from paced_fast.data.distributed import ALONE
from paced_fast.data.records import Completion, PromptRow, PromptTable
from paced_fast.data.sources import parse_source, read_drafts
from paced_fast.data.sources.benchmarks import BENCHMARKS, benchmark_sources
from paced_fast.errors import InputError
from paced_fast.evaluate import EvaluateArguments, evaluate_target, main
from paced_fast.evaluate.example import held_out_like
from paced_fast.evaluation import held_out
from paced_fast.evaluation.held_out import Evaluation, Sample, evaluate, prompt_columns
from paced_fast.generation import Sampling
from paced_fast.rewards.votes import answer_key
from paced_fast.run.evaluate_policy import evaluation_due
from paced_fast.run.record.phases import Phases
from paced_fast.run.record.terminal import evaluation_tables

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
SETTINGS = Sampling(samples=9, max_completion_tokens=3, temperature=0.5, seed=1)


class Script:
    """Says what `ANSWERS` holds, prompt by prompt; a 7 is cut after three tokens."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Sampling]] = []

    def generate(self, prompts: Any, sampling: Sampling) -> list[Completion]:
        self.calls.append((prompts, sampling))
        answers = [ANSWERS[prompt][1][k] for prompt in prompts for k in range(sampling.samples)]
        return [
            Completion(token_ids=[a] * (3 if a == 7 else 1), logprobs=[-1.0] * (3 if a == 7 else 1), stopped=a != 7)
            for a in answers
        ]


def judged(rows: Any, texts: Any) -> list[float | None]:
    return [0.5 if text == "9" else float(int(text) < 5) for text in texts]


def run(samples: int = 9, score: Any = judged, **options: Any) -> Evaluation:
    return evaluate(
        options.pop("generator", Script()),  # pyright: ignore[reportArgumentType]
        TABLE,
        score=score,
        decode=lambda ids: str(ids[0]),
        sampling=dataclasses.replace(SETTINGS, samples=samples),
        **options,
    )


def chance(answers: list[int], k: int) -> float:
    """pass@k by trying every choice of k samples."""
    choices = list(itertools.combinations(answers, k))
    return sum(any(answer < 5 for answer in choice) for choice in choices) / len(choices)


def vote(answers: list[int], k: int) -> float:
    """maj@k by letting every choice of k samples vote."""
    outcomes = []
    for choice in itertools.combinations(answers, k):
        most = max(choice.count(a) for a in choice)
        first = {a for a in choice if choice.count(a) == most}
        outcomes.append(sum(a < 5 for a in first) / len(first))
    return sum(outcomes) / len(outcomes)


def test_figures_are_means_over_prompts() -> None:
    result = run()
    overall, easy = result.overall, result.slices["easy"]
    assert result.prompt_accuracy == pytest.approx([5 / 9, 0.0, 1.0, 1 / 9])
    assert overall.accuracy == pytest.approx((5 / 9 + 0 + 1 + 1 / 9) / 4)
    for k in range(1, 10):
        assert overall.pass_at_k[str(k)] == pytest.approx(sum(chance(a, k) for _, a in ANSWERS.values()) / 4)
    assert overall.pass_at_8 == overall.pass_at_k["8"] < 0.75, "one right sample in nine may be the one left out"
    assert list(overall.maj_at_k) == ["1", "2", "4", "8", "9"]
    for k, found in overall.maj_at_k.items():
        assert found == pytest.approx(sum(vote(a, int(k)) for _, a in ANSWERS.values()) / 4)
    assert overall.maj_at_k["1"] == pytest.approx(overall.accuracy)
    assert overall.distinct_correct == pytest.approx((3 + 0 + 1 + 1) / 4)
    assert easy.accuracy == pytest.approx((5 / 9 + 1) / 2)
    assert (overall.prompts, easy.prompts) == (4, 2)
    assert result.slices["odd"].pass_at_8 == pytest.approx(8 / 9)
    record = result.record()
    assert record["prompt_accuracy"] == [0.555556, 0.0, 1.0, 0.111111]
    assert record["slices"]["odd"].keys() <= record.keys()
    assert record["samples"] == 9
    json.dumps(record, allow_nan=False)


def test_cut_completions_and_tokens_are_counted() -> None:
    """Two of the first prompt's 9 answers and eight of the last one's are cut, after three tokens; the rest are one."""
    result = run()
    assert result.overall.truncated_share == pytest.approx(10 / 36)
    assert result.overall.tokens_mean == pytest.approx((26 + 10 * 3) / 36)
    assert result.slices["easy"].truncated_share == pytest.approx(2 / 18)
    assert result.slices["hard"].tokens_mean == 1.0
    assert result.tokens == 56
    assert result.record()["tokens_per_second"] == pytest.approx(56 / result.seconds)


def test_unscored_samples_count_neither_as_right_nor_as_wrong() -> None:
    """Without the 7s the first prompt has 7 samples and the last one; without the 6s the second prompt has none."""

    def partly(rows: Any, texts: Any) -> list[float | None]:
        return [None if text in "67" else value for text, value in zip(texts, judged(rows, texts), strict=True)]

    result = run(score=partly)
    assert result.prompt_accuracy == pytest.approx([5 / 7, None, 1.0, 1.0])
    assert result.overall.accuracy == pytest.approx((5 / 7 + 1 + 1) / 3)
    assert (result.overall.unscored, result.overall.unscored_prompts, result.overall.prompts) == (19, 1, 4)
    assert list(result.overall.pass_at_k) == ["1"], "the last prompt has one sample"
    assert list(result.slices["easy"].pass_at_k) == [str(k) for k in range(1, 8)]
    assert result.slices["easy"].pass_at_k["3"] == pytest.approx((1 + 1) / 2), "two of seven are wrong"
    assert result.slices["easy"].pass_at_k["2"] == pytest.approx((1 - 1 / 21 + 1) / 2)
    assert result.slices["easy"].pass_at_8 is None
    hard = result.slices["hard"]
    assert (hard.accuracy, hard.accuracy_interval, hard.pass_at_k, hard.maj_at_k, hard.distinct_correct) == (
        *(None, None, {}, {}, None),
    )
    assert result.overall.truncated_share == run().overall.truncated_share, "how long they are is known"
    record = result.record()
    assert record["prompt_accuracy"] == [0.714286, None, 1.0, 1.0], "in the table's order"
    json.dumps(record, allow_nan=False)


def test_prompts_are_told_by_slice_and_text() -> None:
    columns = prompt_columns(TABLE)
    assert columns["prompt_slices"] == ["easy", "hard", "easy", "odd"]
    assert len(set(columns["prompt_ids"])) == 4
    assert all(re.fullmatch("[0-9a-f]{12}", name) for name in columns["prompt_ids"])
    turned = PromptTable(rows=TABLE.rows[::-1])
    assert prompt_columns(turned)["prompt_ids"] == columns["prompt_ids"][::-1]
    chat = dataclasses.replace(TABLE.rows[0], prompt=[{"role": "user", "content": "(1,)"}])
    assert prompt_columns(PromptTable(rows=(chat,)))["prompt_ids"][0] not in columns["prompt_ids"]
    # Fixed for good: runs of different versions are compared by these.
    assert columns["prompt_ids"][0] == hashlib.sha256(b'"(1,)"').hexdigest()[:12]


def test_the_value_meets_the_accuracy_of_its_own_prompt() -> None:
    """The second prompt is unscored: its value is left out, and those after it do not move up."""

    def partly(rows: Any, texts: Any) -> list[float | None]:
        return [None if text == "6" else value for text, value in zip(texts, judged(rows, texts), strict=True)]

    settings = tiny_run.config(Path("rewards.py"))
    head = SimpleNamespace(value_of=lambda embeddings: torch.tensor([0.25, 0.5, 0.75, 0.125]))
    fake = SimpleNamespace(
        config=tiny_run.resolve(settings),
        world=ALONE,
        eval_table=TABLE,
        collector=SimpleNamespace(
            generator=Script(),
            scorer=SimpleNamespace(score=partly, take_counts=dict),
            recorded=None,
            vocabulary=1000,
            decode=lambda ids: str(ids[0]),
        ),
        stepper=SimpleNamespace(counters=SimpleNamespace(step=3), phases=Phases()),
        trainer=SimpleNamespace(log_z=head),
        eval_embeddings=torch.zeros(4, 1),
    )
    record = evaluation_due(fake, fake.config.steps)  # pyright: ignore[reportArgumentType]
    assert record["eval"]["prompt_accuracy"] == [1.0, None, 1.0, 0.5]
    assert record["eval_value"]["values"] == [0.25, 0.75, 0.125]
    assert record["eval_value"]["accuracies"] == [1.0, 1.0, 0.5]


def test_verdicts_of_an_evaluation_are_its_own() -> None:
    """Two were counted before it began; what comes after it starts from nothing."""
    counts = {"number": {"right": 2}}

    def counting(rows: Any, texts: Any) -> list[float | None]:
        counts.setdefault("number", {})["wrong"] = len(texts)
        return judged(rows, texts)

    def take() -> dict[str, dict[str, int]]:
        taken = dict(counts)
        counts.clear()
        return taken

    assert run(score=counting, take_counts=take).record()["verdicts"] == {"number": {"wrong": 36}}
    assert counts == {}


def test_intervals_lie_around_their_figures_and_repeat() -> None:
    result = run()
    for figures in (result.overall, *result.slices.values()):
        for curve, limits in (
            (figures.pass_at_k, figures.pass_at_k_interval),
            (figures.maj_at_k, figures.maj_at_k_interval),
        ):
            assert curve.keys() == limits.keys()
            assert all(0 <= low <= curve[k] <= high <= 1 and low < high for k, (low, high) in limits.items())
    assert result.overall.accuracy_interval == result.overall.pass_at_k_interval["1"]
    assert result.slices == run().slices


def test_the_headline_is_its_slices_only() -> None:
    result = run(headline=("odd", "hard"))
    assert result.overall.accuracy == pytest.approx(1 / 18)
    assert result.overall.distinct_correct == pytest.approx(0.5)
    assert result.slices == run().slices
    with pytest.raises(
        InputError, match=r"^--data.headline names 'absent': give some of the held-out slices \['easy', "
    ):
        run(headline=("odd", "absent"))


def test_fewer_than_eight_samples_have_no_pass_at_eight() -> None:
    result = run(samples=7)
    assert result.overall.pass_at_8 is None
    assert max(map(int, result.overall.pass_at_k)) == result.record()["samples"] == 7


def test_the_generator_is_asked_for_what_was_set_and_in_several_calls_when_it_is_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, parts = Script(), Script()
    expected = run(generator=whole)
    wanted = Sampling(samples=9, temperature=0.5, top_p=1.0, max_completion_tokens=3, seed=1)
    assert whole.calls == [([(1,), (2,), (3,), (4,)], wanted)]
    monkeypatch.setattr(held_out, "_MAX_TOKENS_PER_CALL", 3 * 9 * 3 + 5)
    assert run(generator=parts).overall == expected.overall
    assert [prompts for prompts, _ in parts.calls] == [[(1,), (2,), (3,)], [(4,)]]
    (_, first), (_, second) = parts.calls
    assert first == wanted == dataclasses.replace(second, seed=first.seed)
    assert first.seed != second.seed, "or two prompts would share their random numbers"


def test_every_sample_is_shown_to_who_keeps_them() -> None:
    kept: list[Sample] = []
    run(keep=kept.extend)
    assert [sample.text for sample in kept] == [str(a) for _, answers in ANSWERS.values() for a in answers]
    assert [sample.vote for sample in kept] == [sample.text for sample in kept]
    assert [sample.row.slice for sample in kept[::9]] == ["easy", "hard", "easy", "odd"]


@pytest.mark.parametrize(
    ("reward", "completion", "expected"),
    [
        ("number", "so 3 + 4 = 7, or $1,234.50", "2469/2"),
        ("number", "no idea", None),
        ("math", r"thus \boxed{\dfrac12}", r"\dfrac12"),
        ("math", r"\boxed{0.50}", "1/2"),
        ("math", r"the answer is $x = 42$.", "42"),
        ("math", r"\boxed{(A)}", "(a)"),
        ("math", r"\boxed{}", None),
        ("0.9*math+0.1*exact", r"well \boxed{7.0}", "7"),
        ("exact", "  two   words ", "two words"),
        ("exact", "43.0", "43"),
        ("exact", " ", None),
        ("reasoning_gym", "<answer>1</answer> no, <answer> 2 3 </answer>", "2 3"),
        ("package.module:function", "all of\nit 1.0", "all of it 1.0"),
    ],
)
def test_a_completion_votes_for_the_answer_its_reward_reads(reward: str, completion: str, expected: str) -> None:
    assert answer_key(reward, completion) == expected


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_name_readable_sources_and_say_where_everything_is(name: str) -> None:
    for spec in BENCHMARKS[name]:
        source = parse_source(spec)
        assert source.answer == "answer"
        assert source.prompt in ("problem", "question")
        assert source.reward in ("math", "number")


def write_benchmark(folder: Path) -> None:
    rows = [{"problem": f"1951={i}:", "answer": i} for i in range(2, 8)]
    (folder / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_benchmark_is_its_file_or_else_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_benchmark(tmp_path)
    found = benchmark_sources(["aime24", "gsm8k"], str(tmp_path))
    assert found[0].startswith("jsonl:aime24.jsonl?")
    assert found[1].startswith("hf:openai/gsm8k?")
    assert f"no such file gsm8k_test.jsonl (looked for {tmp_path / 'gsm8k_test.jsonl'}" in caplog.text
    assert "--data-dir" in caplog.text
    assert [parse_source(spec).slice for spec in found] == ["aime24", "gsm8k"]
    plain = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "datasets" else plain(name, *more))
    with pytest.raises(
        InputError,
        match=rf"benchmark gsm8k: no such file gsm8k_test.jsonl .looked for {tmp_path}.*: give .* by --data-dir",
    ):
        benchmark_sources(["gsm8k"], str(tmp_path))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; its `initial` is a plain model folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    settings = tiny_run.config(
        tiny_run.write_rewards(folder),
        steps=2,
        evaluation__temperature=0.7,
        evaluation__top_p=0.9,
        evaluation__max_completion_tokens=4,
    )
    train.run(dataclasses.replace(settings, run_dir=str(folder / "run")), tiny_run.quiet())
    write_benchmark(folder)
    return folder


def command(capsys: Any, monkeypatch: pytest.MonkeyPatch, *words: object) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words), "--json", "-"])
    main()
    out, told = capsys.readouterr()
    assert max(len(line) for line in told.splitlines() if " INFO " not in line) <= 100
    assert "held-out accuracy" in told
    return json.loads(out)


def test_a_run_is_evaluated_as_it_evaluates_itself(run_folder: Path, capsys: Any, monkeypatch: Any) -> None:
    run = run_folder / "run"
    found = command(capsys, monkeypatch, run, "--samples", 8)
    assert {k: found[k] for k in ("temperature", "top_p", "max_completion_tokens", "samples", "prompts")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_completion_tokens": 4,
        "samples": 8,
        "prompts": 12,
    }
    assert found["model"] == str(run / "checkpoints" / "step_000002" / "policy")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = [record["eval"] for record in records if "eval" in record]
    assert len(own) == 2
    assert found.keys() - own[0].keys() == {"model", "sources", "reward", "template"}
    assert own[0].keys() - own[1].keys() == {"prompt_slices", "prompt_ids"}
    assert [len(own[0][name]) for name in ("prompt_accuracy", "prompt_slices", "prompt_ids")] == [12] * 3
    assert len(own[1]["prompt_accuracy"]) == 12
    slices = records[0]["overlap"].pop("slices")
    assert records[0]["overlap"] == {"repeated": 1, "training_prompts": 40}
    assert list(slices.values()) == [1]
    assert slices.keys() <= own[0]["slices"].keys()
    assert all("overlap" not in record for record in records[1:])
    assert all(evaluated[k] == found[k] for evaluated in own for k in ("temperature", "top_p"))
    assert all(evaluated["max_completion_tokens"] == 4 and evaluated["tokens_mean"] <= 4 for evaluated in own)
    summary = json.loads((run / "summary.json").read_text())
    assert not any("prompt" in name for name in summary)
    for name in ("accuracy", "pass_at_k", "accuracy_interval", "maj_at_k", "truncated_share"):
        assert (summary[f"{name}_before"], summary[f"{name}_after"]) == (own[0][name], own[1][name])
    before = command(capsys, monkeypatch, run, "--step", 0, "--samples", 2)
    assert before["model"] == str(run / "initial")


@pytest.mark.process
def test_figures_are_for_programs_only_where_they_are_asked_for(
    run_folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [run_folder / "run", "--samples", 2]
    found = command(capsys, monkeypatch, *words)
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words), "--json", str(run_folder / "found.json")])
    main()
    out, told = capsys.readouterr()
    assert "held-out accuracy" in out
    assert "{" not in out
    assert "held-out accuracy" not in told
    saved = json.loads((run_folder / "found.json").read_text())
    timed = ("seconds", "tokens_per_second")
    assert {k: v for k, v in saved.items() if k not in timed} == {k: v for k, v in found.items() if k not in timed}


def test_a_model_folder_is_evaluated_on_benchmarks_and_sources(run_folder: Path, capsys: Any, monkeypatch: Any) -> None:
    source = f"task:signed_sums?split=eval&size=9&slice=sums&reward={run_folder / 'rewards.py'}:odd"
    words = [run_folder / "run" / "initial", "--benchmarks", "aime24", "--data", source, "--data-dir", run_folder]
    words += ["--samples", 3, "--max-completion-tokens", 6, "--limit", 4]
    found = command(capsys, monkeypatch, *words, "--save-samples", run_folder / "samples.jsonl")
    assert {name: figures["prompts"] for name, figures in found["slices"].items()} == {"aime24": 4, "sums": 4}
    assert found["prompts"] == 8
    assert found["temperature"] == found["top_p"] == 1.0
    saved = [json.loads(line) for line in (run_folder / "samples.jsonl").read_text().splitlines()]
    assert len(saved) == 8 * 3
    for name, figures in found["slices"].items():
        rewards = [line["reward"] for line in saved if line["slice"] == name]
        assert figures["accuracy"] == pytest.approx(sum(rewards) / 12)
        assert figures["tokens_mean"] == pytest.approx(sum(e["tokens"] for e in saved if e["slice"] == name) / 12)
    assert found["tokens"] == sum(line["tokens"] for line in saved)
    assert {line["where"].rpartition(":")[0] for line in saved if line["slice"] == "aime24"} == {
        str(run_folder / "aime24.jsonl")
    }
    again = command(capsys, monkeypatch, *words)
    timed = ("seconds", "tokens_per_second")
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in found.items() if k not in timed}
    other = command(capsys, monkeypatch, *words, "--seed", 1)
    assert other["sources"] == found["sources"]
    assert other["tokens"] != found["tokens"]


VERDICTS = ("right", "wrong")


def test_other_prompts_are_judged_by_the_reward_of_the_run(
    run_folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in training, a source's own reward comes before `--reward`, which comes before what the run had."""
    run = tmp_path / "run"
    shutil.copytree(run_folder / "run", run)
    settings = json.loads((run / "config.json").read_text())
    settings["reward"]["name"] = f"{tmp_path / 'mine.py'}:right"
    (run / "config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text(
        "".join(f"def {name}(completions, **_): return [{name == 'right'}] * len(completions)\n" for name in VERDICTS)
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1=", "answer": "1"}\n')

    def accuracies(own: str, *words: str) -> dict[str, float]:
        rows = tmp_path / "rows.jsonl"
        source = f"{rows}?slice=with_own&reward={tmp_path / 'mine.py'}:{own}"
        found = command(capsys, monkeypatch, run, "--samples", 2, "--data", rows, source, *words)
        return {name: figures["accuracy"] for name, figures in found["slices"].items()}

    assert accuracies("wrong") == {"rows": 1.0, "with_own": 0.0}
    assert accuracies("right", "--reward", f"{tmp_path / 'mine.py'}:wrong") == {"rows": 0.0, "with_own": 1.0}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["absent"], "no such run or model folder"),
        (["rnu"], "no such run or model folder .*rnu: did you mean .*/run[?]"),
        (["run", "--step", "7"], "run has no checkpoint of step 7: .*checkpoints has those of step 2$"),
        (["run/config.json"], "no such run or model folder .*/run/config.json: give a run folder or a model$"),
        (["run", "--samples", "0"], "--samples is 0: give 1 or more"),
        (["run", "--temperature", "-1"], "--temperature is -1.0: give a value from 0 to 100"),
        (["run", "--temperature", "nan"], "--temperature is nan: give a value from 0 to 100"),
        (["run", "--top-p", "0"], "--top-p is 0.0: give a value from 1e-06 to 1"),
        (["run", "--limit", "0"], "--limit is 0: give 1 or more"),
        (
            ["run", "--benchmarks", "gms8k"],
            r"unknown benchmark 'gms8k' .did you mean 'gsm8k'.*: the benchmarks are gsm8k, math500",
        ),
        (["run", "--data", "jsonl:none.jsonl"], r"source jsonl:none.jsonl: no such file .*"),
        (["run", "--json", "no/such/place.json"], "--json no/such/place.json: no such folder"),
        (["run", "--sampels", "3"], "unknown option --sampels: did you mean --samples[?]$"),
        (["run", "--data", "task:signed_sums?size=1", "--reward", "none"], "unknown reward 'none'"),
        (
            ["run/initial"],
            "no prompts to evaluate .* because a model has no held-out prompts of its own: give --benchmarks",
        ),
        (["run/initial", "--step", "2"], "--step 2: .* is a model, and only runs have steps"),
        (
            ["run/initial", "--benchmarks", "aime24", "--max-completion-tokens", "512"],
            "this is a llama model with 512 positions",
        ),
        (
            ["run", "--max-completion-tokens", "100000"],
            "--max-completion-tokens is 100000, and this is a llama model with 512 positions",
        ),
        (
            ["run", "--max-completion-tokens", "510"],
            "--max-completion-tokens is 510, which with the .* the model's 512 pos",
        ),
        (
            ["run/initial", "--data", "task:signed_sums?split=eval&size=3", "--max-completion-tokens", "509"],
            "--max-completion-tokens is 509, which with the [0-9]+ tokens of .* is above the model's 512 positions",
        ),
        (["run", "--json", "."], "--json . is a folder: give the name of a file in it"),
        (["run", "--save-samples", "."], "--save-samples . is a folder: give the name of a file in it"),
        (["run", "--json", "/dev/null"], "--json /dev/null is not a regular file"),
        (["run", "--json", "/proc/figures"], "--json /proc/figures cannot be written"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    run_folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], complaint: str
) -> None:
    arguments = [str(run_folder / words[0]), *words[1:], "--data-dir", str(run_folder)]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert re.search(complaint, told), told


@pytest.mark.parametrize(
    ("source", "reward", "complaint"),
    [
        ("own.jsonl?answer=gold", None, "own.jsonl:1 has no field 'gold', only question, answer: name another"),
        ("own.jsonl", "maht", r"unknown reward 'maht' \(did you mean 'math'\?\)"),
    ],
)
def test_a_column_or_reward_that_is_not_there_costs_no_loading_of_the_model(
    source: str, reward: str | None, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    (tmp_path / "model").mkdir()  # without weights or tokenizer, which would be missed first
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    monkeypatch.chdir(tmp_path)
    asked = EvaluateArguments(run_or_model="model", data=(source,), reward=reward)
    with pytest.raises(InputError, match=complaint):
        evaluate_target(asked)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "is not a run folder"),
        ("{", "config.json is not JSON"),
        ("[]", "config.json is a JSON list, not an object"),
        ('{"model": null}', "config.json: model is null, not an object of settings"),
        ('{"steps": "many"}', 'config.json: steps is "many", not int'),
        ('{"seed": true}', "config.json: seed is true, not int"),
        ('{"data": {"train": "a"}}', 'config.json: data.train is "a", not tuple'),
        ('{"model": {"device": "tpu"}}', 'config.json: model.device is "tpu", not one of auto, cpu, cuda'),
        ("{}", "has no checkpoint yet: .*checkpoints has none"),
    ],
)
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, content: str | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=complaint):
        evaluate_target(EvaluateArguments(run_or_model=str(tmp_path)))


def refusal_of(run_or_model: Path) -> str:
    """The example of `--data` in the refusal to evaluate without prompts."""
    with pytest.raises(InputError, match=r"because (this run|a model) has no held-out prompts") as caught:
        evaluate_target(EvaluateArguments(run_or_model=str(run_or_model)))
    told, _, example = str(caught.value).partition("--data ")
    assert told.endswith("give --benchmarks gsm8k,math500,aime24,aime25,amc23, or prompts of yours, as in ")
    (example,) = shlex.split(example)
    return example


@pytest.mark.parametrize("target", ["run", "model"])
def test_the_example_for_what_has_no_held_out_prompts_works(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"frage": f"{a}+{b}=", "antwort": str(a + b)} for a in range(4) for b in range(4)]
    for name, chosen in (("a.jsonl", rows[:12]), ("held_out.jsonl", rows[12:])):
        Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in chosen))
    settings = tiny_run.config(
        tiny_run.write_rewards(tmp_path),
        steps=1,
        data__train=("jsonl:a.jsonl?prompt=frage&answer=antwort&reward=rewards.py:odd&share=0:0.9&slice=mine",),
        data__eval=(),
        run__report=False,
    )
    train.run(dataclasses.replace(settings, run_dir="run"), tiny_run.quiet())
    place = Path("run") if target == "run" else Path("run", "initial")
    example = refusal_of(place)
    if target == "run":
        assert example == "held_out.jsonl?prompt=frage&answer=antwort&reward=rewards.py:odd"
    else:  # a model says nothing of its rows: they have the usual names, and numbers as answers
        named = [{"question": row["frage"], "answer": row["antwort"]} for row in rows[12:]]
        Path("held_out.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in named))
    figures = evaluate_target(
        EvaluateArguments(run_or_model=str(place), data=(example,), samples=1, max_completion_tokens=4)
    )
    assert (figures["prompts"], figures["unscored"]) == (4, 0)


@pytest.mark.parametrize(
    ("spec", "example"),
    [
        ("csv:a/b.csv?rows=0:9&answer_after=%3A&size=3&seed=1", "held_out.csv?answer_after=%3A"),
        ("parquet:a.parquet", "held_out.parquet"),
        ("hf:a/b?split=train&config=main&format=gsm8k", "held_out.jsonl?format=gsm8k"),
        ("a.jsonl?reward=given:mine&slice=data&template=plain", "held_out.jsonl?template=plain"),
        ("task:signed_sums?split=train&size=9&reward=number", "task:signed_sums?reward=number&split=eval&size=50"),
        ("rg:gcd?size=20&seed=4&max_value=999", "rg:gcd?max_value=999&seed=5&size=50"),
        ("broken", "held_out.jsonl?reward=number"),
    ],
)
def test_an_example_of_held_out_rows_is_read_as_those_of_training(spec: str, example: str) -> None:
    assert held_out_like(spec) == example
    if parse_source(example).kind in ("task", "rg"):
        trained, made = ({draft.prompt for draft in read_drafts(one, None)[1]} for one in (spec, example))
        assert made - trained


def test_what_is_neither_a_run_nor_a_model_here_is_said_first(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"^no such run or model folder runs/none; if you mean a model of the .* give --ben"
    ):
        evaluate_target(EvaluateArguments(run_or_model="runs/none"))


def test_a_file_that_cannot_be_written_after_all_costs_no_figures(
    run_folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    def full(path: Any, record: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paced_fast.run.record.files.write_json_atomic", full)
    words = ["evaluate", str(run_folder / "run"), "--samples", "1", "--json", str(run_folder / "full.json")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    out, told = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["prompts"] == 12
    assert told.splitlines()[-1] == "error: --json cannot be written (No space left on device): give another place"


def printed(record: dict[str, Any], width: int) -> list[str]:
    text = io.StringIO()
    for table in evaluation_tables(record):
        Console(file=text, width=width).print(table)
    return [line for line in text.getvalue().splitlines() if line.strip(" \u2500")]


def test_tables_say_what_the_first_line_covers_and_sort_by_name() -> None:
    record = run(samples=1).record()
    lines = printed(record, 100)
    assert [line.split()[0] for line in lines[2:6]] == ["overall", "easy", "hard", "odd"]
    assert any("maj@k: the most common of k answers is correct" in line for line in lines), "not in two lines"
    record = run(headline=("odd", "hard")).record()
    record["slices"] = {"k10": record["slices"]["odd"], "k9": record["slices"]["hard"], "a": record["slices"]["easy"]}
    lines = printed(record | {"headline": ["k10", "k9"]}, 100)
    assert lines[2].split("  ")[1].strip() == "headline (k9, k10)"
    assert [line.split()[0] for line in lines[3:6]] == ["a", "k9", "k10"]
    assert not any("overall" in line for line in lines)


def test_tables_fit_a_hundred_columns_and_show_every_slice() -> None:
    record = run().record()
    ks = [str(k) for k in range(1, 513)]
    for figures in (record, *record["slices"].values()):
        figures |= {"pass_at_k": dict.fromkeys(ks, 0.75), "pass_at_k_interval": dict.fromkeys(ks, (0.5, 1.0))}
        figures |= {"prompts": 99999, "tokens_mean": 32768.0}
    record["slices"]["a slice with a name of its own, which is long"] = record["slices"]["odd"]
    text = io.StringIO()
    console = Console(file=text, width=100)
    for table in evaluation_tables(record):
        console.print(table)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    for words in ("mean@9", "512", "0.750", ".50-1.00", "0.417 (", "hard"):
        assert any(words in line for line in lines), words
    assert not any("\u2026" in line for line in lines), "nothing is cut short"
