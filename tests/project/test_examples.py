"""The examples run as their first lines say, and learn."""

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import tiny_policy

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.process
@pytest.mark.parametrize("loss", ["trajectory_balance", "reinforce"])
def test_the_plain_loop_learns_before_and_after_the_swap(loss: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "plain_loop.py"), "--loss", loss, "--steps", "60"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
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


@pytest.mark.process
def test_the_hugging_face_trainer_learns() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(ROOT / "examples" / "hf_trainer.py"), "--steps", "100"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    numbers = re.search(r"first ten steps ([\d.]+), of the last ten ([\d.]+)", done.stdout)
    assert numbers is not None, done.stdout
    first, last = map(float, numbers.groups())
    # Guessing gets 0.06; the same answer to every prompt gets at most 0.2.
    assert first < 0.15
    assert last > 0.5


def example(name: str) -> ModuleType:
    """The example as a module of this process: importing torch and its friends takes longer than a step."""
    spec = util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_hugging_face_trainer_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = example("hf_trainer")
    plain = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "accelerate" else plain(name, *more))
    monkeypatch.setattr(sys, "argv", ["hf_trainer.py", "--steps", "1"])
    with pytest.raises(SystemExit, match=r"needs accelerate: pip install 'accelerate>=1.1'"):
        made.main()


@pytest.fixture
def tiny_folder(tmp_path: Path) -> str:
    """A model of a few weights and a tokenizer with a chat template, as `save_pretrained` leaves them."""
    tiny_trl = pytest.importorskip("tiny_trl", reason="needs trl: pip install -e '.[trl]'")
    tokenizer = tiny_trl.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    tiny_policy.model(sharpness=2.0).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("loss", ["trajectory_balance", "grpo"])
def test_the_trl_script_trains_with_either_pair_of_classes(
    tiny_folder: str, loss: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = example("trl_grpo")
    monkeypatch.setattr(sys, "argv", ["trl_grpo.py", "--loss", loss, "--model", tiny_folder, "--steps", "2"])
    made.main()
    found = capsys.readouterr().out
    assert re.search(r"[\d.]+ s per step; mean reward of the first step [\d.]+, of the last [\d.]+", found)
    assert ("tb/residual_rms" in found) == (loss == "trajectory_balance")
