"""What every test gets: fixed seeds, one thread, uninitialised memory that shows, and skips where no GPU is."""

from __future__ import annotations

import gc
import logging
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.testing  # some versions start lscpu here, which a test of `make check` must not
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before any kernel module

# Files of data that are not part of the project may lie beside it.
os.environ.setdefault("PACED_FAST_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))

# Of processes that tests start, too: several tests run at once.
os.environ["OMP_NUM_THREADS"] = "1"
# The shapes here are too small to share among threads, and sums in one order repeat to the bit.
torch.set_num_threads(1)

settings.register_profile("paced", deadline=None, derandomize=True, database=None)
settings.load_profile("paced")


_LONGEST = (
    "test_benchmark_cases",
    "test_operators",
    "test_integrations_trl",
    "test_scheduler",
    "test_optimizer_ranks",
    "test_compile",
    "test_presets",
    "test_seeded_faults",
    "test_train_cpu",
    "test_tree_ranks",
    "test_examples",
    "test_faults_processes",
    "test_ranks",
    "test_distributed_head",
    "test_integrations_trl_sharded",
    "test_trainer_benchmark",
    "test_replay",
    "test_triton_tree",
    "test_triton_rows",
    "test_math_rewards",
    "test_faults_checkpoint",
    "test_sandbox",
    "test_time_limit",
    "test_reasoning_gym",
    "test_cli",
    "test_gpu_visit",
    "test_visit_rehearsal",
    "test_vllm_train",
)
"""Modules of tests that take long, the longest first; each of the others takes seconds."""

_SAMPLED = (
    "test_triton_rows",
    "test_scheduler",
    "test_operators",
    "test_kernel_edges",
    "test_tree_ranks",
    "test_kernel_memory",
    "test_triton_tree",
    "test_distributed_head",
    "test_priority_tree",
    "test_replay",
    "test_toy_convergence",
    "test_tree_benchmark",
    "test_train_cpu",
    "test_checkpoint",
    "test_stored_runs",
    "test_model_types",
    "test_model_types_runs",
    "test_saving",
    "test_pushed_names",
    "test_integrations_trl",
    "test_integrations_trl_data",
    "test_integrations_trl_features",
    "test_integrations_trl_images",
    "test_integrations_trl_models",
    "test_integrations_trl_vllm",
    "test_report",
    "test_reasoning_gym",
    "test_dry_run",
    "test_evaluate",
    "test_text_settings_of_a_run",
    "test_attention",
    "test_update",
    "test_tree_race",
    "test_estimates",
    "test_kernel_benchmarks",
    "test_generate",
    "test_reference",
    "test_integrations_trl_subclasses",
)
"""Modules of which `make check` runs the first test and every ninth: kernels in the interpreter, statistics, models,
whole runs."""


def pytest_collection() -> None:
    """Spares the modules that are imported, most of which stay, the collector's rounds through them."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Lets the collector run again."""
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run; everything below tests/gpu needs a GPU without saying so.

    Tests marked `faults` or `exhaustive` run only when asked for by that name, whatever else is selected. Files that
    take long come first: of what is left when one worker has nothing more to do, little is left.
    """
    for name in ("faults", "exhaustive"):
        if name not in config.option.markexpr:
            left_out = [item for item in items if item.get_closest_marker(name)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker(name)]
    if _is_check(config):
        place = Counter[str]()
        left_out = []
        for item in items:
            place[item.path.stem] += 1
            if item.path.stem in _SAMPLED and place[item.path.stem] % 9 != 1:
                left_out.append(item)
        config.hook.pytest_deselected(items=left_out)
        kept = set(items) - set(left_out)
        items[:] = [item for item in items if item in kept]
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))
    here = Path(__file__).parent
    for item in items:
        if here / "gpu" in item.path.parents:
            item.add_marker("gpu")
        if item.get_closest_marker("multigpu") and torch.cuda.device_count() < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _is_check(config: pytest.Config) -> bool:
    """Whether this is `make check`, which leaves out what starts processes."""
    return "not process" in config.option.markexpr


@pytest.fixture(autouse=True, scope="session")
def _no_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where tests that start processes are left out, one that does so all the same is told to say so; git may run."""
    with pytest.MonkeyPatch.context() as patch:
        if _is_check(request.config):
            for owner, name in (
                (os, "fork"),
                (os, "posix_spawn"),
                (BaseProcess, "start"),
                (subprocess.Popen, "__init__"),
            ):
                patch.setattr(owner, name, _refusing(getattr(owner, name)))
        yield


def _refusing(start: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        words = args[1] if len(args) > 1 else ""
        if "git" in (words, *words[:1]):
            return start(*args, **kwargs)
        pytest.fail("starts a process, which `make check` leaves out: mark this test `process`")

    return wrapper


@pytest.fixture(scope="session")
def _thawed_at_the_end() -> Iterator[None]:
    yield
    gc.unfreeze()  # libraries look at exit for what nothing has freed


@pytest.fixture(autouse=True, scope="module")
def _frozen_libraries(_thawed_at_the_end: None) -> None:
    """The collector passes over what was there before the module, libraries above all: a full collection of a few
    million objects takes a third of a second, and trainers ask for one at the end of every run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # libraries under test may draw from the global stream
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _package_logger() -> Iterator[None]:
    """A test that runs a whole training run sets up its log lines; the next test shall not inherit them."""
    package = logging.getLogger("paced_fast")
    before = package.handlers, package.level, package.propagate
    yield
    package.handlers, package.level, package.propagate = before


@pytest.fixture(autouse=True)
def _nan_filled_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory nobody wrote reads as NaN instead of as zeros by luck.

    torch.compile cannot trace the wrappers: a test of compiled code that allocates opts out by the marker `real_empty`.
    """
    if request.node.get_closest_marker("real_empty"):
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _nan_filled(getattr(owner, name)))


def _nan_filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and tensor.device.type != "meta":
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def denormal_numbers_as_they_are() -> Iterator[None]:
    """A run flushes denormal numbers to zero for the whole process; the next test must not inherit that."""
    yield
    torch.set_flush_denormal(False)
