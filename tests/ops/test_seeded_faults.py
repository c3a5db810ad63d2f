"""The tests of the Triton kernels can fail: faults are seeded into a copy of the sources, and each must be noticed.

Five of them are negative controls: logits rounded to bfloat16, a column dropped, columns beyond the vocabulary counted
as exp(0), the coefficient of the neighbour, and a mean over the padded length.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kept import kept
from kernel_cases import INTERPRETED
from seeded_faults import CONTROLS, FAULTS, OTHERS, TREE, UNCHANGED, Fault, seed

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "seeded_faults.py"
FAILED, SEGMENTATION_FAULT = 1, -11


SAMPLED = (*CONTROLS, *OTHERS[::4], *TREE[::4])
"""Seeded in `make test`; the others in `make test-all`."""
MARKED = [
    fault if fault in SAMPLED else pytest.param(fault, marks=pytest.mark.exhaustive, id=fault.name) for fault in FAULTS
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Exit status of pytest on each copy: 1 = a test failed; errors of pytest itself are larger.

    Found once for the kernels and tests as they are.
    """
    here = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    names = sorted({item.callspec.params["fault"].name for item in here} or {fault.name for fault in SAMPLED})
    tests = {ROOT / "tests" / fault.test.split("::")[0] for fault in FAULTS if fault.name in names}
    sources = [Path(__file__), SCRIPT, SCRIPT.with_name("kernel_cases.py"), *sorted(tests)]
    return kept("seeded", sources, names, lambda: seeded(names, tmp_path_factory.mktemp("copies")))


def seeded(names: list[str], folder: Path) -> dict[str, int]:
    """Run the program that seeds."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *names],
        capture_output=True,
        text=True,
        check=True,
        timeout=1800,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return {name: int(status) for status, name in lines}


@pytest.mark.slow
@pytest.mark.process
@INTERPRETED[0]
def test_the_unchanged_copy_passes(outcomes: dict[str, int]) -> None:
    assert outcomes[UNCHANGED] == 0


@pytest.mark.slow
@pytest.mark.process
@INTERPRETED[0]
@pytest.mark.parametrize("fault", MARKED, ids=lambda fault: fault.name)
def test_a_fault_is_noticed(fault: Fault, outcomes: dict[str, int]) -> None:
    is_address = fault.name.startswith("32-bit")
    assert outcomes[fault.name] in ((FAILED, SEGMENTATION_FAULT) if is_address else (FAILED,))


def test_every_fault_still_has_its_place(tmp_path: Path) -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)
    assert len(CONTROLS) == 5
    for i, fault in enumerate(FAULTS):
        seed(fault, tmp_path / str(i))
