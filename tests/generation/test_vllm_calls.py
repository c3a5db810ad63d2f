"""The reader that compares what we call of vLLM with another version's sources, on a small package of that name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import vllm_calls
from vllm_calls import Package, Use

FILES = {
    "__init__": 'from .version import __version__\nATTRIBUTES = {"Params": ".params:Params"}\n',
    "version": '__version__ = "1"\n',
    "params": (
        "class Base(Struct):\n    top: float = 1.0\n"
        "class Params(Base):\n    limit: ClassVar[int] = 3\n    seed: int\n    flat: bool = False\n"
    ),
    "base": "class Loop:\n    def __init__(self):\n        self.core = None\n    def wake(self, tags=None): ...\n",
    "engine": (
        "import typing\nfrom vllm.base import Loop\n"
        "class Engine(Loop):\n"
        "    def __init__(self, config, *, log: bool, mode: str = 'x'):\n        self.config = config\n"
        "    def clear(self, all=False) -> bool: ...\n"
        "    @staticmethod\n    def kind(config): ...\n"
        "    @property\n    def size(self): ...\n"
        "    def anything(self, *args, **kwargs): return 'kv_cache'\n"
    ),
    "platforms/__init__": "def __getattr__(name):\n    if name == 'current': return 1\n",
}
HAD = (
    Use("vllm", "__version__"),
    Use("vllm", "Params", 0, ("seed", "flat", "top")),
    Use("vllm.engine", "Engine", 1, ("log",)),
    Use("vllm.engine", "Engine.wake", 1),
    Use("vllm.engine", "Engine.core"),
    Use("vllm.engine", "Engine.config"),
    Use("vllm.engine", "Engine.size"),
    Use("vllm.engine", "Engine.kind", 1),
    Use("vllm.engine", "Engine.clear", 0, returns="bool"),
    Use("vllm.engine", "Engine.anything", 2, ("weights",)),
    Use("vllm.engine", "", text="kv_cache"),
    Use("vllm.platforms", "current"),
)


@pytest.fixture
def package(tmp_path: Path) -> Package:
    for name, text in FILES.items():
        path = tmp_path / "vllm" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Package(tmp_path)


def test_what_a_version_has_is_found_wherever_it_is_defined(package: Package) -> None:
    assert package.differences(list(HAD)) == []


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (Use("vllm.motor", "Engine"), "vllm.motor:Engine: there is no such module"),
        (Use("vllm.engine", "Motor"), "vllm.engine:Motor: there is no such name"),
        (Use("vllm.platforms", "other"), "vllm.platforms:other: there is no such name"),
        (Use("vllm.engine", "Engine.sleep", 1), "vllm.engine:Engine.sleep(...): there is no such member"),
        (Use("vllm.engine", "Engine", 1), "vllm.engine:Engine(...): missing a required argument: 'log'"),
        (Use("vllm.engine", "Engine.wake", 2), "vllm.engine:Engine.wake(..., ...): too many positional arguments"),
        (Use("vllm.engine", "Engine.kind", 2), "vllm.engine:Engine.kind(..., ...): too many positional arguments"),
        (
            Use("vllm", "Params", 0, ("seed", "limit")),
            "vllm:Params(seed=..., limit=...): got an unexpected keyword argument 'limit'",
        ),
        (Use("vllm", "Params", 0, ("flat",)), "vllm:Params(flat=...): missing a required argument: 'seed'"),
        (
            Use("vllm.engine", "Engine.wake", 0, returns="bool"),
            "vllm.engine:Engine.wake() -> bool: it returns something unsaid",
        ),
        (Use("vllm.engine", "", text="weights"), "vllm.engine:'weights': the text is gone"),
    ],
)
def test_what_differs_is_named_with_the_call(package: Package, use: Use, why: str) -> None:
    assert package.differences([*HAD, use]) == [why]


def test_calls_are_read_with_the_arguments_that_are_given() -> None:
    text = """
def start(settings):
    from vllm.engine import Engine
    from vllm.base import Loop as Base

    arguments = {"model": 1}
    if settings:
        arguments |= {"seed": 2}
    arguments["size"] = 3
    config = Engine(1, **arguments, log=True).config()

    class Ours(Base):
        def wake(self, tags): ...

    return Base.kind(config)

class Generator:
    def run(self):
        self.engine.step()
        return self.engine.core.scheduler, core.scheduler.waiting(1), cache.size
"""
    found = set(vllm_calls.read(ast.parse(text)))
    engine = ("vllm.v1.engine.llm_engine", "LLMEngine")
    assert found == {
        Use("vllm.engine", "Engine"),
        Use("vllm.base", "Loop"),
        Use("vllm.engine", "Engine", 1, ("log", "model", "seed", "size")),
        Use("vllm.engine", "Engine.config", 0),
        Use("vllm.base", "Loop.wake", 1),
        Use("vllm.base", "Loop.kind", 1),
        Use(engine[0], f"{engine[1]}.step", 0),
        Use(engine[0], f"{engine[1]}.core"),
        Use("vllm.v1.engine.core", "EngineCore.scheduler"),
        Use("vllm.v1.core.sched.interface", "SchedulerInterface.waiting", 1),
        Use("vllm.config.cache", "CacheConfig.size"),
    }


def test_our_own_calls_are_among_those_that_are_read() -> None:
    found = [(use.name, use.positional) for use in vllm_calls.uses()]
    asked = [("LLMEngine.sleep", 1), ("LLMEngine.wake_up", 1), ("LLMEngine.add_request", 3)]
    for call in (*asked, ("InprocClient.shutdown", 0), ("ParallelConfig.tensor_parallel_size", None)):
        assert call in found, call
    given = {word for use in vllm_calls.uses() if use.name == "EngineArgs" for word in use.keywords}
    assert {"max_num_seqs", "kv_cache_memory_bytes", "enable_sleep_mode", "tensor_parallel_size"} <= given
    modules = {use.module for use in vllm_calls.uses()}
    for path in vllm_calls.SOURCES:
        for node in ast.walk(ast.parse((vllm_calls.ROOT / path).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                assert node.module in modules
