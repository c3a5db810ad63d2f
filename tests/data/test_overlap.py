"""Prompts in training and evaluation alike: what counts as the same, and what the setting does about it."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import tiny_run

from paced_fast.config import DataConfig
from paced_fast.data.prompts import Overlap, duplicates, overlap
from paced_fast.data.prompts.overlap import normalised
from paced_fast.data.records import PromptRow, PromptTable
from paced_fast.errors import InputError
from paced_fast.run.start.tables import _apart


def table(*prompts: str | list[dict[str, str]], name: str = "a") -> PromptTable:
    return PromptTable(
        rows=tuple(
            PromptRow(prompt=prompt, token_ids=(0,), reward="r", slice="s", columns={}, where=f"{name}:{i}")
            for i, prompt in enumerate(prompts)
        )
    )


def same(one: str | list[dict[str, str]], other: str | list[dict[str, str]]) -> bool:
    return bool(overlap(table(one), table(other)).train)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2 + 3?", "what is 2+3"),
        ("What is  2 + 3 ?\n", "What is 2 + 3?"),
        ("\uff37\uff48\uff41\uff54 is \uff12?", "What is 2?"),  # full-width forms
        ("the \ufb01rst", "The first"),  # a ligature
        ("5 \u2212 3", "5 - 3"),
        ("a well-known fact", "A well known fact!"),
        ("Janet\u2019s \u201cducks\u201d", 'Janet\'s "ducks"'),
        ("He has 1,200 eggs.", "he has 1200 eggs"),
        ("Find $x$ if $2x = 4$.", "Find x if 2x=4"),
        ("stra\u00dfe", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("     1951=2:", "1951=2"),
        ([{"role": "user", "content": "What is 2?"}], "What is 2?"),
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2?"}], "what is 2"),
        ("?!", "?!"),
    ],
)
def test_dress_does_not_count(one, other):
    assert same(one, other)
    assert same(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 - 4?", "What is 3 + 4?"),
        ("What is 3 - 4?", "What is 3 4?"),
        ("What is 1.5 + 2?", "What is 15 + 2?"),
        ("What is 5!", "What is 5?"),
        ("2*(3+4)", "2*3+4"),
        ("x < y", "x > y"),
        ("x^2", "x_2"),
        ("50% of 8", "50 of 8"),
        ("-3 = x", "3 = x"),
        ("12 3", "1 23"),
        ("a b", "ab"),
        ("?!", "!?"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "a"),
    ],
)
def test_meaning_counts(one, other):
    assert not same(one, other)


def test_normalised_text_of_a_word_problem() -> None:
    assert normalised("Janet\u2019s 16 eggs (1,000 g, 2.5 each) cost $3!  Well-known -- x-1?") == (
        "janet s 16 eggs ( 1000 g 2.5 each ) cost 3 ! well known - - x - 1"
    )


def test_counts_and_pairs() -> None:
    train = table("a", "B.", "c", "b", "d", "A", "e")
    held_out = table("b?", "x", "a", "B", "d", name="b")
    found = overlap(train, held_out)
    pairs = (("a:0", "b:2"), ("a:1", "b:0"), ("a:3", "b:0"))
    assert found == Overlap(train=(0, 1, 3, 4, 5), eval_rows=4, pairs=pairs, by_slice={"s": 5}, slices=frozenset("s"))
    assert str(found) == "5 training prompts are also held-out prompts (a:0 is b:2; a:1 is b:0; a:3 is b:0; ...)"
    assert str(overlap(table("a"), held_out)) == "1 training prompt is also a held-out prompt (a:0 is b:2)"
    assert (
        overlap(table("z"), held_out)
        == overlap(table(), held_out)
        == Overlap(train=(), eval_rows=0, pairs=(), by_slice={}, slices=frozenset())
    )
    assert duplicates(train) == ((3, 1), (5, 0))


class TestSetting:
    TRAIN, HELD_OUT = table("a", "b", "c", "C!"), table("B?", name="b")

    def test_warn(self, caplog):
        with caplog.at_level(logging.INFO):
            assert _apart(self.TRAIN, self.HELD_OUT, DataConfig()) == (self.TRAIN, {"s": 1})
        assert [record.getMessage() for record in caplog.records] == [
            "1 training prompt is also a held-out prompt (a:1 is b:0): --data.overlap drop leaves them out of training",
            "1 of 4 training prompts repeat an earlier one (a:3 repeats a:2)",
        ]

    @pytest.mark.parametrize(
        ("texts", "drawn", "told"),
        [
            (("a", "b", "c") * 5, 16, "3 different prompts to train on, but a step draws 16, so that it has"),
            (
                ("a",),
                2,
                "1 different prompt to train on, but a step draws 2, so that it has the same ones several times: ",
            ),
            (("a", "b", "c"), 3, None),
            (("a", "A", "b", "c"), 3, None),
        ],
    )
    def test_fewer_different_prompts_than_a_step_draws_are_told_once(self, texts, drawn, told, caplog):
        with caplog.at_level(logging.WARNING):
            _apart(table(*texts), table(), DataConfig(), drawn=drawn)
        lines = [record.getMessage() for record in caplog.records]
        if told is None:
            assert lines == []
        else:
            (line,) = lines
            assert line.startswith(told)
            remedy = f": give more prompts, or --generation.prompts-per-step {told[0]}"
            assert line.endswith(remedy)

    @pytest.mark.parametrize(("headline", "level"), [((), "WARNING"), (("s", "t"), "WARNING"), (("t",), "INFO")])
    def test_slices_beside_the_headline_are_no_reason_to_warn(self, headline, level, caplog):
        with caplog.at_level(logging.INFO):
            _apart(self.TRAIN, self.HELD_OUT, DataConfig(headline=headline))
        assert [record.levelname for record in caplog.records] == [level, "INFO"]
        assert ("only of s, which the headline leaves out" in caplog.text) == (level == "INFO")

    def test_drop(self, caplog):
        kept, repeated = _apart(self.TRAIN, self.HELD_OUT, DataConfig(overlap="drop"))
        assert repeated == {}
        assert [row.prompt for row in kept.rows] == ["a", "c", "C!"]
        assert "1 training prompt is also a held-out prompt (a:1 is b:0): left out of training" in caplog.text
        with pytest.raises(InputError, match="leaves nothing to train on"):
            _apart(table("b"), self.HELD_OUT, DataConfig(overlap="drop"))

    def test_error(self):
        with pytest.raises(
            InputError, match=r"1 training prompt is also a held-out .*a:1 is b:0.: .*--data.overlap drop"
        ):
            _apart(self.TRAIN, self.HELD_OUT, DataConfig(overlap="error"))
        assert _apart(self.TRAIN, table("x"), DataConfig(overlap="error")) == (self.TRAIN, {})

    def test_a_run_heeds_it(self, tmp_path):
        """The held-out rows are trained on by mistake, and one small problem is in both splits: drop takes them out."""
        rewards = tiny_run.write_rewards(tmp_path)
        settings = tiny_run.config(rewards)
        held_out = settings.data.eval[0]
        data = dataclasses.replace(settings.data, train=(settings.data.train[0], f"{held_out}&slice=s"))
        both = dataclasses.replace(settings, data=data)
        refused = dataclasses.replace(both, data=dataclasses.replace(data, overlap="error"))
        with pytest.raises(InputError, match="13 training prompts are also held-out prompts"):
            tiny_run.build(refused, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        run = tiny_run.build(
            dataclasses.replace(both, data=dataclasses.replace(data, overlap="drop")), tmp_path / "run"
        )
        assert len(run.trainer.collector.table) == 40 - 1
        assert len(run.eval_table) == 12
        assert run.repeated == {}
        assert sum(tiny_run.build(both, tmp_path / "both").repeated.values()) == 13
