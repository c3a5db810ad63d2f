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
from kernel_cases import INTERPRETED
from seeded_faults import CONTROLS, FAULTS, UNCHANGED, Fault, seed

FAILED, SEGMENTATION_FAULT = 1, -11


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Exit status of pytest on each copy: 1 = a test failed; errors of pytest itself are larger."""
    script = Path(__file__).with_name("seeded_faults.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("copies"))],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return {name: int(status) for status, name in lines}


@pytest.mark.slow
@INTERPRETED[0]
def test_the_unchanged_copy_passes(outcomes: dict[str, int]) -> None:
    assert outcomes[UNCHANGED] == 0


@pytest.mark.slow
@INTERPRETED[0]
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_noticed(fault: Fault, outcomes: dict[str, int]) -> None:
    is_address = fault.name.startswith("32-bit")
    assert outcomes[fault.name] in ((FAILED, SEGMENTATION_FAULT) if is_address else (FAILED,))


def test_every_fault_still_has_its_place(tmp_path: Path) -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)
    assert len(CONTROLS) == 5
    for i, fault in enumerate(FAULTS):
        seed(fault, tmp_path / str(i))
