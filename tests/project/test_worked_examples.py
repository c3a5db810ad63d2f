"""The worked examples of CONTRIBUTING.md: each is as small as it says, and a run with it trains."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST = {"algorithm": 3, "schedule": 2, "generation engine": 4}
"""Files that each example may take."""
OUTSIDE = {"generation engine": 1}
"""Files named in words only: the test that says where an engine's package may be imported."""

METHOD = {"paced_fast/config/paced.py", "paced_fast/paced/losses.py", "paced_fast/paced/targets.py"}


def examples() -> dict[str, list[tuple[str, str, str]]]:
    """Edits of each example as (file, old text, new text); a file that is not there yet has the old text ''."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Worked examples\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    found: dict[str, list[tuple[str, str, str]]] = {}
    for title, body in re.findall(r"^### An? (.+?): \w+ files\n(.*?)(?=^### |\Z)", section, re.DOTALL | re.MULTILINE):
        edits = []
        for file, lines in re.findall(r"^```diff\n--- (\S+)\n(.*?)^```$", body, re.DOTALL | re.MULTILINE):
            old = "".join(line[1:] for line in lines.splitlines(keepends=True) if line[0] != "+")
            new = "".join(line[1:] for line in lines.splitlines(keepends=True) if line[0] != "-")
            edits.append((file, old, new))
        found[title] = edits
    return found


def apply(edits: list[tuple[str, str, str]], root: Path) -> None:
    """Make the edits below `root`; the old text of each must be there once."""
    for file, old, new in edits:
        path = root / file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        assert text.count(old) == 1 if old else not path.exists(), (file, old)
        path.write_text(text.replace(old, new) if old else new, encoding="utf-8")


def copied(root: Path) -> Path:
    """A copy of the package, of which the kernels are no part."""
    shutil.copytree(ROOT / "paced_fast", root / "paced_fast", ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize("name", sorted(MOST))
def test_an_example_takes_no_more_files_than_it_says(name: str, tmp_path: Path) -> None:
    edits = examples()[name]
    files = {file for file, _, _ in edits}
    assert len(files) + OUTSIDE.get(name, 0) <= MOST[name]
    apply(edits, copied(tmp_path))
    for file in files:
        compile((tmp_path / file).read_text(encoding="utf-8"), file, "exec")


def test_the_examples_are_those_and_an_algorithm_is_made_in_the_method() -> None:
    found = examples()
    assert set(found) == set(MOST)
    assert {file for file, _, _ in found["algorithm"]} == METHOD
    assert {file for file, _, _ in found["schedule"]} == {"paced_fast/config/paced.py", "paced_fast/paced/scheduler.py"}


RUNS = """
import dataclasses, sys
from pathlib import Path
import paced_fast, tiny_run, torch
from paced_fast import train
from paced_fast.config import SchedulerConfig
from paced_fast.paced.scheduler import PromptScheduler

folder = Path(sys.argv[1])
assert Path(paced_fast.__file__).is_relative_to(folder), paced_fast.__file__
rewards = tiny_run.write_rewards(folder)
changed = {
    "algorithm": {"algorithm": "reinforce"},
    "schedule": {"scheduler__rule": "rarest"},
    "generation engine": {"generator": "even"},
}
for name, changes in changed.items():
    settings = tiny_run.config(rewards, **{"steps": 2, "scheduler__warmup_steps": 0} | changes)
    train.run(dataclasses.replace(settings, run_dir=str(folder / name)), tiny_run.quiet())

scheduler = PromptScheduler(3, SchedulerConfig(rule="rarest", exploration=0.0), seed=0, device=torch.device("cpu"))
scheduler.observe(torch.zeros(9, dtype=torch.int64), torch.ones(9))
print(sum(scheduler.draw(1, 10, None, k).tolist() == [0] for k in range(2000)))
"""


@pytest.mark.process
def test_runs_train_with_what_the_examples_add(tmp_path: Path) -> None:
    root = copied(tmp_path)
    for edits in examples().values():
        apply(edits, root)
    places = (root, ROOT / "kernels", ROOT / "tests" / "support")
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    def read(name: str, file: str) -> list[dict]:
        return [json.loads(line) for line in (root / name / file).read_text().splitlines()]

    steps = {name: read(name, "metrics.jsonl")[1:] for name in MOST}
    assert all([record["step"] for record in records] == [1, 2] for records in steps.values())
    kept = {name: json.loads((root / name / "config.json").read_text()) for name in MOST}
    summary = json.loads((root / "algorithm" / "summary.json").read_text())
    assert kept["algorithm"]["algorithm"] == summary["algorithm"] == "reinforce"
    assert kept["schedule"]["scheduler"]["rule"] == "rarest"
    assert kept["generation engine"]["generator"] == "even"
    # A third of what a model that knows nothing says is right, so some group is mixed and pulls at the policy.
    assert all(record["grad_norm"] > 0 for record in steps["algorithm"])
    assert all(record["skipped_steps"] == 0 for records in steps.values() for record in records)
    # One prompt was visited nine times, two never: one draw of 21 is the first one's.
    share = 1 / 21
    assert abs(int(done.stdout) - 2000 * share) < 4.5 * math.sqrt(2000 * share * (1 - share))
    # Uniformly drawn tokens have one log-prob, which is not the trainer's.
    assert all(record["generator_mismatch_max"] > 1e-3 for record in steps["generation engine"])
