"""Loggers that mirror a run's figures, completions and report (`sinks`). A failing logger never ends a run."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paced_fast.errors import InputError, pip_install
from paced_fast.run.record.sinks import KINDS, Row, RunInfo, Sink

logger = logging.getLogger(__name__)

_MOST_DOUBLINGS = 7

_SECONDS = 300.0  # far above what a sink needs: wandb itself waits 90 s for its server


def require_sinks(names: Sequence[str]) -> None:
    """Raises InputError when the package of a sink is not installed; imports none of them."""
    for name in names:
        _require_known(name)
        if not _is_installed(name):
            raise _not_installed(name)


def _require_known(name: str) -> None:
    if name not in KINDS:
        raise InputError(f"--run.loggers: unknown logger {name!r}: choose from {', '.join(KINDS)}")


def _is_installed(name: str) -> bool:
    """Whether there is such a package; a mere folder of that name, as wandb leaves one behind, can be imported too."""
    found = importlib.util.find_spec(name)
    return found is not None and getattr(found, "origin", "") is not None


def _not_installed(name: str) -> InputError:
    return InputError(f"--run.loggers: the package of {name!r} is not installed: {pip_install(name)}")


def _module(name: str) -> Any:
    _require_known(name)
    try:
        module = importlib.import_module(KINDS[name].module)
    except Exception as error:  # of a package that is not ours, and of versions that do not go together
        if isinstance(error, ModuleNotFoundError) and not _is_installed(name):
            raise _not_installed(name) from error
        raise InputError(
            f"--run.loggers: the package of {name!r} cannot be imported ({_line(error)}): install versions that fit "
            f"together with {pip_install(name)} --upgrade, or leave it out"
        ) from error
    if getattr(module, "__file__", "") is None:
        raise _not_installed(name)
    return module


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class _Caller:
    """Makes calls in a separate thread, one after the other, and waits for each up to a time limit."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._is_busy = False
        threading.Thread(target=self._work, name="logger", daemon=True).start()  # a hung one must not hold the exit up

    def _work(self) -> None:
        while True:
            act = self._asked.get()
            try:
                act()
                answer = None
            except Exception as error:  # handed over to whoever asked
                answer = error
            self._answers.put(answer)

    def call(self, act: Callable[[], object], seconds: float) -> None:
        """Raises what `act` raises, and TimeoutError when it or the call before it does not return."""
        if self._is_busy:
            try:
                self._answers.get_nowait()
            except queue.Empty:
                raise TimeoutError("the previous call has not returned") from None
        self._asked.put(act)
        self._is_busy = True
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"the call did not return within {seconds:g} s") from None
        self._is_busy = False
        if answer is not None:
            raise answer


class Logger:
    """A sink whose failures lose its figures only: one warning, then retries at growing intervals."""

    def __init__(self, name: str, info: RunInfo) -> None:
        """The sink `name` for a run; nothing is opened yet.

        Raises InputError for an unknown sink, or naming the extra to install when its package is missing.
        """
        self._name, self._module, self._info = name, _module(name), info
        self._caller = _Caller()
        self._sink: Sink | None = None
        self._failures = self._skipping = 0

    def open(self) -> None:
        """Open the sink, if that is possible."""
        self._try(lambda: None)

    def log(self, figures: Mapping[str, float], step: int, histograms: Mapping[str, Sequence[float]] = {}) -> None:
        """Show the figures of a step, unless the sink failed and it is too early to try again."""
        if self._skipping:
            self._skipping -= 1
            return
        self._try(lambda: self._opened().log(figures, histograms, step))

    def table(self, name: str, rows: Sequence[Row], step: int) -> None:
        """Show rows as a table, unless the sink does not work at present."""
        if rows and not self._failures:
            self._try(lambda: self._opened().table(name, rows, step))

    def artifact(self, path: Path, kind: str) -> None:
        """Keep a file with the run, unless the sink does not work at present."""
        if not self._failures:
            self._try(lambda: self._opened().artifact(path, kind))

    def close(self) -> None:
        """Close the sink, if it was opened."""
        if self._sink is not None:
            self._try(self._sink.close)

    def _opened(self) -> Sink:
        if self._sink is None:
            self._sink = KINDS[self._name].open(self._module, self._info)
        return self._sink

    def _try(self, act: Callable[[], object]) -> None:
        def opened() -> None:
            self._opened()
            act()

        try:
            self._caller.call(opened, _SECONDS)
        except Exception as error:  # of a package that is not ours, and of its network
            self._skipping = 1 << min(self._failures, _MOST_DOUBLINGS)
            self._failures += 1
            if self._failures == 1:
                told = "logger %s failed (%s): the run continues without it, and tries it again at growing intervals"
                logger.warning(told, self._name, _line(error))
            return
        if self._failures:
            logger.warning("logger %s works again after %d failed attempts", self._name, self._failures)
        self._failures = 0
