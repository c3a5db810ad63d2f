"""The examples run as their first lines say, and learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("loss", ["trajectory_balance", "reinforce"])
def test_the_plain_loop_learns_before_and_after_the_swap(loss: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "plain_loop.py"), "--loss", loss, "--steps", "60"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers = re.search(r"first ten steps ([\d.]+), of the last ten ([\d.]+)", done.stdout)
    assert numbers is not None, done.stdout
    first, last = map(float, numbers.groups())
    # Guessing gets 0.04; the same answer to every prompt gets at most 0.6.
    assert first < 0.15
    assert last > 0.4


def test_the_plain_loop_needs_torch_and_the_kernels_alone() -> None:
    text = (ROOT / "examples" / "plain_loop.py").read_text(encoding="utf-8")
    roots = {name.split(".")[0] for name in re.findall(r"^(?:from|import) (\S+)", text, flags=re.MULTILINE)}
    assert roots - sys.stdlib_module_names == {"torch", "paced_kernels"}
    before, after = (
        re.search(f"# ---- {word}.*?# ---- end of {word}", text, re.DOTALL) for word in ("BEFORE", "AFTER")
    )
    assert before is not None
    assert after is not None
    assert after.group().count("\n") - 1 <= 10, "the swap is ten lines"


def test_the_hugging_face_trainer_learns() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(ROOT / "examples" / "hf_trainer.py"), "--steps", "100"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers = re.search(r"first ten steps ([\d.]+), of the last ten ([\d.]+)", done.stdout)
    assert numbers is not None, done.stdout
    first, last = map(float, numbers.groups())
    # Guessing gets 0.06; the same answer to every prompt gets at most 0.2.
    assert first < 0.15
    assert last > 0.5
