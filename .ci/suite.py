"""What `make check`, `make test` and `make test-all` run: every step whatever the others found, then a list of it all.

    python .ci/suite.py check|test|test-all [OPTION OF PYTEST ...]

Steps of one round run beside each other, rounds one after the other. Ends with the line in which each pytest summed up
what it ran, with every test and step that failed, and with a status that is not 0 if there is one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIERS = ("check", "test", "test-all")
GIB_A_WORKER = 3
"""The largest tests hold about two."""
LINT = ["ruff check .", "ruff format --check .", "lint-imports --no-cache", "pyright --pythonpath .venv/bin/python"]


@dataclass
class Step:
    """One command, its environment's folder first, and what came of it."""

    name: str
    words: list[str]
    lines: list[str] = field(default_factory=list)
    status: int = -1
    seconds: float = 0.0

    def run(self, *, is_shown: bool) -> None:
        """Start it, keep its lines, and show them as they come or all at the end."""
        began = time.monotonic()
        if is_shown:
            show(self.heading())
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would each compile what they import
        try:
            process = subprocess.Popen(
                self.words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace",
            )  # fmt: skip
        except OSError as error:
            self.lines, self.status = [f"{self.words[0]}: {error.strerror}"], 127
            show(*self.lines)
            return
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line.rstrip("\n"))
            if is_shown:
                show(self.lines[-1])
        self.status = process.wait()
        self.seconds = time.monotonic() - began
        if not is_shown:
            show(self.heading(), *self.lines)

    def heading(self) -> str:
        """What stands above its output."""
        return f"\n>>> {self.name}: {' '.join(self.words)}"

    def summary(self) -> str:
        """How it ended, and under it the line with which a pytest closed."""
        closing = [line for line in self.lines if re.match(r"=* ?(\d+|no) [a-z]+.* in \d[\d.]*s", line)]
        state = "ok" if self.status == 0 else f"FAILED ({self.status})"
        return "\n".join([f"{self.name}: {state} after {self.seconds:.0f} s", *closing[-1:]])

    def failures(self) -> list[str]:
        """The tests that failed, or the step itself where no test says why."""
        if self.status == 0:
            return []
        start = max(
            (i for i, line in enumerate(self.lines) if "short test summary info" in line), default=len(self.lines)
        )
        named = [line for line in self.lines[start:] if line.startswith(("FAILED ", "ERROR "))]
        named = [re.sub(r"@\w+(?= |$)", "", line, count=1) for line in named]  # the group that xdist adds to a name
        return [f"{self.name}: {line}" for line in named] or [f"{self.name}: ended with status {self.status}"]


def show(*lines: str) -> None:
    """Write lines, all of them together."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def workers() -> str:
    """Processes of tests at once: one per core, and none without its share of the memory; JOBS overrides."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return os.environ.get("JOBS") or str(max(1, min(len(os.sched_getaffinity(0)), memory // (GIB_A_WORKER << 30))))


def alone() -> list[str]:
    """Files with tests that run beside no other: collecting all files for a few tests takes as long as those tests."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.alone" in path.read_text(encoding="utf-8")]


def rounds(tier: str, options: list[str]) -> list[list[Step]]:
    """The steps of a tier."""

    def tests(name: str, kinds: str, *where: str, folder: str = ".venv", spread_by: str = "loadfile") -> Step:
        spread = ["-n", workers(), "--dist", spread_by, "--no-loadscope-reorder"] if spread_by else []
        words = [f"{folder}/bin/python", "-m", "pytest", *where, "-rfE", "-m", kinds, *spread]
        return Step(name, [*words, "--durations", "15", *options])

    lint = [Step(line.split()[0], [f".venv/bin/{line.split()[0]}", *line.split()[1:]]) for line in LINT]
    if tier == "check":
        return [[*lint, tests("tests", "not slow and not process and not alone and not exhaustive and not faults")]]
    rest = " and (exhaustive or not exhaustive)" if tier == "test-all" else " and not exhaustive"
    found = [
        [*lint, tests("tests", f"not alone and not faults{rest}")],
        [tests("tests, one at a time", f"alone and not faults{rest}", *alone(), spread_by="")],
        [tests("engine", f"not faults{rest}", "tests/engine", folder=".venv-vllm", spread_by="loadgroup")],
    ]
    if tier == "test-all":
        counted = [".venv/bin/python", "-m", "benchmarks.run", "faults", "--json", ".cache/faults.json"]
        matrix = tests("faults", "faults", "-k", "not counted and not whole_matrix", spread_by="")
        found += [[Step("faults, counted", counted)], [matrix]]
        found += [[Step("extras", [".venv/bin/python", ".ci/resolve.py"])]]
        fast = "not slow and not exhaustive and not faults"
        found += [[tests(f"{name} versions", fast, folder=f".venv-{name}")] for name in ("newest", "oldest")]
    return found


def main(tier: str, *options: str) -> int:
    """Run the tier; 1 if anything failed."""
    plan = rounds(tier, list(options))
    for steps in plan:
        *beside, last = steps
        threads = [threading.Thread(target=step.run, kwargs={"is_shown": False}) for step in beside]
        for thread in threads:
            thread.start()
        last.run(is_shown=True)
        for thread in threads:
            thread.join()
    every = [step for steps in plan for step in steps]
    failures = [line for step in every for line in step.failures()]
    show("", f">>> make {tier}", *(step.summary() for step in every))
    show(*(failures or ["nothing failed"]))
    return 1 if failures else 0


if __name__ == "__main__":
    if not set(sys.argv[1:2]) & set(TIERS):
        sys.exit(f"suite.py: give a tier: {', '.join(TIERS)}")
    sys.exit(main(*sys.argv[1:]))
