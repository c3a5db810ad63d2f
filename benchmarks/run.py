"""Run one benchmark.

    python -m benchmarks.run CASE [--json FILE] [options of the case]

The table goes to the terminal, the whole result to FILE (default benchmarks/results/CASE.json), and its path is the
last line of the output.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from benchmarks import environment, sample_efficiency, train_run
from paced_fast.errors import InputError
from paced_fast.metrics import configure_logging, write_json_atomic

# Each case: its options, and the function that measures and returns a result.
CASES: dict[str, tuple[Any, Callable[[Any, Path], dict[str, Any]]]] = {
    "sample_efficiency": (sample_efficiency.Arguments, sample_efficiency.measure),
    "train_tiny": (train_run.Arguments, functools.partial(train_run.measure, "tiny")),
    "train_smollm2": (train_run.Arguments, functools.partial(train_run.measure, "smollm2")),
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exit status 2 for an unknown case or option."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words.pop(0) if words else ""
    if name in ("-h", "--help", ""):
        print(f"{__doc__}\nCases: {', '.join(CASES)}; `CASE --help` lists the options of one.")
        return
    if name not in CASES:
        near = difflib.get_close_matches(name, CASES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        sys.stderr.write(f"error: unknown benchmark {name!r}: {hint}the cases are {', '.join(CASES)}\n")
        raise SystemExit(2)
    options, measure = CASES[name]
    path = Path(__file__).parent / "results" / f"{name}.json"
    if "--json" in words:
        at = words.index("--json")
        path = Path(words[at + 1])
        del words[at : at + 2]
    configure_logging()
    parsed = tyro.cli(options, args=words, prog=f"python -m benchmarks.run {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(parsed, path)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    write_json_atomic(path, {"case": name, "environment": environment.describe(), **result})
    print(path)


if __name__ == "__main__":
    main()
