"""Run one benchmark.

    python -m benchmarks.run CASE [--json FILE] [options of the case]

Prints the table, writes the whole result to FILE (default benchmarks/results/CASE.json), and prints its path as the
last line. The case sample_efficiency keeps its runs in the folder of FILE.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

from benchmarks import environment, options
from paced_fast.errors import InputError

# Each case: its module, which has `Arguments` and `measure`, and the first arguments of `measure`. A module is imported
# only when its case runs, because the kernel cases must run where the trainer's packages are not installed.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "trajectory_balance": ("loss.measure", ("trajectory_balance",)),
    "logprobs": ("loss.measure", ("logprobs",)),
    "peaked": ("loss.peaked", ()),
    "priority_tree": ("tree.measure", ()),
    "compile": ("loss.compile_kernels", ()),
    "cycle_model": ("loss.cycle_model", ()),
    "gemm_sweep": ("loss.gemm_sweep", ()),
    "phases": ("loss.phases", ()),
    "precompile": ("loss.precompile", ()),
    "model_types": ("models.model_types", ()),
    "gpu_visit": ("gpu_visit", ()),
    "visit_machine": ("visit.machine", ()),
    "visit_smoke": ("visit.smoke", ()),
    "visit_counters": ("visit.counters", ()),
    "integrations": ("training.integrations", ()),
    "sample_efficiency": ("training.sample_efficiency", ()),
    "step": ("training.share_of_phases", ()),
    "trainer": ("training.phase_beside_trl", ()),
    "end_to_end": ("training.whole_steps", ()),
    "sampling": ("training.sampling", ()),
    "weight_sync": ("training.weight_sync", ()),
    "math_rewards": ("rewards.math_rewards", ()),
    "sandbox": ("rewards.sandbox", ()),
    "faults": ("faults.measure", ()),
    "faults_processes": ("faults.processes", ()),
    "train_tiny": ("training.train_run", ("tiny",)),
    "train_smollm2": ("training.train_run", ("smollm2",)),
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exit status 2 for an unknown case or option."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words.pop(0) if words else ""
    if name in ("-h", "--help", ""):
        print(f"{__doc__}\nCases: {', '.join(CASES)}. `CASE --help` lists the options of a case.")
        return
    if name not in CASES:
        near = difflib.get_close_matches(name, CASES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        sys.stderr.write(f"error: unknown benchmark {name!r}: {hint}the cases are {', '.join(CASES)}\n")
        raise SystemExit(2)
    if importlib.util.find_spec("paced_kernels") is None:  # a checkout that was not installed
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
    module_name, first = CASES[name]
    module: Any = importlib.import_module(f"benchmarks.{module_name}")
    path = None
    if "--json" in words:
        at = words.index("--json")
        path = Path(words[at + 1])
        del words[at : at + 2]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parsed = options.parse(module.Arguments, words, f"python -m benchmarks.run {name}")
    try:
        path = path or _default_path(name, module, parsed)
        path.parent.mkdir(parents=True, exist_ok=True)
        result = functools.partial(module.measure, *first)(parsed, path)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    environment.write_json(path, environment.headed(name, result))
    print(path)


def _default_path(name: str, module: Any, parsed: Any) -> Path:
    """Path of the result: where the case says, or in the folder of results."""
    if hasattr(module, "default_path"):
        return module.default_path(parsed)
    return Path(__file__).parent / "results" / f"{name}.json"


if __name__ == "__main__":
    main()
