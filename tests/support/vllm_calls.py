"""A program: whether a version of vLLM has what this package calls, read from its sources; nothing is imported.

    python tests/support/vllm_calls.py FOLDER ...

FOLDER holds the package `vllm` (site-packages, or an unpacked source distribution). What is imported from vllm, how it
is called, and what is asked of an engine is read from the two modules below; `HELD` lists what reading cannot tell.
Prints a line for each folder and each difference, and ends with the number of differences; without a folder it prints
the table.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ("paced_fast/generation/vllm_engine.py", "paced_fast/generation/vllm_generator.py")
ENGINE = ("vllm.v1.engine.llm_engine", "LLMEngine")
OWNERS = {
    "engine": ENGINE,
    "engine.engine_core": ("vllm.v1.engine.core_client", "InprocClient"),
    "engine.vllm_config": ("vllm.config.vllm", "VllmConfig"),
    "engine.vllm_config.parallel_config": ("vllm.config.parallel", "ParallelConfig"),
    "engine.vllm_config.cache_config": ("vllm.config.cache", "CacheConfig"),
    "cache": ("vllm.config.cache", "CacheConfig"),
    "core": ("vllm.v1.engine.core", "EngineCore"),
    "core.scheduler": ("vllm.v1.core.sched.interface", "SchedulerInterface"),
}
"""What these expressions are in the sources; the engine is an attribute of `self` too."""


@dataclass(frozen=True)
class Use:
    """Something of vLLM that the package uses."""

    module: str
    name: str
    """A function, a class, or `Class.member`; empty for text in the module."""
    positional: int | None = None
    """Arguments given by position; None where it is not called."""
    keywords: tuple[str, ...] = ()
    returns: str = ""
    """Annotation of what comes back, where the package relies on it."""
    text: str = ""
    """A string that the module must hold: a name that travels as text."""

    def __str__(self) -> str:
        words = ["..."] * (self.positional or 0) + [f"{word}=..." for word in self.keywords]
        call = f"({', '.join(words)})" if self.positional is not None else ""
        answer = f" -> {self.returns}" if self.returns else ""
        return f"{self.module}:{repr(self.text) if self.text else self.name}{call}{answer}".rstrip(":")


HELD = (
    # Members of objects that the engine hands out.
    Use("vllm.v1.engine.core_client", "InprocClient.engine_core"),
    Use("vllm.v1.engine.core", "EngineCore.batch_queue"),
    Use("vllm.v1.core.sched.interface", "SchedulerInterface.has_requests", 0, returns="bool"),
    Use("vllm.platforms.interface", "Platform.device_type"),
    Use("vllm.renderers.base", "BaseRenderer.render_cmpl", 1),
    Use("vllm.outputs", "RequestOutput.finished"),
    Use("vllm.outputs", "RequestOutput.request_id"),
    Use("vllm.outputs", "RequestOutput.outputs"),
    Use("vllm.outputs", "RequestOutput.prompt_logprobs"),
    Use("vllm.outputs", "CompletionOutput.token_ids"),
    Use("vllm.outputs", "CompletionOutput.logprobs"),
    Use("vllm.outputs", "CompletionOutput.finish_reason"),
    Use("vllm.logprobs", "FlatLogprobs.logprobs"),
    Use("vllm.logprobs", "FlatLogprobs.start_indices"),
    Use("vllm.logprobs", "Logprob.logprob"),
    # What an answer has to be.
    Use(ENGINE[0], "LLMEngine.reset_prefix_cache", 0, returns="bool"),
    Use(ENGINE[0], "LLMEngine.has_unfinished_requests", 0, returns="bool"),
    # Names that travel as text, or are looked for on a layer.
    Use("vllm.v1.worker.gpu_worker", "Worker.reload_weights", 0, ("weights_iterator",)),
    Use("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.reload_weights", 0, ("weights_iterator",)),
    Use("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.reload_weights", 0, ("weights_iterator",)),
    Use("vllm.v1.worker.worker_base", "WorkerBase.apply_model", 1),
    Use("vllm.v1.executor.abstract", "", text="external_launcher"),
    Use("vllm.v1.executor.abstract", "", text="weights"),
    Use("vllm.v1.executor.abstract", "", text="kv_cache"),
    Use("vllm.v1.engine.core", "", text="scheduling"),
    Use("vllm.v1.worker.gpu_worker", "", text="kv_cache"),
    Use("vllm.config.model", "", text="processed_logprobs"),
    Use("vllm.envs", "", text="VLLM_ENABLE_V1_MULTIPROCESSING"),
    Use("vllm.model_executor.layers.linear", "", text="_cpu_skip_gemm_dispatch"),
    Use("vllm.logging_utils.dump_input", ""),
    # Given where the version has it (`_quiet`).
    Use("vllm.engine.arg_utils", "EngineArgs", 0, ("logging_config",)),
)


def uses() -> list[Use]:
    """Everything that the package uses of vLLM: what its sources say, then `HELD`."""
    found = {use for path in SOURCES for use in read(ast.parse((ROOT / path).read_text()))}
    called = {(use.module, use.name) for use in found if use.positional is not None}
    return [*sorted((u for u in found if u.positional is not None or (u.module, u.name) not in called), key=str), *HELD]


def read(tree: ast.Module) -> Iterator[Use]:
    """What a module of the package imports from vllm, calls, asks of an engine, and replaces in its classes."""
    imported: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for name in node.names:
                imported[name.asname or name.name] = (node.module or "", name.name)
                yield Use(node.module or "", name.name)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    called: set[int] = set()
    for function in functions:
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            target = _target(node.func, imported)
            if target is not None:
                called.add(id(node.func))
                yield Use(*target, len(node.args), _keywords(node, function))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in called:
            target = _target(node, imported)
            if target is not None:
                yield Use(*target)
        if isinstance(node, ast.ClassDef):
            yield from _overridden(node, imported)


def _target(node: ast.expr, imported: dict[str, tuple[str, str]]) -> tuple[str, str] | None:
    """(module, name) of an imported name, of a member of one, or of a member of an engine or its parts."""
    if isinstance(node, ast.Name):
        return imported.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = ast.unparse(node.value).removeprefix("self.")
    if owner in OWNERS:
        return OWNERS[owner][0], f"{OWNERS[owner][1]}.{node.attr}"
    if owner in imported and imported[owner][1][:1].isupper():
        return imported[owner][0], f"{imported[owner][1]}.{node.attr}"
    if isinstance(node.value, ast.Call) and (made := _target(node.value.func, imported)) is not None:
        return (made[0], f"{made[1]}.{node.attr}") if made[1][:1].isupper() and "." not in made[1] else None
    return None


def _overridden(node: ast.ClassDef, imported: dict[str, tuple[str, str]]) -> Iterator[Use]:
    """Methods of a class of vLLM that a class of ours replaces, with the arguments that ours takes."""
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in imported:
            module, name = imported[base.id]
            for method in (part for part in node.body if isinstance(part, ast.FunctionDef)):
                given = method.args.args[1:]
                yield Use(module, f"{name}.{method.name}", *([] if method.args.vararg else [len(given)]))


def _keywords(call: ast.Call, function: ast.FunctionDef) -> tuple[str, ...]:
    """Names of the arguments given by name; `**table` gives the keys that the function puts into `table`."""
    found: list[str] = []
    for keyword in call.keywords:
        if keyword.arg is not None:
            found.append(keyword.arg)
        elif isinstance(keyword.value, ast.Name):
            found += _keys_of(keyword.value.id, function)
    return tuple(sorted(set(found)))


def _keys_of(table: str, function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            value = node.value  # type: ignore[union-attr]
            if isinstance(target, ast.Name) and target.id == table and isinstance(value, ast.Dict):
                yield from (key.value for key in value.keys if isinstance(key, ast.Constant))
            is_item = isinstance(target, ast.Subscript) and ast.unparse(target.value) == table
            if is_item and isinstance(target.slice, ast.Constant):
                yield target.slice.value


@dataclass(frozen=True)
class Package:
    """The sources of a version of vLLM."""

    folder: Path
    """Folder that holds `vllm`."""

    def differences(self, wanted: list[Use]) -> list[str]:
        """A line for each use that this version does not have as it is used."""
        return [f"{use}: {why}" for use in wanted if (why := self._lacks(use))]

    def _lacks(self, use: Use) -> str:
        path = self._path(use.module)
        if path is None:
            return "there is no such module"
        if use.text:
            return "" if use.text in _strings(path) else "the text is gone"
        if not use.name:
            return ""
        found = self._find(use.module, use.name.split(".")[0])
        if found is None:
            return "there is no such name"
        module, node = found
        if "." in use.name:
            assert isinstance(node, ast.ClassDef), use
            node = self._member(module, node, use.name.split(".")[1])
            if node is None:
                return "there is no such member"
        if use.positional is None:
            return ""
        return self._refuses(module, node, use)

    def _refuses(self, module: str, node: Any, use: Use) -> str:
        if isinstance(node, ast.ClassDef):
            made = self._member(module, node, "__init__")
            signature = _signature(made, True) if made is not None else inspect.Signature(self._fields(module, node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_bound = "." in use.name and not any("staticmethod" in ast.unparse(d) for d in node.decorator_list)
            signature = _signature(node, is_bound)
        else:
            return "it is no function"
        try:
            signature.bind(*[None] * (use.positional or 0), **dict.fromkeys(use.keywords))
        except TypeError as error:
            return str(error)
        answer = ast.unparse(node.returns) if isinstance(node, ast.FunctionDef) and node.returns else ""
        return f"it returns {answer or 'something unsaid'}" if use.returns and use.returns != answer else ""

    def _path(self, module: str) -> Path | None:
        path = self.folder.joinpath(*module.split("."))
        return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)

    def _find(self, module: str, name: str, depth: int = 0) -> tuple[str, Any] | None:
        """(module, definition) of a name, through imports and through tables of what is imported when asked for."""
        path = self._path(module)
        if path is None or depth > 8:
            return None
        is_package = path.name == "__init__.py"
        tree = _tree(path)
        for node in _top(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return module, node
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for given in node.names:
                    if (given.asname or given.name) == name:
                        source = _absolute(module, is_package, node)
                        return self._find(source, given.name, depth + 1) or (module, node)
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    words = (getattr(key, "value", None), getattr(value, "value", None))
                    if words[0] == name and isinstance(words[1], str) and ":" in words[1]:
                        source, _, inner = words[1].partition(":")
                        return self._find(f"{module}{source}", inner, depth + 1)
        for node in _top(tree):
            if any(isinstance(part, ast.Name) and part.id == name for part in _assigned(node)):
                return module, node
        # Made when it is asked for, by the module's own `__getattr__`.
        is_made = any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body)
        return (module, tree) if is_made and name in _strings(path) else None

    def _member(self, module: str, node: ast.ClassDef, name: str) -> Any:
        """Definition of a member: a method, a field, or what a method sets on `self`; bases come last."""
        for part in _top(node):
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and part.name == name:
                return part
            if any(isinstance(target, ast.Name) and target.id == name for target in _assigned(part)):
                return part
        for part in ast.walk(node):
            if any(ast.unparse(target) == f"self.{name}" for target in _assigned(part)):
                return part
        for base in node.bases:
            found = self._find(module, ast.unparse(base).split("[")[0])
            if found is not None and isinstance(found[1], ast.ClassDef):
                member = self._member(*found, name)
                if member is not None:
                    return member
        return None

    def _fields(self, module: str, node: ast.ClassDef) -> list[inspect.Parameter]:
        """Fields of a dataclass or a struct, as parameters by name."""
        found: dict[str, inspect.Parameter] = {}
        for base in node.bases:
            above = self._find(module, ast.unparse(base).split("[")[0])
            if above is not None and isinstance(above[1], ast.ClassDef):
                found |= {field.name: field for field in self._fields(*above)}
        for part in node.body:
            if not isinstance(part, ast.AnnAssign) or not isinstance(part.target, ast.Name):
                continue
            if "ClassVar" not in ast.unparse(part.annotation):
                default = inspect.Parameter.empty if part.value is None else None
                kind = inspect.Parameter.KEYWORD_ONLY
                found[part.target.id] = inspect.Parameter(part.target.id, kind, default=default)
        return list(found.values())


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def _strings(path: Path) -> frozenset[str]:
    """Strings and names of attributes in a module."""
    nodes = list(ast.walk(_tree(path)))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(texts | {node.attr for node in nodes if isinstance(node, ast.Attribute)})


def _top(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements of a body, those under `if` and `try` included."""
    for name in ("body", "orelse", "handlers", "finalbody"):
        for node in getattr(tree, name, []):
            yield node
            if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
                yield from _top(node)


def _assigned(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    words = module.split(".")
    kept = words[: len(words) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, is_bound: bool) -> inspect.Signature:
    arguments, kinds = node.args, inspect.Parameter
    plain = [(a.arg, kinds.POSITIONAL_ONLY) for a in arguments.posonlyargs]
    plain += [(a.arg, kinds.POSITIONAL_OR_KEYWORD) for a in arguments.args]
    without = len(plain) - len(arguments.defaults)
    found = [
        kinds(name, kind, default=kinds.empty if i < without else None)
        for i, (name, kind) in enumerate(plain)
        if i or not is_bound
    ]
    if arguments.vararg is not None:
        found.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(kinds(a.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if arguments.kwarg is not None:
        found.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


def main(*folders: str) -> int:
    """Check the folders, or print the table of uses without one."""
    wanted, total = uses(), 0
    if not folders:
        sys.stdout.write("".join(f"{use}\n" for use in wanted))
    for folder in folders:
        found = Package(Path(folder)).differences(wanted)
        total += len(found)
        sys.stdout.write(f"{folder}: {len(wanted)} uses, {len(found)} differences\n")
        sys.stdout.write("".join(f"  {line}\n" for line in found))
    return total


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
