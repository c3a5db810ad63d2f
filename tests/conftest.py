"""What every test gets: fixed seeds, one thread, uninitialised memory that shows, and skips where no GPU is."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before any kernel module

# The shapes here are too small to share among threads, and sums in one order repeat to the bit.
torch.set_num_threads(1)

settings.register_profile("paced", deadline=None, derandomize=True, database=None)
settings.load_profile("paced")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run; everything below tests/gpu needs a GPU without saying so.

    Tests marked `faults` run only when asked for by that name, whatever else is selected.
    """
    if "faults" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("faults")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    here = Path(__file__).parent
    for item in items:
        if here / "gpu" in item.path.parents:
            item.add_marker("gpu")
        if item.get_closest_marker("multigpu") and torch.cuda.device_count() < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
