"""List what a name on the command line may be: presets, algorithms, rewards, sources, benchmarks."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from paced_fast.config import Config
from paced_fast.config.paced import ALGORITHMS
from paced_fast.config.presets import BASES
from paced_fast.config.short_help import first_line, sentences_of
from paced_fast.data.sources.benchmarks import BENCHMARKS
from paced_fast.data.sources.formats import FORMATS
from paced_fast.data.sources.spec import KEYS, KINDS, keys_of
from paced_fast.errors import nearest

_WIDTH = 110


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one kind of names, or all of them. Exit status 2 for a kind that there is not."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if any(word in ("--help", "-h") for word in words):
        sys.stdout.write(f"usage: paced-fast list [{' | '.join(LISTS)}]\n\n{__doc__}\n")
        return
    unknown = [word for word in words if word not in LISTS]
    if unknown:
        hint = nearest(unknown[0], list(LISTS))
        sys.stderr.write(f"error: nothing to list is called {unknown[0][:80]!r}{hint}: give {', '.join(LISTS)}\n")
        raise SystemExit(2)
    parts = [f"{name}\n{LISTS[name]()}" for name in words or LISTS]
    sys.stdout.write("\n".join(parts))


def presets() -> str:
    """Presets with the first line of their functions."""
    return _table((name, first_line(make)) for name, make in BASES.items())


def algorithms() -> str:
    """Algorithms with what the setting's sentence says of each, and what `auto` comes to."""
    told = dict(re.findall(r"`(\w+)` \(((?:[^()]|\([^()]*\))*)\)", sentences_of(Config)["algorithm"]))
    rows: list[tuple[str, str]] = []
    for name, traits in ALGORITHMS.items():
        auto = f"schedule {traits.rule}, replay {traits.replay}, intercept {traits.intercepts[0]}"
        rows.append((name, f"{told[name]}; {auto}" if name in told else auto))
    return _table(rows)


def rewards() -> str:
    """Rewards with the lines of their package's docstring, which is read without importing it."""
    unwrapped = re.sub(r"\n {8,}", " ", _docstring("paced_fast.rewards"))
    table = _table(re.findall(r"^ {4}(\S+) +(\S.*)$", unwrapped, re.MULTILINE))
    return (
        "--reward NAME is for all data, FILE?reward=NAME for that source; a reward is 1 for right and 0 for wrong"
        f"\n\n{table}\n"
        "a function of yours: one number from 0 to 1 per completion, or None where it cannot decide; completions are\n"
        "texts, and every column of the data is a list with one entry per completion\n"
        "  def last_word(completions, answer, **columns):\n"
        "      return [float(text.split()[-1:] == [right]) for text, right in zip(completions, answer)]\n"
    )


def sources() -> str:
    """Kinds of sources, the keys of each, and the known formats."""
    kinds = _table((f"{kind}:", words) for kind, words in KINDS.items())
    keys = _table((f"{key}=", f"{words} ({_kinds(key)})") for key, words in KEYS.items())
    formats = _table(
        (name, f"prompt {layout.prompt}, {_judged(layout.answers, layout.boxed, layout.tests)}")
        for name, layout in FORMATS.items()
    )
    return (
        "kind:name?key=value&key=value; a file's ending tells its kind, and a name with a slash is a folder or a data "
        f"set of the hub\n\n{kinds}\nkeys (and the kinds that have them)\n{keys}\nformats that are recognised by their "
        f"columns\n{formats}"
    )


def _kinds(key: str) -> str:
    kinds = keys_of(key)
    return "every kind" if len(kinds) == len(KINDS) else ", ".join(kinds)


def _judged(answers: Sequence[str], boxed: str | None, tests: Sequence[str]) -> str:
    if tests:
        return f"tests {' and '.join(tests)}"
    return f"answer {' or '.join((*answers, *([f'the last box of {boxed}'] if boxed else [])))}"


def benchmarks() -> str:
    """Benchmarks with their file and their data set of the hub."""
    return _table(
        (name, f"{file.partition('?')[0].partition(':')[2]}, or {hub.partition('?')[0]} of the hub")
        for name, (file, hub) in BENCHMARKS.items()
    )


LISTS: dict[str, Callable[[], str]] = {
    "presets": presets,
    "algorithms": algorithms,
    "rewards": rewards,
    "sources": sources,
    "benchmarks": benchmarks,
}


def _docstring(module: str) -> str:
    """Docstring of a module that is not imported, because it imports PyTorch."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    rows = list(rows)
    width = min(24, max(len(name) for name, _ in rows)) + 2
    lines: list[str] = []
    for name, words in rows:
        first, *more = textwrap.wrap(words, _WIDTH - width - 2) or [""]
        lines += [f"  {name:<{width}}{first}", *(f"  {'':<{width}}{line}" for line in more)]
    return "\n".join(lines) + "\n"
