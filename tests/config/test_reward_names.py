"""What is told of a reward before its file is run: nothing that running it would not tell, in the same words."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from paced_fast.config.reward_names import check_file, missing_column
from paced_fast.data.sources import MissingColumn
from paced_fast.errors import InputError
from paced_fast.rewards import Scorer
from paced_fast.rewards.loading import load_reward

FILE = """
    import functools
    from functools import partial as taken

    def plain(completions, answer, gold): ...
    async def late(prompts, completions, *, gold, note=None): ...
    def has_all(completions, answer, gold=None, **columns): ...
    def by_place(completions, /, gold): ...
    def anything(*rows, **columns): ...
    def optional(completions, gold="g", answer="a"): ...
    def twice(completions): ...
    def twice(completions, gold): ...
    def judged(completions, gold): ...
    judged.problem = lambda columns: None
    def wrapped(completions, gold): ...
    wrapped = functools.partial(wrapped, gold=1)
    @functools.cache
    def decorated(completions, gold): ...
    if True:
        def inner(completions, gold): ...
    short = lambda completions, gold: ...
    class Reward:
        def __call__(self, completions, gold): ...
    held = Reward()
"""
SURE = {"plain": "gold", "late": "gold", "by_place": "gold"}
"""Functions that lack a column of the rows below, which the file shows without being run."""
NAMES = ("plain", "late", "has_all", "by_place", "anything", "optional", "twice", "judged", "wrapped", "decorated")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "reward.py"
    path.write_text(textwrap.dedent(FILE))
    return str(path)


@pytest.mark.parametrize("name", [*NAMES, "inner", "short", "held", "taken"])
def test_a_column_that_a_function_lacks_is_told_if_the_file_shows_it(name: str, file: str) -> None:
    reward, columns = f"{file}:{name}", {"prompt": "p", "answer": "a"}
    expected = MissingColumn(reward, SURE[name]) if name in SURE else None
    assert missing_column(reward, columns) == expected
    assert missing_column(reward, {**columns, "gold": 1}) is None
    if expected is not None:
        assert Scorer([reward]).problem(reward, columns) == expected, "running it tells the same"
    check_file(reward)


def test_an_answer_of_none_fills_no_parameter_and_sums_are_looked_through(file: str) -> None:
    columns = {"prompt": "p", "answer": None, "gold": 1}
    assert missing_column(f"{file}:plain", columns) == MissingColumn(f"{file}:plain", "answer")
    assert missing_column(f"0.5*exact+0.5*{file}:plain", columns) == MissingColumn(f"{file}:plain", "answer")
    for name in ("exact", "code", "json:loads", f"verl:{file}:plain", f"trl:{file}:plain"):
        assert missing_column(name, columns) is None


@pytest.mark.parametrize(
    "name",
    [
        *("maht", "given:own", "trl:", "verl:", "{file}", "{file}:", "trl:{file}", "{absent}", "{absent}:plain"),
        *("trl:{absent}:plain", "{file}:plane", "0.5*exact+0.5*maht", "0.5*exact+0.5*{file}:plane", "exact+exact"),
    ],
)
def test_a_name_that_nothing_has_is_told_in_the_words_of_its_loading(name: str, file: str, tmp_path: Path) -> None:
    name = name.format(file=file, absent=tmp_path / "absent.py")
    with pytest.raises(InputError) as early:
        check_file(name)
    with pytest.raises(InputError) as late:
        Scorer([name])
    assert str(early.value) == str(late.value)


def test_a_function_that_is_named_as_python_imports_it_is_recognised(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^unknown reward 'reward.plain' \(did you mean reward.py:plain\?\): use one"):
        check_file("reward.plain")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("from elsewhere import *", "any name may come from there"),
        ("globals()['mi' + 'ne'] = len", "names are made when it runs"),
        ("def __getattr__(name): return len", "the module answers for any name"),
        ("from elsewhere import mine", "the name is there"),
        ("def broken(:", "what is no Python is told by running it"),
    ],
)
def test_a_file_that_may_have_the_function_passes(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(f"{text}\n# {'mine' if 'broken' in text else ''}")
    check_file(f"{tmp_path / 'reward.py'}:mine")
    assert missing_column(f"{tmp_path / 'reward.py'}:mine", {}) is None, why


def test_no_file_is_run(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text("raise SystemExit('it runs')\ndef mine(completions, gold): ...\n")
    check_file(f"{path}:mine")
    assert missing_column(f"{path}:mine", {}) == MissingColumn(f"{path}:mine", "gold")
    with pytest.raises(InputError, match="it runs"):
        load_reward(f"{path}:mine")
