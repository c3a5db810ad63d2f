"""TRL's colocated mode with a real engine: `PacedTrainer` samples by it, and weighs by what it returns."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from vllm_sides import child_environment

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(util.find_spec("trl") is None, reason="needs trl beside vLLM: pip install trl")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {
                "vllm_importance_sampling_mode": "sequence_truncate",
                "vllm_importance_sampling_clip_max": 1.001,
                "steps_per_generation": 2,
                "per_device_train_batch_size": 4,
                "max_steps": 6,
            },
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["defaults", "truncated"],
)
@pytest.mark.slow
def test_three_generations_of_a_colocated_engine(tmp_path: Path, changes: dict[str, Any]) -> None:
    # In a process of its own, because TRL sets the variables of a launcher and its engine takes the process group.
    # Every micro-batch is compared there with the formula, gradients included.
    import tiny_trl
    import trl_checked

    trl_checked.wide_model().save_pretrained(tmp_path)
    tiny_trl.tokenizer().save_pretrained(tmp_path)
    environment = child_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "trl_checked.py"), str(tmp_path), json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["packed"] == []
    assert found["batches"] == 3
    assert found["moved"] > 9e-3
    ratios = found["ratios"]
    assert len(ratios) == 24
    # The engine computes in bfloat16: near the trainer, which it would not be with the weights of an earlier step.
    assert any(abs(r - 1) > 1e-4 for r in ratios)
    assert all(0.9 < r < 1.1 for r in ratios), ratios
    if changes:
        assert max(ratios) == changes["vllm_importance_sampling_clip_max"]
    logs = [entry for entry in found["log"] if "loss" in entry]
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in logs if "reward" in entry) < 0.1
