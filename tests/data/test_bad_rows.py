"""Rows that cannot be used: each is refused by name with file and line, or left out and counted when that is asked."""

from __future__ import annotations

import datetime
import gzip
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paced_fast.data.prompts import load_table
from paced_fast.data.sources import read
from paced_fast.errors import InputError
from paced_fast.rewards import Scorer

GOOD = [{"prompt": f"{i}+1=", "answer": str(i + 1), "extra": "x"} for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and one control token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    made.chat_template = (
        "{% for m in messages %}{{ m['content'] }}<|end|>{% if m['content'] == 'no' %}{{ raise_exception('never') }}"
        "{% endif %}{% endfor %}"
    )
    return made


def load(spec: str, tokenizer: PreTrainedTokenizerFast, folder: Path, *, bad_rows="error", share=0.5, template="plain"):
    return load_table(
        [spec],
        tokenizer=tokenizer,
        template=template,
        max_prompt_tokens=2_000_000,
        data_dir=str(folder),
        bad_rows=bad_rows,
        max_bad_share=share,
        check=Scorer().problem,
    )


def both_ways(spec: str, where: str, words: str, tokenizer, folder: Path, caplog, template: str = "plain") -> None:
    """The bad row is refused by name; or it alone is missing, and one line says which and why."""
    with pytest.raises(InputError, match=re.escape(where) + ".*" + words) as caught:
        load(spec, tokenizer, folder, template=template)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    with caplog.at_level(logging.WARNING):
        table = load(spec, tokenizer, folder, bad_rows="skip", template=template)
    assert [row.columns["answer"] for row in table.rows] == [row["answer"] for row in GOOD]
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert line == f"{spec}: left out 1 of 7 rows: {message}"


def row(**changes: Any) -> bytes:
    return json.dumps({**GOOD[0], **changes}).encode()


def without(*names: str) -> bytes:
    return json.dumps({name: value for name, value in GOOD[0].items() if name not in names}).encode()


OWN = """
def asks(completions, answer): return [1.0] * len(completions)
def any_row(completions, answer=None, **columns): return [1.0] * len(completions)
def hinted(prompts, completions, hint): return [1.0] * len(completions)
def of_verl(data_source, solution_str, ground_truth, extra_info=None): return 1.0
def of_one(completion, answer): return float(completion == answer)
"""


@pytest.mark.parametrize("prefix", ["", "trl:"])
@pytest.mark.parametrize("lacking", [{}, {"answer": None}])
def test_a_function_gets_the_columns_that_its_parameters_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, prefix: str, lacking: dict[str, Any]
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    own = f"reward={prefix}{tmp_path}/own.py"
    rows = [{"question": "1+1=", "answer": "2"}] * 30 + [{"question": "2+2=", **lacking}]
    for name, answer in (("answer", ""), ("gold", "&answer=gold")):
        renamed = [{name if key == "answer" else key: value for key, value in row.items()} for row in rows]
        (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in renamed))
        lack = f"nothing in its field '{name}'" if lacking else f"no field '{name}', only question"
        with pytest.raises(InputError, match=rf"a.jsonl:31 has {lack}: "):
            load(f"jsonl:a.jsonl?{own}:asks{answer}", tokenizer, tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert len(load(f"jsonl:a.jsonl?{own}:any_row", tokenizer, tmp_path)) == 31
    words = (
        "a.jsonl:1 has no field 'hint', only question, answer: the reward .*hinted' has the parameter 'hint' without"
    )
    with pytest.raises(InputError, match=words):
        load(f"jsonl:a.jsonl?{own}:hinted", tokenizer, tmp_path)
    words = (
        "complete the row" if prefix else "write verl:.*own.py:of_verl if it is a function for verl, complete the row"
    )
    with pytest.raises(InputError, match=f"has no field 'data_source', .* without a default: {words}"):
        load(f"jsonl:a.jsonl?{own}:of_verl", tokenizer, tmp_path)
    with pytest.raises(InputError, match=r"of_one' has the parameter 'completion', .* comes as `completions`, a list"):
        load(f"jsonl:a.jsonl?{own}:of_one", tokenizer, tmp_path)


def message(role: object = "user", content: object = "hi") -> dict[str, object]:
    return {"role": role, "content": content}


LINES: list[tuple[str, bytes, str]] = [
    # what is not a JSON object
    ("not_json", b"{not", "is not JSON"),
    ("half_a_row", row()[:-4], "is not JSON .Expecting value, at character [0-9]+ of the line.:"),
    ("two_rows", row() + row(), "is not JSON .Extra data"),
    ("single_quotes", b"{'prompt': 'a', 'answer': '1'}", "is not JSON"),
    ("a_comma_too_many", row()[:-1] + b",}", "is not JSON"),
    ("a_list", b"[1, 2]", "is a JSON list: write one JSON object per line"),
    ("a_number", b"7", "is a JSON int: write one"),
    ("a_text", b'"prompt"', "is a JSON str: write one"),
    ("null", b"null", "is a JSON NoneType: write one"),
    (
        "larger_than_a_float",
        row(extra="big").replace(b'"big"', b"1e999"),
        "1e999 is too large for a floating-point number",
    ),
    ("nan", row(extra=math.nan), "NaN is not a JSON number"),
    ("infinity", row(extra=math.inf), "Infinity is not a JSON number"),
    ("minus_infinity", row(answer=-math.inf), "-Infinity is not a JSON number"),
    ("a_field_twice", b'{"prompt": "a", "answer": "1", "answer": "2"}', "the field 'answer' occurs twice"),
    ("a_control_character", b'{"prompt": "a\x01", "answer": "1"}', "is not JSON .Invalid control character"),
    ("an_endless_number", b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "is not JSON .Exceeds the limit"),
    ("nested_too_deeply", b'{"prompt": "a", "answer": ' + b"[" * 100_000, "nested too deeply"),
    # bytes
    ("latin_1", b'{"prompt": "caf\xe9", "answer": "1"}', "is not UTF-8 .byte 15"),
    ("utf_16", json.dumps(GOOD[0]).encode("utf-16"), "is not UTF-8 .byte 0"),
    ("half_a_character", b'{"prompt": "\xf0\x9f", "answer": "1"}', "is not UTF-8"),
    ("an_encoded_surrogate", b'{"prompt": "\xed\xa0\x80", "answer": "1"}', "is not UTF-8"),
    ("a_mark_in_the_middle", b"\xef\xbb\xbf" + row(), "byte order mark, but is not the first line"),
    ("half_a_pair", b'{"prompt": "a \\ud83d", "answer": "1"}', "'prompt' contains half of a surrogate pair"),
    ("half_a_pair_as_answer", b'{"prompt": "a", "answer": "\\udc00"}', "'answer' contains half of a surrogate pair"),
    ("half_a_pair_deep_down", row(extra={"a": [1, {"\ud800": 2}]}), "'extra' contains half of a surrogate pair"),
    # prompts
    ("no_prompt", without("prompt"), "has no field 'prompt', only answer, extra"),
    ("null_prompt", row(prompt=None), "has nothing in its field 'prompt': mend the row, or give --data.bad-rows skip"),
    ("empty_prompt", row(prompt=""), "the prompt in 'prompt' is empty"),
    ("blank_prompt", row(prompt=" \n\t"), "the prompt in 'prompt' is empty"),
    ("invisible_prompt", row(prompt="\u200b\ufeff"), "the prompt in 'prompt' is empty"),
    ("a_number_as_prompt", row(prompt=5), "neither text nor a list of messages"),
    ("an_object_as_prompt", row(prompt={"text": "a"}), "neither text nor a list of messages"),
    ("texts_as_prompt", row(prompt=["a"]), "neither text nor a list of messages"),
    ("no_messages", row(prompt=[]), "neither text nor a list of messages"),
    ("nul_in_prompt", row(prompt="a\0b"), "the prompt in 'prompt' contains a NUL character"),
    ("a_mark_in_prompt", row(prompt="\ufeffa"), "the prompt in 'prompt' begins with a byte order mark"),
    ("huge_prompt", row(prompt="a" * 1_000_001), "has 1000001 characters, above the limit of 1000000"),
    # answers
    ("no_answer", without("answer"), "has no field 'answer'"),
    ("null_answer", row(answer=None), "has nothing in its field 'answer'"),
    ("empty_answer", row(answer=""), "the answer in 'answer' is empty"),
    ("blank_answer", row(answer=" \u200b "), "the answer in 'answer' is empty"),
    ("a_list_as_answer", row(answer=["1"]), "the answer in 'answer' is a list"),
    (
        "an_object_as_answer",
        row(answer={"value": 1}),
        "the answer in 'answer' is a dict, not one text or number.*with a dot",
    ),
    ("an_infinite_answer", b'{"prompt": "a", "answer": 1e999}', "1e999 is too large for a floating-point number"),
    ("nul_in_answer", row(answer="1\0"), "the answer in 'answer' contains a NUL"),
    ("a_mark_in_answer", row(answer="\ufeff1"), "the answer in 'answer' begins with a byte order mark"),
    ("huge_answer", row(answer="1" * 100_001), "has 100001 characters, above the limit of 100000"),
    ("no_number_as_answer", row(answer="seven"), "reward 'number' needs a number as answer, not 'seven'"),
    ("an_absurd_number", row(answer="9" * 200), "reward 'number' needs a number as answer"),
]


@pytest.mark.parametrize(("line", "words"), [line[1:] for line in LINES], ids=[line[0] for line in LINES])
def test_lines(line: bytes, words: str, tokenizer, tmp_path, caplog) -> None:
    rows = [json.dumps(good).encode() for good in GOOD]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*rows[:3], b"", line, *rows[3:]]) + b"\n")
    # A blank line is no row, but it counts as a line: editors show the same number.
    both_ways("jsonl:a.jsonl?reward=number", f"{tmp_path}/a.jsonl:5", words, tokenizer, tmp_path, caplog)


CHATS: list[tuple[str, list[dict[str, object]], str]] = [
    ("an_unknown_role", [message("villain")], "the prompt in 'prompt' has the role 'villain': the roles are system"),
    ("a_role_with_a_token", [message("user<|end|>")], "has the role 'user<|end|>'".replace("|", r"\|")),
    ("no_role", [{"content": "hi"}], "has the role None"),
    ("a_list_as_role", [message(["user"])], "has the role .'user'.: the roles are"),
    ("no_content", [{"role": "user"}], "neither text nor a list of messages"),
    ("parts_as_content", [message(content=[{"type": "text", "text": "hi"}])], "neither text nor a list of messages"),
    ("a_number_as_content", [message(), message(content=3)], "neither text nor a list of messages"),
    ("only_blank_messages", [message(content=""), message("assistant", " ")], "the prompt in 'prompt' is empty"),
    ("nul_in_a_message", [message(), message(content="a\0")], "contains a NUL character"),
    ("refused_by_the_template", [message(content="no")], "the chat template refuses the prompt: .*never"),
]


@pytest.mark.parametrize(("chat", "words"), [chat[1:] for chat in CHATS], ids=[chat[0] for chat in CHATS])
def test_chats(chat: list[dict[str, object]], words: str, tokenizer, tmp_path, caplog) -> None:
    rows = [json.dumps(good) for good in GOOD]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:3], row(prompt=chat).decode(), *rows[3:]]))
    both_ways("jsonl:a.jsonl", f"{tmp_path}/a.jsonl:4", words, tokenizer, tmp_path, caplog, template="chat")


COLUMNS: list[tuple[str, str, pa.DataType, Any, str]] = [
    ("null_prompt", "prompt", pa.string(), None, "has nothing in its field 'prompt'"),
    ("blank_prompt", "prompt", pa.string(), " ", "the prompt in 'prompt' is empty"),
    ("nul_in_prompt", "prompt", pa.string(), "a\0", "contains a NUL character"),
    ("not_utf_8", "prompt", pa.string(), b"caf\xe9", "cannot be read .it is not UTF-8"),
    ("not_utf_8_elsewhere", "extra", pa.string(), b"\xff", "cannot be read .it is not UTF-8"),
    ("null_answer", "answer", pa.string(), None, "has nothing in its field 'answer'"),
    ("empty_answer", "answer", pa.string(), "", "the answer in 'answer' is empty"),
    ("nan_answer", "answer", pa.float64(), math.nan, "the answer in 'answer' is nan"),
    ("infinite_answer", "answer", pa.float64(), math.inf, "the answer in 'answer' is inf"),
    ("a_date_as_answer", "answer", pa.date32(), datetime.date(2024, 1, 2), "the answer in 'answer' is a date"),
    ("a_list_as_answer", "answer", pa.list_(pa.string()), ["1"], "the answer in 'answer' is a list"),
    ("bytes_as_answer", "answer", pa.binary(), b"1", "the answer in 'answer' is a bytes"),
    ("no_number", "answer", pa.string(), "two", "reward 'number' needs a number"),
]


@pytest.mark.parametrize(("name", "kind", "value", "words"), [c[1:] for c in COLUMNS], ids=[c[0] for c in COLUMNS])
def test_parquet_rows(name: str, kind: pa.DataType, value: Any, words: str, tokenizer, tmp_path, caplog) -> None:
    """Row groups of three, and the fault in the second: the number counts from the start of the file."""
    if kind in (pa.string(), pa.float64()):
        values = [*GOOD[:4], {**GOOD[0], name: value}, *GOOD[4:]]
        columns = {key: [each[key] for each in values] for key in GOOD[0]}
        if kind == pa.float64():
            columns[name] = [float(text) for text in columns[name]]
        plain = {key: pa.array([_bytes(item) for item in column]) for key, column in columns.items() if key != name}
        made = {key: array.cast(pa.string()) for key, array in plain.items()}
        if kind == pa.string():
            binary = pa.array([_bytes(item) for item in columns[name]], pa.binary())
            made[name] = pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())  # text that nobody checked
        else:
            made[name] = pa.array(columns[name], kind)
        parquet.write_table(pa.table(made), tmp_path / "a.parquet", row_group_size=3)
        spec = "parquet:a.parquet?reward=number"
        if kind == pa.float64():
            with pytest.raises(InputError, match=re.escape(f"{tmp_path}/a.parquet row 4") + ".*" + words):
                load(spec, tokenizer, tmp_path)
            assert len(load(spec, tokenizer, tmp_path, bad_rows="skip")) == 6
        else:
            both_ways(spec, f"{tmp_path}/a.parquet row 4", words, tokenizer, tmp_path, caplog)
        return
    table = pa.table({"prompt": ["a"], "answer": pa.array([value], kind)})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/a.parquet row 0: ") + words):
        load("parquet:a.parquet", tokenizer, tmp_path)


def _bytes(item: Any) -> Any:
    return item.encode() if isinstance(item, str) else item


def test_there_are_more_than_fifty() -> None:
    assert len(LINES) + len(CHATS) + len(COLUMNS) > 65


def test_a_byte_order_mark_at_the_start_of_a_file_is_no_fault(tokenizer, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + row())
    assert load("jsonl:a.jsonl", tokenizer, tmp_path).rows[0].prompt == "0+1="


def test_a_row_that_is_too_long_is_passed_over_without_being_held(tokenizer, tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(read, "_MAX_ROW_BYTES", 1 << 20)
    rows = [json.dumps(good).encode() for good in GOOD]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*rows[:3], row(extra="x" * (3 << 20)), *rows[3:]]))
    where = f"{tmp_path}/a.jsonl:4"
    both_ways("jsonl:a.jsonl", where, "has more than 1 MiB: drop the row", tokenizer, tmp_path, caplog)
    table = pa.Table.from_pylist([*GOOD[:3], {**GOOD[0], "extra": "x" * (3 << 20)}, *GOOD[3:]])
    parquet.write_table(table, tmp_path / "a.parquet")
    where = f"{tmp_path}/a.parquet row 3"
    caplog.clear()
    both_ways("parquet:a.parquet", where, "has more than 1 MiB: drop the row", tokenizer, tmp_path, caplog)


@pytest.mark.parametrize("kept", [10, 100])
def test_a_file_that_was_cut_off_stops_the_run(kept: int, tokenizer, tmp_path) -> None:
    whole = gzip.compress("\n".join(json.dumps({**good, "n": i}) for i in range(500) for good in GOOD).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-kept])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    for name in ("a", "b"):
        with pytest.raises(
            InputError, match=rf"{name}\.jsonl\.gz cannot be read after line [0-9]+ .*: give a complete"
        ):
            load(f"jsonl:{name}.jsonl.gz", tokenizer, tmp_path, bad_rows="skip")


def test_a_damaged_parquet_file_stops_the_run(tokenizer, tmp_path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(GOOD * 100), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[40:90] = bytes(50)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet cannot be read from row 0 on .*: give a complete file"):
        load("parquet:a.parquet", tokenizer, tmp_path, bad_rows="skip")


class TestSkip:
    """Bad rows are left out only when asked, and not more than a share of them."""

    def write(self, folder: Path, bad: int, of: int) -> str:
        rows = [{"prompt": f"p{i}", "answer": "" if i < bad else i} for i in range(of)]
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return "jsonl:a.jsonl"

    def test_the_share_is_a_limit(self, tokenizer, tmp_path, caplog):
        spec = self.write(tmp_path, bad=5, of=100)
        assert len(load(spec, tokenizer, tmp_path, bad_rows="skip", share=0.05)) == 95
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"{spec}: left out 5 of 100 rows: {tmp_path}/a.jsonl:1: the answer in 'answer' is empty")
        assert line.count("is empty") == 3
        assert line.endswith("; and 2 more")
        words = r"5 of 100 rows of 'jsonl:a.jsonl' are bad, more than --data.max-bad-share 0.049 allows \(.*a.jsonl:1"
        with pytest.raises(InputError, match=words):
            load(spec, tokenizer, tmp_path, bad_rows="skip", share=0.049)

    def test_a_source_of_bad_rows_only_is_refused(self, tokenizer, tmp_path):
        with pytest.raises(InputError, match=r"every row of 'jsonl:a\.jsonl' is bad"):
            load(self.write(tmp_path, bad=4, of=4), tokenizer, tmp_path, bad_rows="skip", share=1.0)

    def test_each_source_has_its_own_share(self, tokenizer, tmp_path):
        rows = [{"prompt": f"q{i}", "answer": 1} for i in range(400)]
        (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
        specs = ["jsonl:b.jsonl", self.write(tmp_path, bad=5, of=100)]
        with pytest.raises(InputError, match=r"5 of 100 rows of 'jsonl:a\.jsonl'"):
            load_table(
                specs,
                tokenizer=tokenizer,
                template="plain",
                max_prompt_tokens=99,
                data_dir=str(tmp_path),
                bad_rows="skip",
                max_bad_share=0.02,
            )

    def test_draws_do_not_depend_on_what_is_bad(self, tokenizer, tmp_path):
        """The same draw with and without bad rows in it, those left out aside; a bad row outside it is not met."""
        good = self.write(tmp_path, bad=0, of=100) + "?seed=3&size=20"
        whole = [row.prompt for row in load(good, tokenizer, tmp_path).rows]
        self.write(tmp_path, bad=10, of=100)
        bad = {f"p{i}" for i in range(10)}
        kept = [row.prompt for row in load(good, tokenizer, tmp_path, bad_rows="skip").rows]
        assert kept == [prompt for prompt in whole if prompt not in bad]
        assert 10 < len(kept) < 20
        assert len(load("jsonl:a.jsonl?rows=10:", tokenizer, tmp_path)) == 90

    def test_rows_met_while_shares_are_dealt_count_once(self, tokenizer, tmp_path, caplog):
        rows = [json.dumps({"prompt": f"p{i}", "answer": i}) for i in range(40)]
        (tmp_path / "a.jsonl").write_text("\n".join([*rows, "{", json.dumps({"answer": 1})]))
        parts = []
        for share in ("0:0.5", "0.5:1"):
            caplog.clear()
            spec = f"jsonl:a.jsonl?share={share}&prompt=prompt"
            parts += load(spec, tokenizer, tmp_path, bad_rows="skip").rows
            assert len([r for r in caplog.records if "left out 2 of " in r.getMessage()]) == 1
            with pytest.raises(InputError, match=r"a\.jsonl:41 is not JSON"):
                load(spec, tokenizer, tmp_path)
        assert len(parts) == 40

    def test_text_that_the_tokenizer_cannot_read(self, tmp_path, caplog):
        from paced_fast.data.prompts import character_tokenizer

        digits = character_tokenizer("0123456789+= #", pad=" ", stop="#")
        rows = [json.dumps(good) for good in GOOD]
        # An x is outside the alphabet; the stop token cannot be told from a character of the text.
        for text, words in (
            ("1+x=", "the tokenizer cannot encode '1.x='"),
            ("1#", "only as a control token: fix the row"),
        ):
            (tmp_path / "a.jsonl").write_text("\n".join([*rows[:3], row(prompt=text).decode(), *rows[3:]]))
            caplog.clear()
            both_ways("jsonl:a.jsonl", f"{tmp_path}/a.jsonl:4", words, digits, tmp_path, caplog)


def test_ids_that_repeat_are_said(tokenizer, tmp_path, caplog) -> None:
    rows = [{"id": i % 4, "prompt": f"p{i}", "answer": i} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(load("jsonl:a.jsonl", tokenizer, tmp_path)) == 6
    (line,) = [record.getMessage() for record in caplog.records]
    path = f"{tmp_path}/a.jsonl"
    assert line == f"jsonl:a.jsonl: 2 rows have the id of an earlier row ({path}:5 and {path}:1 have the id 0)"


def test_a_reward_of_the_user_may_say_what_it_cannot_judge(tokenizer, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Even:\n"
        "    def __call__(self, prompts, completions, **columns):\n"
        "        return [1.0] * len(completions)\n"
        "    def problem(self, columns):\n"
        "        return None if columns['answer'] % 2 == 0 else f'{columns[\"answer\"]} is odd'\n"
        "even = Even()\n"
    )
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": "p", "answer": i}) for i in (2, 3, 4)))
    spec = f"jsonl:a.jsonl?reward={tmp_path}/mine.py:even"
    with pytest.raises(InputError, match=r"a\.jsonl:2: 3 is odd"):
        load(spec, tokenizer, tmp_path)
    assert [row.columns["answer"] for row in load(spec, tokenizer, tmp_path, bad_rows="skip").rows] == [2, 4]


@pytest.mark.parametrize("reward", ["exact", "number"])
def test_text_rewards_say_what_they_cannot_judge(reward: str) -> None:
    ask = Scorer().problem
    assert ask(reward, {"answer": 7}) is None
    for columns in ({}, {"answer": None}, {"answer": " "}):
        assert ask(reward, columns) == f"reward {reward!r} needs an answer, which the row lacks: drop the row"
    assert (ask(reward, {"answer": "seven"}) is None) == (reward == "exact")
