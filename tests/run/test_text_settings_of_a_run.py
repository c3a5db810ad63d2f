"""A run keeps how its prompts were written and where its completions end; what it is made of must be able to go on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_chat
import tiny_policy
import tiny_run

from paced_fast import train
from paced_fast.config import Config
from paced_fast.config.presets import preset
from paced_fast.config.resolve import resolve
from paced_fast.errors import InputError
from paced_fast.evaluate import EvaluateArguments, evaluate_target
from paced_fast.run.start.build import PreparedRun
from paced_fast.run.start.build import build as build_run


def settings(folder: Path, model: str, **changes: Any) -> Config:
    """One step on two chats, judged by a text that no sample has."""
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": "right"} for text in ("hi", "ho")]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small: dict[str, Any] = {
        "algorithm": "paced",
        "steps": 1,
        "model__name": model,
        "data__train": ("jsonl:a.jsonl?reward=exact",),
        "data__eval": ("jsonl:a.jsonl?reward=exact&rows=0:1",),
        "data__headline": (),
        "data__template": "chat",
        "data__dir": str(folder),
        "data__max_prompt_tokens": 200,
        "data__overlap": "warn",
        "warm_start__first__steps": 0,
        "warm_start__second__steps": 0,
        "generation__prompts_per_step": 2,
        "generation__group_size": 2,
        "generation__max_completion_tokens": 4,
        "optimizer__minibatches": 1,
        "log_z__hidden_size": 8,
        "evaluation__every": 0,
        "evaluation__final_samples": 1,
        "run__threads": 1,
        "run__report": False,
        "run_dir": str(folder / "run"),
    }
    return tiny_policy.replaced(preset("tiny"), **small | changes)


def build(config: Config, **changes: Any) -> PreparedRun:
    made = build_run(resolve(dataclasses.replace(config, **changes)), tiny_run.quiet())
    made.collector.scorer.close()
    return made


def clock(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """It is that day, for the trainer and for the chat template alike."""
    now = datetime.datetime.fromisoformat(day)
    date = SimpleNamespace(today=now.date, fromisoformat=datetime.date.fromisoformat)
    for module in ("paced_fast.run.start.tables", "paced_fast.evaluate.target"):
        monkeypatch.setattr(f"{module}.datetime", SimpleNamespace(date=date))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: now))


def kept(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "config.json").read_text())


def test_a_run_goes_on_after_midnight_with_its_own_day(tmp_path: Path, monkeypatch, caplog) -> None:
    made = tiny_chat.tokenizer(tiny_chat.DATED)
    config = settings(tmp_path, tiny_chat.save(tmp_path / "model", made), resume="auto")
    clock(monkeypatch, "2026-02-28")
    with caplog.at_level(logging.INFO):
        first = build(config)
    assert "the chat template is given 2026-02-28 as today's date" in caplog.text
    assert "stop tokens of completions: <|endoftext|> (256), <|im_end|> (258)" in caplog.text
    text = str(made.decode(list(first.trainer.collector.table.rows[0].token_ids)))
    assert text.startswith("Today is 28 Feb 2026, 00:00.\n")
    assert kept(tmp_path)["data"]["date"] == "2026-02-28"
    assert kept(tmp_path)["generation"]["stop_tokens"] == ["<|endoftext|>", "<|im_end|>"]
    train.train(first, tiny_run.quiet())
    clock(monkeypatch, "2026-03-01")
    second = build(config, steps=2)
    assert second.resumed
    assert second.trainer.collector.table == first.trainer.collector.table
    assert kept(tmp_path)["data"]["date"] == "2026-02-28"
    # What is not the run's is today's, and another day that was asked for is another run.
    other = build(config, run_dir=str(tmp_path / "other"))
    assert str(made.decode(list(other.trainer.collector.table.rows[0].token_ids))).startswith("Today is 01 Mar 2026")
    dated = dataclasses.replace(config.data, date="2026-03-01")
    with pytest.raises(InputError, match=r"--data.date was 2026-02-28 .* and is 2026-03-01 now"):
        build(config, data=dated)
    # An evaluation reads what the run read.
    seen: list = []
    monkeypatch.setattr("paced_fast.data.prompts.load_table", lambda *a, **options: seen.append(options) or _stop())
    for date, day in ((None, datetime.date(2026, 2, 28)), ("2025-01-01", datetime.date(2025, 1, 1))):
        with pytest.raises(StopIteration):
            evaluate_target(EvaluateArguments(run_or_model=str(tmp_path / "run"), date=date))
        assert seen[-1]["chat"].today == day


def _stop() -> Any:
    raise StopIteration


def test_a_day_that_no_prompt_holds_is_no_part_of_a_run(tmp_path: Path, monkeypatch) -> None:
    """Seeds of one setting that began on two days are runs of one setting."""
    clock(monkeypatch, "2026-02-28")
    for template, written in ((tiny_chat.CHAT, "chat"), (tiny_chat.DATED, "{prompt}")):
        model = tiny_chat.save(tmp_path / written / "model", tiny_chat.tokenizer(template))
        config = settings(tmp_path / written, model, data__template=written)
        if written != "chat":
            (tmp_path / written / "a.jsonl").write_text('{"prompt": "hi", "answer": "yes"}\n' * 2)
        build(config)
        assert kept(tmp_path / written)["data"]["date"] is None


def test_another_end_of_completions_is_another_run(tmp_path: Path) -> None:
    made = tiny_chat.tokenizer()
    model = tiny_chat.save(tmp_path / "model", made, stops=256)
    config = settings(tmp_path, model, resume="auto")
    train.train(build(config), tiny_run.quiet())
    same = dataclasses.replace(config.generation, stop_tokens=("<|im_end|>", "256"))
    assert build(config, generation=same, steps=2).resumed
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 259]}))
    with pytest.raises(
        InputError, match=r"the stop tokens changed .*\(<\|endoftext\|> \(256\), <\|im_end\|> \(258\) then"
    ):
        build(config, steps=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"generation__stop_tokens": ("END",)}, "the stop token 'END' is not a single token"),
        ({"data__keep_special_tokens": ("<no>",)}, "the kept special token '<no>' is not a single token"),
        ({"data__template_args": ("enable_thinkin=1",)}, "the chat template has no argument 'enable_thinkin'"),
        (
            {"data__template_args": ("enable_thinking",)},
            "--data.template-args: 'enable_thinking' is not of the form name=value",
        ),
        ({"data__date": "today"}, "--data.date: 'today' is not a date: give one as YYYY-MM-DD"),
        ({"data__system_prompt": "x", "data__template": "{prompt}"}, "--data.system-prompt works only with"),
        ({"data__template_args": ("a=1",), "data__template": "{prompt}"}, "--data.template-args works only with"),
        ({"generation__stop_tokens": ()}, "--generation.stop-tokens is empty"),
        ({"data__keep_special_tokens": ()}, "--data.keep-special-tokens is empty"),
        ({"data__keep_special_tokens": ("all", "none")}, "give only one of tags, all and none"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    made = tiny_chat.tokenizer(tiny_chat.THINKING)
    model = tiny_chat.save(tmp_path / "model", made)
    with pytest.raises(InputError, match=words) as caught:
        build(settings(tmp_path, model, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


SIZE = len(tiny_chat.tokenizer())


@pytest.mark.parametrize("rows", [SIZE - 9, SIZE - 2, SIZE, SIZE + 64])
def test_a_tokenizer_may_have_more_ids_than_its_model_where_none_of_them_occurs(rows: int, tmp_path: Path) -> None:
    """The ids of <|im_start|> and <|im_end|> occur; those of <think> and </think>, the last two, do not."""
    model = tiny_chat.save(tmp_path / "model", tiny_chat.tokenizer(), rows=rows)
    config = settings(tmp_path, model)
    arguments = EvaluateArguments(
        run_or_model=model,
        data=("jsonl:a.jsonl?reward=exact",),
        data_dir=str(tmp_path),
        samples=1,
        max_completion_tokens=2,
    )
    if rows >= SIZE - 2:
        assert build(config).trainer.collector.vocabulary == min(rows, SIZE)
        evaluate_target(arguments)
        return
    words = (
        rf"the tokenizer has {SIZE} ids, the model has {rows} embeddings, and .*a.jsonl:1 contains the token "
        r"<\|im_start\|> \(257\)"
    )
    for start in (lambda: build(config), lambda: evaluate_target(arguments)):
        with pytest.raises(InputError, match=words) as caught:
            start()
        assert "resize the model's embeddings" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_end_that_the_model_cannot_write_is_refused(tmp_path: Path) -> None:
    model = tiny_chat.save(tmp_path / "model", tiny_chat.tokenizer(None), rows=256)
    (tmp_path / "b.jsonl").write_text('{"prompt": "hi", "answer": "yes"}\n{"prompt": "ho", "answer": "yes"}')
    with pytest.raises(InputError, match=r"has embeddings for 256 tokens, and the stop tokens <\|endoftext\|> "):
        build(
            settings(
                tmp_path, model, data__template="{prompt}", data__train=("jsonl:b.jsonl?reward=exact",), data__eval=()
            )
        )


@pytest.mark.parametrize(
    ("template", "demonstration", "ends"),
    [
        ("chat", "yes", ["<|im_end|>"]),
        ("chat", "yes<|im_end|>", ["<|im_end|>"]),
        ("{prompt}", "yes", ["<|endoftext|>"]),
        ("{prompt}", "yes<|endoftext|>", ["<|endoftext|>"]),
    ],
)
def test_a_warm_start_teaches_the_end_of_its_kind_once(
    template: str, demonstration: str, ends: list[str], tmp_path: Path, monkeypatch
) -> None:
    taught: list[Any] = []
    monkeypatch.setattr("paced_fast.policy.warm_start._run_phase", lambda *given: taught.extend(given[-2]))
    made = tiny_chat.tokenizer()
    config = settings(tmp_path, tiny_chat.save(tmp_path / "model", made))
    (tmp_path / "warm.jsonl").write_text(json.dumps({"prompt": "hi", "answer": "yes", "shown": demonstration}))
    phase = dataclasses.replace(
        config.warm_start.first, sources=(f"jsonl:warm.jsonl?demonstration=shown&template={template}",), steps=1
    )
    warm = dataclasses.replace(config.warm_start, first=phase, cache_dir=str(tmp_path / "cache"))
    build(config, warm_start=warm)
    (completion,) = taught
    assert made.decode(completion.token_ids) == "yes" + "".join(ends)


def test_a_demonstration_that_goes_on_behind_its_end_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, tiny_chat.save(tmp_path / "model", tiny_chat.tokenizer()))
    (tmp_path / "warm.jsonl").write_text(json.dumps({"prompt": "hi", "answer": "y", "shown": "yes<|im_end|>no"}))
    phase = dataclasses.replace(config.warm_start.first, sources=("jsonl:warm.jsonl?demonstration=shown",), steps=1)
    warm = dataclasses.replace(config.warm_start, first=phase, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"warm.jsonl:1 continues after the stop token <\|im_end\|>"):
        build(config, warm_start=warm)
    assert not (tmp_path / "run").exists()
