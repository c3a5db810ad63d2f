"""Find the code that a benchmark runs and that has changed since a commit.

The code of a case is its module and all modules of this repository that it imports, directly or indirectly; that of a
compiled module are its sources in C. Changes of comments, docstrings or layout do not count.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"benchmarks": ROOT, "paced_fast": ROOT, "paced_kernels": ROOT / "kernels"}
WITHOUT_EFFECT = (
    "paced_fast/report/",
    "paced_fast/run/record/terminal.py",
    "paced_fast/run/plan/dry_run.py",
    "benchmarks/environment.py",
)
"""Code that measurements run but that does not affect their results."""


def changed_since(commit: str, module: str) -> list[str] | None:
    """Return the files of the repository that `module` runs and that differ from `commit`, sorted; None if unknown.

    Files added since `commit` count, as do uncommitted changes.
    """
    if subprocess.run(
        ["git", "-C", str(ROOT), "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True
    ).returncode:
        return None
    names = (path.relative_to(ROOT).as_posix() for path in files_of(module))
    return sorted(
        name
        for name in names
        if not name.startswith(WITHOUT_EFFECT)
        and _meaning(name, _then(commit, name)) != _meaning(name, (ROOT / name).read_text())
    )


def meanings(module: str) -> Iterator[tuple[str, str]]:
    """Yield name and meaning of each file that `module` runs and that affects its results, in the order of names.

    The meaning changes with the code, but not with comments, docstrings or layout.
    """
    for path in sorted(files_of(module)):
        name = next(path.relative_to(base).as_posix() for base in PACKAGES.values() if path.is_relative_to(base))
        if not name.startswith(WITHOUT_EFFECT):
            yield name, _meaning(name, path.read_text())


def files_of(module: str) -> set[Path]:
    """Return the files of a module of this repository and of all modules it imports, also inside functions."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        for path in _paths(waiting.pop()):
            if path not in found:
                found.add(path)
                waiting += _imports(path) if path.suffix == ".py" else ()
    return found


def _paths(module: str) -> list[Path]:
    """Return the file of a module of this repository, or the sources `name_code/*` of a compiled module `_name`; none
    for other modules and for names inside modules."""
    top, *_ = module.split(".")
    if top not in PACKAGES:
        return []
    base = PACKAGES[top].joinpath(*module.split("."))
    file = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
    compiled = base.with_name(f"{base.name.removeprefix('_')}_code")
    return [file] if file is not None else sorted(compiled.glob("*.[ch]"))


def _imports(path: Path) -> Iterator[str]:
    """Yield names that may be modules: `a.b` and `a.b.c` for `from a.b import c`, also where `a` is told by dots."""
    base = max((base for base in PACKAGES.values() if path.is_relative_to(base)), key=lambda base: len(base.parts))
    home = path.relative_to(base).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = home[: len(home) + 1 - node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _then(commit: str, name: str) -> str:
    """Return the text of a file at a commit; empty if it did not exist."""
    words = ["git", "-C", str(ROOT), "show", f"{commit}:{name}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def _meaning(name: str, source: str) -> str:
    """Return the syntax tree without docstrings and strings under fields; of C, the words without comments."""
    if not name.endswith(".py"):
        return " ".join(re.sub(r"/\*.*?\*/", " ", source, flags=re.DOTALL).split())
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [item for item in body if not _is_text(item)]  # pyright: ignore[reportAttributeAccessIssue]
    return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
