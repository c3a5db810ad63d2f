"""Files, folders and columns of a user's own: what tells their kind, and which column is taken for what."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_chat

from paced_fast.data import hub, prompts
from paced_fast.data.sources import parse_source, read_drafts, require_file
from paced_fast.data.sources.spec import _KEYS, KEYS, KINDS
from paced_fast.errors import InputError

ROWS = [{"question": "1 + 1", "answer": "2"}, {"question": 'say "hi", twice\nnow', "answer": "hi"}]


def drafts(spec: str, folder: Path | None = None) -> list[Any]:
    return read_drafts(spec, None if folder is None else str(folder))[1]


def put(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def csv_text(delimiter: str) -> str:
    return f'question{delimiter}answer\n1 + 1{delimiter}2\n\n"say ""hi"", twice\nnow"{delimiter}hi\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("a.ndjson", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("a.json", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("a.json", "\n" + json.dumps(ROWS, indent=1)),
        ("a.json", "\ufeff" + json.dumps(ROWS)),
        ("a.csv", csv_text(",")),
        ("a.csv", "\ufeff" + csv_text(",")),
        ("A.CSV", csv_text(",")),
        ("a.tsv", csv_text("\t")),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_ending_tells_the_kind_of_a_file(tmp_path: Path, name: str, content: str, packed: bool) -> None:
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    for spec in (str(path), f"{path}?slice=x&rows=0:2"):
        found = drafts(spec)
        assert [(one.prompt, one.columns["answer"], one.reward) for one in found] == [
            (row["question"], row["answer"], "math") for row in ROWS
        ]
    assert drafts(path.name, tmp_path)[1].where.startswith(f"{path}")
    assert [one.prompt for one in drafts(f"{path}?rows=1:2")] == [ROWS[1]["question"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[1, 2]", r"a.json row 0 is a JSON int: give a list of objects"),
        ("a.json", '[{"a": 1}', r"a.json is not JSON \(.*\): give one list of objects, or one object per line"),
        ("a.csv", "prompt,answer\n1,2,3\n", r"a.csv:2 has 3 values for 2 columns: fix the row"),
        ("a.csv", "prompt,prompt\n1,2\n", r"a.csv has the column 'prompt' twice in its first line: give every column"),
        ("a.csv", "prompt,\n1,2\n", r"a.csv has a column without a name in its first line: give every column a name"),
        ("a.csv", 'prompt,answer\n"1,2\n', r"a.csv:2 is not comma-separated \(.*\): fix the file"),
        ("a.csv", "prompt,answer\n1,\n", r"a.csv:2: the answer in 'answer' is empty"),
        ("a.csv", "", r"data source .* has no rows"),
        ("a.csv", "x,y\n1,2\n", r"no known format has the fields x, y: name the fields of prompt and answer"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        drafts(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_what_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt,answer\n\u00e9,2\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"a.csv is not UTF-8 \(byte 14\): save the file as UTF-8"):
        drafts(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("spec", "kind", "name"),
    [
        ("owner/name", "hf", "owner/name"),
        ("owner/name?split=test&slice=x", "hf", "owner/name"),
        ("./folder/more", "hf", "./folder/more"),
        ("a:b/c.jsonl?reward=f.py:g", "jsonl", "a:b/c.jsonl"),
        ("~/x.parquet", "parquet", "~/x.parquet"),
    ],
)
def test_what_a_name_without_a_kind_is(spec: str, kind: str, name: str) -> None:
    if spec.startswith("a:b"):  # reads like a kind that is mistyped
        with pytest.raises(InputError, match="must start with one of task:, rg:, jsonl:, csv:"):
            parse_source(spec)
        spec = f"./{spec}"
        name = f"./{name}"
    source = parse_source(spec)
    assert (source.kind, source.name, source.spec) == (kind, name, spec)


def test_a_part_of_an_answer_is_named_with_a_dot(tmp_path: Path) -> None:
    for answer, part, found in (
        (["2", "3"], "answer.0", "2"),
        ({"value": "4", "unit": "m"}, "answer.value", "4"),
        ([{"value": "5"}], "answer.0.value", "5"),
    ):
        path = put(tmp_path / "a.jsonl", {"prompt": "p", "answer": answer})
        with pytest.raises(InputError, match=r"not one text or number: name a part of it with a dot, as in") as raised:
            drafts(str(path))
        named = str(raised.value).rpartition("as in ")[2]
        assert part.startswith(named.removeprefix("answer="))
        assert [one.columns["answer"] for one in drafts(f"{path}?answer={part}")] == [found]
    for part in ("answer.1", "answer.-1", "answer.x", "answer.0.0"):
        with pytest.raises(InputError, match=rf"has no field '{part}'"):
            drafts(f"{path}?answer={part}")
    with pytest.raises(InputError, match="is a list, not one text or number: write it as text"):
        drafts(str(put(tmp_path / "a.jsonl", {"prompt": "p", "answer": []})))


def test_folders_of_data_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("PACED_FAST_DATA")
    for folder in ("shared/data", "a", "b"):
        (tmp_path / folder).mkdir(parents=True)
    put(tmp_path / "shared" / "data" / "rows.jsonl", *ROWS)
    with pytest.raises(InputError, match="no such file") as raised:
        drafts("rows.jsonl")
    looked = f"looked for {tmp_path}/here/rows.jsonl and {tmp_path}/here/data/rows.jsonl): correct the path"
    assert looked in str(raised.value)
    monkeypatch.setenv("PACED_FAST_DATA", f"{tmp_path}/a:{tmp_path}/b")
    put(tmp_path / "b" / "rows.jsonl", *ROWS)
    assert len(drafts("rows.jsonl")) == len(ROWS)


def test_a_word_that_is_neither_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "train.jsonl", *ROWS)
    with pytest.raises(InputError, match=r"or end in one of .jsonl, .* \(did you mean train.jsonl\?\)"):
        parse_source("train")
    (tmp_path / "train").mkdir()
    assert parse_source("train").kind == "hf"
    require_file(parse_source("train.jsonl"), None)
    require_file(parse_source("jsonl:gone.jsonl?optional=true"), None)
    for spec in ("gone.jsonl", "csv:gone", "gone.parquet"):
        with pytest.raises(InputError, match=r"no such file .*: correct the path"):
            require_file(parse_source(spec), None)


COLUMNS: list[tuple[dict[str, Any], Any, Any]] = [
    ({"prompt": "p", "answer": "a"}, "p", "a"),
    ({"question": "p", "solution": "a"}, "p", "a"),
    ({"problem": "p", "ground_truth": 3}, "p", 3),
    ({"instruction": "p", "output": "a"}, "p", "a"),
    ({"query": "p", "label": "a"}, "p", "a"),
    ({"input": "p", "final_answer": "a"}, "p", "a"),
    ({"messages": [{"role": "user", "content": "p"}], "answer": "a"}, [{"role": "user", "content": "p"}], "a"),
    (
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]},
        [{"role": "user", "content": "p"}],
        "a",
    ),
    (
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "long"}], "target": "a"},
        [{"role": "user", "content": "p"}],
        "a",
    ),
]


@pytest.mark.parametrize(("row", "prompt", "answer"), COLUMNS, ids=lambda value: str(value)[:30])
def test_columns_are_recognised(tmp_path: Path, row: dict[str, Any], prompt: Any, answer: Any) -> None:
    (found,) = drafts(str(put(tmp_path / "a.jsonl", row)))
    assert (found.prompt, found.columns["answer"], found.reward) == (prompt, answer, "math")


USER, REPLY = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}
TOLD: list[tuple[dict[str, Any], str, Any]] = [
    ({"messages": [USER, REPLY]}, "prompt from `messages`, answer from the reply that ends it", "a"),
    ({"messages": [USER, REPLY], "answer": None}, "prompt from `messages`, answer from the reply that ends it", "a"),
    ({"messages": [USER, REPLY], "target": "b"}, "prompt from `messages`, answer from `target`", "b"),
    ({"messages": [USER], "answer": "b"}, "prompt from `messages`, answer from `answer`", "b"),
    ({"messages": [USER], "label": 0}, "prompt from `messages`, answer from `label`", 0),
    ({"messages": [USER]}, "prompt from `messages`, no answer", None),
    ({"prompt": [USER]}, "prompt from `prompt`, no answer", None),
    ({"question": "p", "note": "n"}, "prompt from `question`, no answer", None),
    (
        {"question": "p", "answer": None},
        "prompt from `question`, answer from `answer`",
        None,
    ),
    (
        {"problem": "p", "solution": "so \\boxed{a}"},
        "prompt from `problem`, answer from `answer` or \\boxed{} of `solution` (format math)",
        "a",
    ),
]


@pytest.mark.parametrize(("row", "line", "answer"), TOLD, ids=lambda value: str(value)[:60])
def test_the_line_on_columns_names_what_the_rows_are_read_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: dict[str, Any], line: str, answer: Any
) -> None:
    source = f"{put(tmp_path / 'a.jsonl', row)}?reward=f.py:g"
    with caplog.at_level(logging.INFO):
        (found,) = drafts(source)
    assert [record.getMessage() for record in caplog.records] == [f"{source}: {line}"]
    assert found.columns["answer"] == answer


def test_a_column_that_is_named_is_taken_as_it_is(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "It is"}]
    path = put(tmp_path / "a.jsonl", {"messages": chat, "answer": "a"})
    assert drafts(f"{path}?prompt=messages&answer=answer")[0].prompt == chat, "the reply goes on"
    path = put(tmp_path / "b.jsonl", {"messages": chat[1:]})
    with pytest.raises(InputError, match=r"b.jsonl:1: the prompt in 'messages' is a reply only: name the prompt's"):
        drafts(str(path))
    path = put(tmp_path / "c.jsonl", {"question": "p"})
    assert drafts(f"{path}?reward=f.py:g")[0].columns["answer"] is None, "an own function needs no answer"


def test_the_column_that_is_not_named_is_recognised(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", {"question": "p", "gold": "a", "target": "b"})
    assert [(one.prompt, one.columns["answer"]) for one in drafts(f"{path}?answer=gold")] == [("p", "a")]
    assert [(one.prompt, one.columns["answer"]) for one in drafts(f"{path}?prompt=gold")] == [("a", "b")]
    path = put(tmp_path / "b.jsonl", {"question": "p", "gold": "a"})
    with pytest.raises(InputError, match=r"name the field of the answer, as in '\S+b.jsonl\?answer=FIELD', or give"):
        drafts(str(path))
    for row, named in (
        ({"Question": "p", " Final Answer": "a", "ANSWER": "b"}, "prompt=Question&answer=ANSWER"),
        ({"my question": "p", "Prompt ": "q"}, "prompt=Prompt%20&answer=FIELD"),
        ({"question": "p", "Target": "b"}, "answer=Target"),
    ):
        path = put(tmp_path / "d.jsonl", row)
        with pytest.raises(InputError) as caught:
            drafts(str(path))
        assert f", as in '{path}?{named}', or give" in str(caught.value)
    assert drafts(f"{path}?{named}")[0].columns["answer"] == "b", "what is told can be typed"
    path = put(tmp_path / "c.jsonl", {"x": "p", "gold": "a"})
    with pytest.raises(InputError, match=r"name the fields of prompt and answer, as in '\S+prompt=FIELD&answer=FIELD'"):
        drafts(str(path))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            '[{"prompt": "p", "answer": "a"}]',
            "is a JSON list: write one JSON object per line, or name the file .json if",
        ),
        (
            '[\n{"prompt": "p", "answer": "a"}\n]',
            r"is not JSON \(.*\): write one JSON object per line, or name the file",
        ),
        ('{"prompt": "p", "answer": "a"}\n[1]', r":2 is a JSON list: write one JSON object per line$"),
    ],
)
def test_a_list_in_a_file_of_lines_says_what_to_name_it(tmp_path: Path, lines: str, told: str) -> None:
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(InputError, match=told):
        drafts(str(tmp_path / "a.jsonl"))


def test_a_column_makes_the_slices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "p", "answer": "a", "level": level, "of": {"kind": "x"}} for level in ("hard", 3, True, 2.5)]
    path = put(tmp_path / "a.jsonl", *rows)
    assert [one.slice for one in drafts(f"{path}?slice_by=level")] == ["hard", "level 3", "level True", "level 2.5"]
    assert {one.slice for one in drafts(f"{path}?slice_by=of.kind")} == {"x"}
    with caplog.at_level(logging.WARNING, logger="paced_fast"):
        assert {one.slice for one in drafts(f"{path}?slice=level")} == {"level"}
    assert (
        "slice=level puts every row into one slice of that name; slice_by=level makes one of each value" in caplog.text
    )
    with pytest.raises(InputError, match="has both slice= and slice_by=: give one of them"):
        parse_source(f"{path}?slice=a&slice_by=level")
    with pytest.raises(InputError, match=r"a.jsonl:1 has no field 'lvl', only .*: name another, as in slice_by=FIELD"):
        drafts(f"{path}?slice_by=lvl")
    with pytest.raises(InputError, match=r"a.jsonl:1: 'of' is .*, which names no slice: name a field of texts"):
        drafts(f"{path}?slice_by=of")


def test_every_kind_and_key_has_its_words() -> None:
    assert set(KINDS) == set(_KEYS)
    assert set(KEYS) == {key for keys in _KEYS.values() for key in keys}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "place_of", ask)


@pytest.mark.usefixtures("no_hub")
def test_a_folder_is_no_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install -e '.[data]'")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "in" / "table")
    (tmp_path / "plain").mkdir()
    put(tmp_path / "plain" / "train.jsonl", *ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    expected = [row["question"] for row in ROWS]
    for spec in ("hf:in/table", "in/table", "./in/table", "~/in/table", f"{tmp_path}/in/table"):
        assert [one.prompt for one in drafts(spec)] == expected, spec
    assert [one.prompt for one in drafts("hf:table", tmp_path / "in")] == expected, "in the folder of the data"
    for spec in ("./gone", "~/gone/x", "/gone", "a/b/c"):
        with pytest.raises(InputError, match=rf"hf:{spec}: no such folder \(looked for /.*\): correct the path, or"):
            drafts(f"hf:{spec}")


def test_a_chat_without_a_chat_template_says_what_to_do() -> None:
    chat: Any = [{"role": "user", "content": "p"}]
    for template, cure in (
        (tiny_chat.CHAT, "give --data.template chat"),
        (
            None,
            "the tokenizer has no chat template: give a model that has one, or name the text of one message, "
            "as in prompt=messages.0.content",
        ),
    ):
        encoder = prompts.encoder.Encoder(tiny_chat.tokenizer(template))
        with pytest.raises(InputError, match=rf"here: the prompt is a chat of 1 message: {cure}$"):
            encoder.encode([chat], "plain", ["here"], refuse=lambda bad: None)


def test_the_text_of_one_message_can_be_the_prompt(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"}
    file = put(tmp_path / "chat.jsonl", row)
    (found,) = drafts(f"jsonl:{file}?prompt=messages.0.content&answer=answer")
    assert found.prompt == "What is 2 + 2?"
