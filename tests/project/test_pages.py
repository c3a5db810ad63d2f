"""README and the pages of docs/: every link, path, command, option and message that they name exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from benchmarks import run as benchmark
from paced_fast.config import Config, WarningName, flatten
from paced_fast.config.paced import ALGORITHMS, RULES
from paced_fast.config.reward_names import BUILT_IN
from paced_fast.data.sources.spec import KEYS, KINDS, parse_source

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OTHERS = ("README.md", "CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md")
PAGES = [*(ROOT / name for name in OTHERS), *sorted(DOCS.glob("*.md"))]
BASES = (ROOT, ROOT / "paced_fast", ROOT / "kernels", ROOT / "kernels" / "paced_kernels")
"""Folders that paths in the text may be relative to, besides that of the page."""
ENDINGS = (".py", ".md", ".toml", ".sh", ".css", ".txt", "/")
NOT_HERE = ("runs", "data", "checkpoints", "plots", "path", "package", "my", ".cache", "...")
"""First parts of paths that belong to a user's own folder."""
MADE = ("benchmarks/results/sample_efficiency/",)
"""Folders that are not there before the first result."""

_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """The text without blocks of code; lines keep their numbers."""
    return _FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)


def anchors(page: Path) -> set[str]:
    """Names of the headings of a page, as GitHub makes them."""
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (name := slug if number == 0 else f"{slug}-{number}") in names:
            number += 1
        names.add(name)
    return names


def broken_links(page: Path) -> Iterator[str]:
    """Relative links of a page whose file or heading does not exist."""
    for target in _LINK.findall(_SPAN.sub("code", prose(page.read_text(encoding="utf-8")))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(path):
            yield f"{target}: no such heading"


def spread(text: str) -> list[str]:
    """`a/{b,c}.py` as a/b.py and a/c.py."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", text)
    if found is None:
        return [text]
    return [
        whole for part in found[1].split(",") for whole in spread(text[: found.start()] + part + text[found.end() :])
    ]


def missing_paths(page: Path) -> Iterator[str]:
    """Paths in code spans that look like files of this repository and are none."""
    for span in _SPAN.findall(prose(page.read_text(encoding="utf-8"))):
        for word in span.split():
            is_path = "/" in word.rstrip("/") and word.endswith(ENDINGS) and re.fullmatch(r"[\w./{},*-]+", word)
            if not is_path or word.startswith(("/", "~", *NOT_HERE)) or word in MADE:
                continue
            for path in spread(word):
                if not any(any(base.glob(path.rstrip("/"))) for base in (*BASES, page.parent)):
                    yield path


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every `python -m MODULE ...` in a page, from the module on."""
    for found in re.finditer(r"python3? -m ([^\n`#]+)", page.read_text(encoding="utf-8")):
        yield found[1].split()


def wrong_commands(page: Path) -> Iterator[str]:
    """Modules that cannot be run with -m, commands of paced_fast and cases of benchmarks that do not exist."""
    for module, *words in commands(page):
        path = ROOT.joinpath(*module.split("."))
        if module.split(".")[0] not in ("paced_fast", "benchmarks") or "..." in module or module.endswith(".X"):
            continue
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            yield f"python -m {module}: no such module"
        name = words[0].rstrip(".,:;)") if words else ""
        if module == "benchmarks.run" and name.islower() and name not in benchmark.CASES:
            yield f"python -m benchmarks.run {name}: no such case"
        known = ("list", "doctor", *(path.parent.name for path in (ROOT / "paced_fast").glob("*/__main__.py")))
        if module == "paced_fast" and name.islower() and name not in known:
            yield f"python -m paced_fast {name}: no such command"


def wrong_options(page: Path) -> Iterator[str]:
    """Options with a dot in their name that are no settings."""
    known = {"--" + name.replace("_", "-") for name in flatten(Config())}
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*\.[a-z\d.*-]+", page.read_text(encoding="utf-8")):
        option = option.rstrip(".-")
        pattern = re.escape(option.replace(".no-", ".")).replace(r"\*", "[a-z.-]+")
        if not any(re.fullmatch(pattern, name) for name in known):
            yield option


CHECKS = (broken_links, missing_paths, wrong_commands, wrong_options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    assert [found for check in CHECKS for found in check(page)] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[a](gone.md)", "gone.md: no such file"),
        ("[a](other.md#there) and [b](other.md#not-there)", "other.md#not-there: no such heading"),
        ("# Here\n\n[a](#here) [b](#nowhere)", "#nowhere: no such heading"),
        ("![a picture](picture.png)", "picture.png: no such file"),
        ("```\n[a](gone.md)\n```\n`[b](gone.md)` https://a.b/c [d](https://e.f/g)", None),
        ("`paced_fast/paced/trainer.py`, `paced/trainer.py`, `report/charts/{training,value}.py`, `runs/a/b.py`", None),
        ("`paced_fast/paced/trainers.py`", "paced_fast/paced/trainers.py"),
        ("`report/charts/{training,values}.py`", "report/charts/values.py"),
        ("`python tests/support/settings_pages.py`", "tests/support/settings_pages.py"),
        ("`python -m benchmarks.run tinyy`", "python -m benchmarks.run tinyy: no such case"),
        ("python -m paced_fast.reports runs/a", "python -m paced_fast.reports: no such module"),
        ("python -m paced_fast retrain", "python -m paced_fast retrain: no such command"),
        ("`--loss.beta`, `--guard.*`, `--warm-start.*.steps`, `--run.no-report`", None),
        ("`--loss.gamma`", "--loss.gamma"),
    ],
)
def test_each_check_sees_what_is_wrong(tmp_path: Path, text: str, told: str | None) -> None:
    (tmp_path / "other.md").write_text("# There\n")
    page = tmp_path / "page.md"
    page.write_text(text)
    assert [found for check in CHECKS for found in check(page)] == ([] if told is None else [told])


def test_headings_that_are_alike_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "# `math`, and more\n## What's [new](a.md)\n## What's new\n```\n# no heading\n```\n"
    )
    assert anchors(tmp_path / "page.md") == {"math-and-more", "whats-new", "whats-new-1"}


def test_readme_is_short_and_leads_to_every_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index] == []


def test_a_message_names_settings_as_the_command_line_does() -> None:
    """`--model.name`, which Python's own face spells without the dashes."""
    groups = {name.partition(".")[0].replace("_", "[-_]") for name in flatten(Config()) if "." in name}
    bare = re.compile(rf"(?<![-\w.\"'`])({'|'.join(groups)})\.[a-z_-]+(:| is | must | names )")
    found: list[str] = []
    for path in sorted((ROOT / "paced_fast").rglob("*.py")):
        if path.parent.name == "api":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                texts = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
                found += [f"{path.name}: {text}" for text in texts if isinstance(text, str) and bare.search(text)]
    assert found == []


def test_a_command_is_written_in_one_way() -> None:
    """`python -m paced_fast train`, not `paced_fast.train`, which does the same."""
    texts = [*PAGES, ROOT / "Makefile", *(ROOT / "examples").iterdir(), *(ROOT / "paced_fast").rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in texts
        if path.is_file() and path.name != "__main__.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"-m paced_fast\.\w", line)
    ]
    assert found == []
    assert "-m paced_fast train" in (DOCS / "settings.md").read_text(encoding="utf-8")


# The page of data and rewards


def test_every_key_and_kind_of_a_source_has_an_example_that_is_read() -> None:
    text = (DOCS / "data-and-rewards.md").read_text(encoding="utf-8")
    examples = [span for span in _SPAN.findall(text) if re.match(rf"({'|'.join(KINDS)}):.", span)]
    read = [parse_source(spec) for spec in examples]
    assert {source.kind for source in read} == set(KINDS)
    without = [key for key in KEYS if f"| `{key}=` |" not in text or not any(f"{key}=" in spec for spec in examples)]
    assert without == []


def test_every_reward_is_listed() -> None:
    text = (DOCS / "data-and-rewards.md").read_text(encoding="utf-8")
    assert [name for name in BUILT_IN if not re.search(rf"^\| .*`{name}`.* \|", text, re.MULTILINE)] == []


# The page of the method


def test_the_table_of_algorithms_is_that_of_the_settings() -> None:
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    assert rows.keys() == ALGORITHMS.keys()
    for name, traits in ALGORITHMS.items():
        _, intercept, prompts, replay = rows[name].split(" | ")
        assert replay == {"on": "yes", "off": "no"}[traits.replay], name
        assert ("memory" in intercept) == (traits.remembers and traits.intercepts[0] == "value"), name
        assert ("uniform" in prompts) == (traits.rule == "uniform"), name
    assert [rule for rule in RULES if f"`{rule}`" not in text] == []


# The page of messages


@cache
def strings() -> list[str]:
    """Every text in the package, with a mark where it is filled in."""
    found = []
    for path in sorted((ROOT / "paced_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd.\w]*", "\0", node.value))
    return found


def is_said(message: str) -> bool:
    """Whether the package has this message; `...` stands for anything. One that begins with an option is whole: its
    remedy too is that of the code, word for word."""
    if message.startswith("--"):
        whole = re.compile("\0".join(map(re.escape, message.split("..."))))
        return any(whole.fullmatch(text) for text in strings())
    parts = [part.strip() for part in message.split("...")]
    pattern, longest = re.compile(".*".join(map(re.escape, parts)), re.DOTALL), max(parts, key=len)
    return any(longest in text and pattern.search(text) for text in strings())


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| message \| cure \|\n.*?\n\n", text, re.DOTALL | re.MULTILINE)
    messages = [found[1] for table in tables for found in re.finditer(r"^\| `([^`]+)` \|", table, re.MULTILINE)]
    assert len(messages) >= 30
    assert [message for message in messages if not is_said(message)] == []
    assert not is_said("there is no such message ... at all")
    whole = next(message for message in messages if message.startswith("--run-dir"))
    assert not is_said(whole.replace("keeps both", "keeps them")), "the remedy is compared too"
    assert not is_said(whole.rpartition(",")[0]), "and no part of it is left out"


def test_every_warning_is_explained() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert [name for name in WarningName.__args__ if f"| `{name}` |" not in text] == []
