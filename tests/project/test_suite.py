"""The tiers of tests: every step runs whatever the others found, and the end names everything that failed."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program of the tiers, as a module."""
    found = importlib.util.spec_from_file_location("suite", ROOT / ".ci" / "suite.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "suite", module)
    found.loader.exec_module(module)
    return module


def pytest_on(folder: Path, text: str) -> list[str]:
    """A pytest of its own on one file."""
    folder.mkdir()
    (folder / "test_it.py").write_text(text)
    options = ["-rfE", "-p", "no:cacheprovider", "-c", str(folder / "none.ini"), f"--rootdir={folder}"]
    (folder / "none.ini").write_text("[pytest]\n")
    return [sys.executable, "-m", "pytest", *options, str(folder / "test_it.py")]


@pytest.mark.process
def test_a_failure_in_one_environment_lets_the_other_run_and_the_end_names_all(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = pytest_on(
        tmp_path / "a", "def test_good(): pass\ndef test_bad(): assert 0\ndef test_error(nothing): pass\n"
    )
    second = pytest_on(tmp_path / "b", "def test_other(): raise KeyError\n")
    plan = [
        [suite.Step("lint", [sys.executable, "-c", "print('E999'); raise SystemExit(3)"]), suite.Step("tests", first)],
        [suite.Step("absent", ["/no/such/program"])],
        [suite.Step("engine", second), suite.Step("fine", [sys.executable, "-c", "print('all well')"])],
    ]
    monkeypatch.setattr(suite, "rounds", lambda tier, options: plan)
    assert suite.main("test") == 1
    told = capfd.readouterr().out
    body, _, end = told.partition(">>> make test\n")
    assert "E999" in body
    assert "all well" in body
    assert "short test summary info" in body
    lines = end.splitlines()
    assert lines[0].startswith("lint: FAILED (3) after ")
    assert lines[1].startswith("tests: FAILED (1) after ")
    assert re.fullmatch(r"=+ 1 failed, 1 passed, 1 error in [\d.]+s =+", lines[2])
    assert lines[3].startswith("absent: FAILED (127)")
    assert lines[4].startswith("engine: FAILED (1) after ")
    assert re.fullmatch(r"=+ 1 failed in [\d.]+s =+", lines[5])
    assert lines[6].startswith("fine: ok after ")
    assert lines[7] == "lint: ended with status 3"
    assert [re.sub(r" \S*(?=[ab]/test_it)", " ", line.split(" - ")[0]) for line in lines[8:]] == [
        "tests: FAILED a/test_it.py::test_bad",
        "tests: ERROR a/test_it.py::test_error",
        "absent: ended with status 127",
        "engine: FAILED b/test_it.py::test_other",
    ]


@pytest.mark.process
def test_nothing_failed_is_status_0(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    step = suite.Step("tests", pytest_on(tmp_path / "a", "def test_good(): pass\n"))
    monkeypatch.setattr(suite, "rounds", lambda tier, options: [[step]])
    assert suite.main("check") == 0
    assert capfd.readouterr().out.splitlines()[-1] == "nothing failed"


def test_every_tier_has_the_steps_that_it_is_for(suite: ModuleType) -> None:
    plans = {tier: [step for steps in suite.rounds(tier, ["-x"]) for step in steps] for tier in suite.TIERS}
    assert list(plans) == ["check", "test", "test-all"]
    for plan in plans.values():
        assert [step.name for step in plan[:4]] == ["ruff", "ruff", "lint-imports", "pyright"]
        tests = [step for step in plan if "pytest" in step.words]
        assert all(step.words[-1] == "-x" for step in tests)
    assert {step.words[0] for step in plans["check"]} == {
        f".venv/bin/{name}" for name in ("ruff", "lint-imports", "pyright", "python")
    }
    for tier in ("test", "test-all"):
        assert [step.words[0] for step in plans[tier] if "tests/engine" in step.words] == [".venv-vllm/bin/python"]
    kinds = {
        tier: [step.words[step.words.index("-m", 3) + 1] for step in plan if "pytest" in step.words]
        for tier, plan in plans.items()
    }
    assert all("not exhaustive" in kind and "not process" in kind for kind in kinds["check"])
    assert all(kind.endswith("and not exhaustive") for kind in kinds["test"])
    assert sum("exhaustive or not exhaustive" in kind for kind in kinds["test-all"]) == 3


def test_workers_have_a_core_and_memory_each(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOBS", raising=False)
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 << 18}
    monkeypatch.setattr(suite.os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(suite.os, "sched_getaffinity", lambda pid: set(range(2)))
    assert suite.workers() == "2"
    monkeypatch.setattr(suite.os, "sched_getaffinity", lambda pid: set(range(64)))
    assert suite.workers() == "8"
    monkeypatch.setenv("JOBS", "5")
    assert suite.workers() == "5"
