"""No kernel is compiled in the middle of a run: Triton's launcher on 50 batches of random lengths, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED

from paced_kernels import warm_up
from paced_kernels._grid import launch
from paced_kernels._loss import triton_gemm, triton_logits, triton_rows

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Kernels compiled at the warm-up and at each step, by scenario; where kernels do not belong to the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"  # the default of a later version
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", SUPPORT)))
    command = [sys.executable, str(SUPPORT / "counted_compilations.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.process
def test_after_the_warm_up_no_length_compiles_a_kernel(compiled: dict[str, Any]) -> None:
    assert len(compiled["steps"]) == 8
    for name, (warm, *steps) in compiled["steps"].items():
        assert len(steps) == 50
        late = {f"{name}, step {i}": kernels for i, kernels in enumerate(steps) if kernels}
        assert not late
        assert len(warm) >= 7  # what would be compiled is seen at all
    # Sums, exponentials, the two behind a gate, and exponentials of a second pass are one kernel with other constants.
    assert compiled["steps"]["sm_90, TMA"][0].count("project_kernel") == 4


@pytest.mark.process
def test_every_launch_says_whether_it_fuses_whatever_the_default_is(compiled: dict[str, Any]) -> None:
    exact = {"tree_rebuild_kernel", "tree_race_kernel"}
    assert exact < set(compiled["fuses"])
    assert compiled["fuses"] == {name: [name not in exact] for name in compiled["fuses"]}


@INTERPRETED[0]
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("has_all", [False, True])
def test_a_warm_up_runs_every_kernel_of_the_row_engines_and_leaves_the_weight(
    dtype: torch.dtype, has_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = set()

    def note(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        launched.add(kernel.__name__)
        launch(kernel, grid, **arguments)

    for module in (triton_gemm, triton_logits, triton_rows):
        monkeypatch.setattr(module, "launch", note)
    weight = torch.randn(70, 24).to(dtype)
    before, bias = weight.clone(), torch.randn(70).to(dtype) if has_all else None
    warm_up(weight, bias=bias, with_weights=has_all, with_entropy=has_all, backend="triton")
    assert torch.equal(weight, before)
    stage = {"target_logits_kernel", "project_kernel", "clear_dead_rows_kernel"}
    if dtype == torch.float16:
        stage = {"row_parts_kernel", "row_probabilities_kernel"}
    entropy = {"entropy_gradient_kernel"} if has_all else set()
    assert launched == {"finish_rows_kernel", "patch_targets_kernel"} | stage | entropy


def test_a_warm_up_without_kernels_does_nothing_and_names_what_is_wrong() -> None:
    warm_up(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"head_weight must have 2 dimension\(s\)"):
        warm_up(torch.zeros(5))
    with pytest.raises(ValueError, match="bias and head_weight disagree on V: 4 vs 5"):
        warm_up(torch.zeros(5, 3), bias=torch.zeros(4))
