"""Sources: layouts recognised by their fields, the exact rows a source selects, and reading no more than those."""

from __future__ import annotations

import gzip
import json
import logging
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from steady import takes_less

from paced_fast.data.sources import find_file, parse_source, read, read_drafts
from paced_fast.data.sources.formats import FORMATS, boxed
from paced_fast.data.sources.spec import FORMAT_NAMES
from paced_fast.errors import InputError


def data_folder(name: str) -> Path:
    """The folder that holds the data file `name`; skips the test when there is none."""
    repository = Path(__file__).resolve().parents[2]
    folders = [os.environ.get("PACED_FAST_DATA"), repository / "data", repository.parent / "shared" / "data"]
    for folder in folders:
        if folder and (Path(folder) / name).is_file():
            return Path(folder)
    pytest.skip(f"needs {name}: set PACED_FAST_DATA")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def drafts(folder: Path, query: str = "", *, kind: str = "jsonl") -> list[Any]:
    return read_drafts(f"{kind}:a.{kind}{'?' * bool(query)}{query}", str(folder))[1]


WRAPPED = [{"role": "user", "content": "Solve the problem. The last line is Answer: $Answer.\n\nWhat is 2+2?"}]
STARTER = "class Solution:\n    def add(self, a: int) -> int:\n"
WITH_STARTER = "Add one.\n\nStart from this code:\n```python\nclass Solution:\n    def add(self, a: int) -> int:\n```"
STDIN = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
LAYOUTS: list[tuple[str, dict[str, Any], str, Any]] = [
    # format, row, prompt, answer
    ("gsm8k", {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}, "1+1?", "2"),
    (
        "math",
        {"problem": "1+1?", "level": "Level 1", "type": "Algebra", "solution": r"So \boxed{\frac{1}{2}}."},
        "",
        "",
    ),
    (
        "math",
        {"problem": "p", "solution": "words", "answer": "204", "subject": "Algebra", "unique_id": "a"},
        "p",
        "204",
    ),
    ("math", {"id": 0, "problem": "p", "answer": 27.0, "url": "u", "question": "p"}, "p", 27.0),
    ("deepscaler", {"problem": "p", "answer": "-3", "solution": ""}, "p", "-3"),
    (
        "dapo",
        {
            "data_source": "math_dapo",
            "prompt": WRAPPED,
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        "",
        "34",
    ),
    ("dapo", {"prompt": "p", "solution": "34", "source_prompt": WRAPPED, "data_source": "d"}, "p", "34"),
    (
        "dapo",
        {"prompt": "p", "solution": "5", "reward_model": {"ground_truth": "34", "style": "rule"}, "ability": "MATH"},
        "p",
        "34",
    ),
    ("deepcoder", {"problem": "p", "solutions": ["s"], "tests": STDIN, "metadata": {"a": 1}}, "p", None),
    ("deepcoder", {"problem": "Add one.", "starter_code": STARTER, "tests": "[1]"}, WITH_STARTER, None),
    ("taco", {"question": "p", "solutions": "[]", "starter_code": "", "input_output": STDIN}, "p", None),
    ("taco", {"problem_id": 1, "question": "Add one.", "starter_code": STARTER, "input_output": "{}"}, "", None),
    (
        "livecodebench",
        {
            "question_title": "t",
            "question_content": "p",
            "public_test_cases": "[1]",
            "private_test_cases": "eJw",
            "starter_code": "",
        },
        "p",
        None,
    ),
    (
        "humaneval",
        {"task_id": "H/0", "prompt": "def f():\n", "canonical_solution": "", "test": "assert", "entry_point": "f"},
        "def f():\n",
        None,
    ),
    ("plain", {"input": "p", "target": 43.0}, "p", 43.0),
    ("plain", {"question": "p", "answer": "7"}, "p", "7"),
    ("plain", {"query": "p", "ground_truth": "7"}, "p", "7"),
]
PROGRAMS = ("deepcoder", "taco", "livecodebench", "humaneval")


class TestFormats:
    @pytest.mark.parametrize(("name", "row", "prompt", "answer"), LAYOUTS)
    def test_rows_are_recognised_and_keep_their_fields(self, name, row, prompt, answer, tmp_path, caplog):
        write(tmp_path / "a.jsonl", row, row)
        with caplog.at_level(logging.INFO):
            first, _ = drafts(tmp_path)
        line = caplog.records[0].getMessage()
        column = next(iter(row)) if name == "plain" else FORMATS[name].prompt
        assert line.startswith(
            f"jsonl:a.jsonl: prompt from `{column}`, {'tests' if name in PROGRAMS else 'answer'} from "
        )
        assert line.endswith("`" if name == "plain" else f" (format {name})")
        expected = {
            "problem": (r"1+1?", r"\frac{1}{2}"),
            "prompt": (WRAPPED, answer),
            "question": (WITH_STARTER, answer),
        }
        if prompt == "":
            # Of the longer rows: the prompt by its field.
            prompt, answer = expected[column]
        assert (first.prompt, first.columns.get("answer")) == (prompt, answer)
        assert first.reward == ("code" if name in PROGRAMS else "math")
        assert {**first.columns, "answer": 0} == {**{k: v for k, v in row.items() if k != column}, "answer": 0}

    @pytest.mark.parametrize(("name", "row", "prompt", "answer"), LAYOUTS)
    def test_a_name_does_what_recognition_does(self, name, row, prompt, answer, tmp_path, caplog):
        write(tmp_path / "a.jsonl", row)
        assert drafts(tmp_path, f"format={name}") == drafts(tmp_path)
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        (one,), (other,) = drafts(tmp_path, kind="parquet"), drafts(tmp_path)
        assert (one.prompt, one.columns.get("answer"), one.reward) == (
            other.prompt,
            other.columns.get("answer"),
            other.reward,
        )

    def test_every_name_has_a_layout_and_a_case(self):
        assert {"plain", *FORMATS} == set(FORMAT_NAMES) == {name for name, *_ in LAYOUTS}

    def test_keys_come_before_the_layout(self, tmp_path, caplog):
        write(tmp_path / "a.jsonl", {"question": "q", "answer": "a #### 1", "other": "b ## 2", "text": "t"})
        (draft,) = drafts(tmp_path, "format=gsm8k&answer=other&answer_after=##&reward=number")
        assert (draft.prompt, draft.columns["answer"], draft.reward) == ("q", "2", "number")
        (draft,) = drafts(tmp_path, "format=gsm8k&prompt=text")
        assert (draft.prompt, draft.columns["answer"]) == ("t", "1")
        (draft,) = drafts(tmp_path, "prompt=question")  # a given field means no layout
        assert draft.columns["answer"] == "a #### 1"
        assert not caplog.records

    def test_rows_with_prompt_and_answer_need_no_recognition(self, tmp_path, caplog):
        write(tmp_path / "a.jsonl", {"prompt": "p", "answer": "1", "test": "t", "entry_point": "f", "solution": "s"})
        with caplog.at_level(logging.INFO):
            (draft,) = drafts(tmp_path)
        assert (draft.prompt, draft.columns["answer"], draft.reward) == ("p", "1", "math")
        assert not caplog.records

    def test_what_is_unknown_lists_its_fields_and_the_mapping_to_write(self, tmp_path):
        write(tmp_path / "a.jsonl", {"frage": "1+1?", "antwort": 2})
        words = (
            "source 'jsonl:a.jsonl': no known format has the fields frage, antwort: name the fields of prompt and "
            "answer, as in 'jsonl:a.jsonl?prompt=FIELD&answer=FIELD', or give format=NAME, one "
            "of plain, gsm8k, math, dapo, deepscaler, deepcoder, livecodebench, humaneval, taco"
        )
        with pytest.raises(InputError) as caught:
            drafts(tmp_path)
        assert str(caught.value) == words
        (draft,) = drafts(tmp_path, "prompt=frage&answer=antwort")
        assert (draft.prompt, draft.columns["answer"]) == ("1+1?", 2)

    @pytest.mark.parametrize("reward", ["exact", "number", "math"])
    def test_programs_have_no_answer_to_compare_with(self, reward, tmp_path):
        write(tmp_path / "a.jsonl", {"question": "p", "input_output": STDIN})
        with pytest.raises(
            InputError, match=f"format taco have tests for programs.* reward 'code' judges and '{reward}' cannot"
        ):
            drafts(tmp_path, f"reward={reward}")
        assert drafts(tmp_path, "reward=mine.py:judge")[0].reward == "mine.py:judge"

    @pytest.mark.parametrize("tests", [None, "", [], {}])
    def test_a_program_without_tests_is_a_bad_row(self, tests, tmp_path):
        good = {"question_content": "p", "public_test_cases": "[1]", "private_test_cases": ""}
        write(tmp_path / "a.jsonl", good, {**good, "public_test_cases": tests})
        words = r"a\.jsonl:2 has no tests in public_test_cases or private_test_cases"
        with pytest.raises(InputError, match=words):
            drafts(tmp_path)

    def test_a_solution_without_a_box_is_a_bad_row(self, tmp_path):
        write(tmp_path / "a.jsonl", {"problem": "p", "solution": r"\boxed{1}"}, {"problem": "q", "solution": "two"})
        with pytest.raises(
            InputError, match=r"a\.jsonl:2 has neither a field 'answer' nor a \\boxed\{\} in 'solution'"
        ):
            drafts(tmp_path)

    @pytest.mark.parametrize(
        ("text", "inside"),
        [
            (r"\boxed{1} then \boxed{2}", "2"),
            (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
            (r"\fbox{3} \boxed {4}", "4"),
            (r"\fboxed{3}", "3"),
            (r"\boxed{ x }", "x"),
            (r"\boxed{1", None),
            ("none", None),
            (None, None),
        ],
    )
    def test_boxed(self, text, inside):
        assert boxed(text) == inside

    @pytest.mark.parametrize(
        ("name", "count", "answer"),
        [
            ("gsm8k_train", 7473, "72"),
            ("gsm8k_test", 1319, "18"),
            ("aime24", 30, "204"),
            ("amc23", 40, 27.0),
            ("mawps_addsub", 395, 43.0),
            ("mawps_singleop", 562, 14.0),
        ],
    )
    def test_files_need_nothing_but_their_name(self, name, count, answer):
        folder = data_folder(f"{name}.jsonl")
        _, rows = read_drafts(f"jsonl:{name}.jsonl", str(folder))
        assert len(rows) == count
        assert (rows[0].columns["answer"], rows[0].reward, rows[0].slice) == (answer, "math", name)
        assert all(isinstance(row.prompt, str) and row.prompt for row in rows)
        assert rows[-1].where.startswith(f"{folder}/{name}.jsonl:")


SELECTED = {
    # Written down once: a run of this version draws what a run of any other did.
    "seed=3&size=10": [64, 50, 76, 23, 37, 65, 25, 16, 68, 4],
    "rows=5:40&seed=9&size=12": [42, 35, 14, 39, 16, 21, 11, 23, 27, 46, 9, 29],
    "share=0.2:0.7&seed=4&size=9": [82, 99, 64, 2, 16, 25, 67, 58, 47],
    "rows=10:&size=4": [12, 13, 14, 15],
    "share=0:0.5&size=6": [6, 8, 12, 13, 14, 15],
    "rows=:50&share=0.5:1&seed=1": [
        *(51, 56, 20, 19, 50, 1, 7, 57, 42, 29, 18, 36, 35, 0),
        *(11, 48, 9, 26, 43, 30, 32, 4, 16, 2, 55, 40, 5),
    ],
}


class TestSelection:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        """A hundred lines, every seventh blank, as text, compressed and as parquet of row groups of 16."""
        folder = tmp_path_factory.mktemp("rows")
        rows = [{"prompt": f"p{i % 60}", "answer": i} for i in range(100)]
        write(folder / "a.jsonl", *("" if i % 7 == 3 else row for i, row in enumerate(rows)))
        (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
        table = pa.Table.from_pylist([row for i, row in enumerate(rows) if i % 7 != 3])
        parquet.write_table(table, folder / "a.parquet", row_group_size=16)
        return folder

    @pytest.mark.parametrize("name", ["jsonl:a.jsonl", "jsonl:a.jsonl.gz", "parquet:a.parquet"])
    @pytest.mark.parametrize("query", SELECTED)
    def test_a_source_selects_the_same_rows_for_ever(self, folder, name, query):
        _, rows = read_drafts(f"{name}?{query}", str(folder))
        assert [row.columns["answer"] for row in rows] == SELECTED[query]
        assert {row.slice for row in rows} == {"a"}

    def test_rows_are_named_by_their_line_whatever_the_order(self, folder):
        rows = drafts(folder, "seed=3&size=10")
        assert [row.where for row in rows] == [f"{folder}/a.jsonl:{row.columns['answer'] + 1}" for row in rows]
        rows = drafts(folder, "seed=3&size=10", kind="parquet")
        kept = [i for i in range(100) if i % 7 != 3]
        assert [row.where for row in rows] == [
            f"{folder}/a.parquet row {kept.index(row.columns['answer'])}" for row in rows
        ]

    def test_hub_rows_are_looked_up_by_number(self, monkeypatch):
        import sys
        import types

        asked = []

        class Rows(list):
            def __getitem__(self, row):
                asked.append(row)
                return list.__getitem__(self, row)

        data = Rows({"prompt": f"p{i}", "answer": i} for i in range(1000))
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *a, **k: data))
        monkeypatch.setattr(read, "_ask_hub", lambda name: None)
        _, rows = read_drafts("hf:a/b?rows=100:&seed=1&size=3", None)
        assert len(rows) == 3
        assert set(asked) == {100, *(row.columns["answer"] for row in rows)}  # the first shows the layout


class TestStreams:
    def test_nothing_behind_the_rows_is_read(self, tmp_path):
        good = {"prompt": "p", "answer": 1}
        write(tmp_path / "a.jsonl", *([good] * 10), "{no json")
        path = tmp_path / "a.jsonl"
        with path.open("ab") as file:
            file.truncate(1 << 33)  # eight gigabytes of nothing: reading on takes minutes
        assert takes_less(5.0, lambda: drafts(tmp_path, "rows=2:8&seed=1&share=0:1"), tries=2)
        assert len(drafts(tmp_path, "rows=2:8&seed=1&share=0:1")) == 6
        with pytest.raises(InputError, match=r"a\.jsonl:11 is not JSON"):
            drafts(tmp_path, "rows=0:11")

    def test_row_groups_without_a_wanted_row_are_not_read(self, tmp_path, monkeypatch):
        table = pa.Table.from_pylist([{"prompt": f"p{i}", "answer": i, "extra": "x"} for i in range(100)])
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
        asked = []
        plain = parquet.ParquetFile.iter_batches

        def counted(file, *args, **kwargs):
            asked.append((kwargs["row_groups"], kwargs["columns"]))
            return plain(file, *args, **kwargs)

        monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
        rows = drafts(tmp_path, "rows=25:41", kind="parquet")
        assert [row.columns["answer"] for row in rows] == list(range(25, 41))
        # The first row shows the layout, then come the rows.
        assert asked[0] == ([2], None)
        assert asked[-3:] == [([2], None), ([3], None), ([4], None)]
        assert {group for groups, _ in asked for group in groups} == {2, 3, 4}
        asked.clear()
        drafts(tmp_path, "rows=0:20&share=0:0.5&size=2", kind="parquet")
        assert (["prompt"]) in [columns for _, columns in asked]  # dealing shares reads prompts alone

    def test_a_missing_file_and_a_strange_name(self, tmp_path):
        for name in ("no.jsonl", "~nobody-at-all/a.jsonl", "x" * 300 + ".jsonl", "a\0b.jsonl"):
            assert find_file(parse_source(f"jsonl:{name}"), str(tmp_path)) is None
            with pytest.raises(InputError, match="no such file"):
                read_drafts(f"jsonl:{name}", str(tmp_path))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "query"),
        [
            ("jsonl", "size=500&seed=1"),
            ("jsonl", "rows=:20000&share=0:0.5&size=500&seed=1"),
            ("parquet", "size=500&seed=1"),
            ("parquet", "rows=150000:150500"),
        ],
    )
    def test_memory_is_that_of_the_selected_rows(self, kind, query, big):
        """200k rows of 600 bytes, 120 MB as text: 500 of them are 0.5 MB, numbers of all rows 8 bytes each."""
        tracemalloc.start()
        _, rows = read_drafts(f"{kind}:{big}/a.{kind}?{query}", None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(rows) == 500
        assert peak < 12e6, peak

    @pytest.fixture(scope="class")
    def big(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("big")
        with (folder / "a.jsonl").open("w") as file:
            for i in range(200_000):
                file.write(f'{{"prompt": "{i} {"x" * 560}", "answer": {i}}}\n')
        assert (folder / "a.jsonl").stat().st_size > 118e6
        columns = {"prompt": [f"{i} {'x' * 560}" for i in range(200_000)], "answer": list(range(200_000))}
        parquet.write_table(pa.table(columns), folder / "a.parquet", row_group_size=20_000)
        return folder


def test_the_limit_of_a_row_is_far_above_a_row_of_tests() -> None:
    assert read._MAX_ROW_BYTES == 64 << 20
