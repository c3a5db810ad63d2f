"""What a command imports before it has read its arguments, in a fresh process: nothing that takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "sympy", "math_verify", "reasoning_gym", "jinja2", "vllm")

LIGHT = """
import contextlib, io, json, runpy, sys
heavy, commands = json.loads(sys.argv[1]), json.loads(sys.argv[2])
import paced_fast
found = {"import paced_fast": [name for name in (*heavy, "numpy", "tyro", "rich") if name in sys.modules]}
for module, *words in commands:
    sys.argv = [module, *words]
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    loaded = [name for name in heavy if name in sys.modules]
    found[" ".join((module, *words))] = [status or 0, loaded, len(out.getvalue()), err.getvalue()]
print(json.dumps(found))
"""

FINE = [
    ["paced_fast"],
    ["paced_fast", "--help"],
    ["paced_fast", "--version"],
    ["paced_fast", "list"],
    ["paced_fast", "list", "rewards", "algorithms"],
    ["paced_fast", "doctor", "--help"],
    ["paced_fast.train", "--help"],
    ["paced_fast.train", "smollm2", "--help-all"],
    ["paced_fast.train", "tiny", "--steps", "3", "--save-config", "saved.toml"],
    ["paced_fast.evaluate", "--help"],
    ["paced_fast.export", "--help"],
]
WRONG = [
    (["paced_fast", "trian"], "error: unknown command 'trian': did you mean train? "),
    (["paced_fast", "compare"], "error: unknown command 'compare': `report RUN RUN` compares runs; "),
    (["paced_fast.train", "tniy"], "error: unknown preset 'tniy': did you mean tiny? "),
    (["paced_fast.train", "--learning-rate", "1"], "error: unknown option --learning-rate: did you mean --optimizer."),
    (["paced_fast", "train", "--steps", "many"], "error: --steps 'many' is not a whole number"),
    (["paced_fast.train", "--algorithm", "grpo", "--replay.mode", "on"], "error: --replay.mode on needs --algorithm "),
    (["paced_fast.train", "--model", "m", "--data", "absent.jsonl"], "error: source absent.jsonl: no such file "),
    (
        ["paced_fast.train", "--model", "m", "--data", "own.jsonl?answer=gold"],
        "error: own.jsonl:1 has no field 'gold', only question, answer: name another, as in answer=FIELD",
    ),
    (
        ["paced_fast.train", "--model", "m", "--data", "own.jsonl", "--reward", "own.py:own", "--check"],
        "error: own.jsonl:1 has no field 'gold', only question, answer: the reward 'own.py:own' has the parameter ",
    ),
    (
        ["paced_fast.train", "--model", "m", "--data", "own.jsonl?reward=own.py:mine"],
        "error: reward 'own.py:mine': own.py has no function 'mine': it has own",
    ),
    (
        ["paced_fast.train", "--model", "m", "--data", "own.jsonl", "--reward", "maht"],
        "error: unknown reward 'maht' (did you mean 'math'?): ",
    ),
    (
        ["paced_fast.train", "--model", "./no", "--data", "rg:gcd"],
        "error: --model ./no: no such folder: give the folder",
    ),
    (["paced_fast.train", "--config", "absent.toml"], "error: --config absent.toml cannot be read (No such file"),
    (
        ["paced_fast.train", "--resume", "runs/absent"],
        "error: --resume 'runs/absent': give a run folder, auto or never",
    ),
    (
        ["paced_fast.train", "--resume", "model"],
        "error: --resume 'model': give a run folder, auto or never (model is the folder of a model, not of a run)",
    ),
    (["paced_fast.evaluate", "x", "--samples", "0"], "error: --samples is 0: give 1 or more"),
    (["paced_fast", "list", "preset"], "error: nothing to list is called 'preset' (did you mean 'presets'?)"),
]


def fresh(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.process
def test_help_lists_and_errors_import_nothing_that_takes_seconds(tmp_path: Path) -> None:
    commands = [*FINE, *(words for words, _ in WRONG)]
    (tmp_path / "model").mkdir()
    (tmp_path / "own.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    (tmp_path / "own.py").write_text("raise SystemExit(1)\ndef own(completions, gold): ...\n")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    done = fresh(LIGHT, json.dumps(HEAVY), json.dumps(commands), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("import paced_fast") == []
    assert len(found) == len(commands)
    for words in FINE:
        status, loaded, told, complaint = found[" ".join(words)]
        assert (status, loaded, complaint) == (0, [], ""), words
        assert told, words
    for words, message in WRONG:
        status, loaded, told, complaint = found[" ".join(words)]
        assert (status, loaded, told) == (2, [], 0), (words, complaint)
        assert complaint.startswith(message), complaint
        assert complaint.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "own.jsonl", "own.py", "saved.toml"]


FIRST = """
import importlib.abc, sys

class Stop(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers"):
            sys.exit(f"asked for {name}")

sys.meta_path.insert(0, Stop())
sys.argv = sys.argv[1:]
import runpy
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["paced_fast.train", "tiny", "--seed", "4"], "tiny-paced-4, model tiny: loading PyTorch and transformers"),
        (["paced_fast", "train", "--model", "a/b", "--data", "x.csv"], "b-paced-0, model a/b: loading PyTorch and "),
        (["paced_fast.evaluate", "some/run"], "evaluation of some/run: loading PyTorch and transformers"),
        (["paced_fast.export", "some/run", "out"], "export of some/run: loading PyTorch and transformers"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_run_names_itself_before_it_imports_pytorch(words: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,answer\n1+1,2\n")
    done = fresh(FIRST, *words, folder=tmp_path)
    assert done.stderr.splitlines()[-1:] == ["asked for torch"], done.stderr
    assert expected in done.stdout
    assert done.stdout.count("\n") == 1
