"""Where a run's numbers are shown besides its own files: wandb and TensorBoard. None of them can end a run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paced_fast.errors import InputError

logger = logging.getLogger(__name__)

Sink = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]
"""How to log one step's scalars, and how to close."""

WANDB_FILE = "wandb.json"
"""In a run folder: which run at wandb it is."""

_MOST_DOUBLINGS = 7

_SINK_MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


def require_sinks(names: Sequence[str]) -> None:
    """Raises InputError when the package of a sink is not installed; imports none of them."""
    for name in names:
        if name not in _SINK_MODULES:
            raise InputError(f"unknown metrics sink {name!r}: choose from {', '.join(_SINK_MODULES)}")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"metrics sink {name!r} is not installed: pip install 'paced-fast[{name}]'")


def _module(name: str) -> Any:
    if name not in _SINK_MODULES:
        raise InputError(f"unknown metrics sink {name!r}: choose from {', '.join(_SINK_MODULES)}")
    try:
        return importlib.import_module(_SINK_MODULES[name])
    except ImportError as error:
        raise InputError(f"metrics sink {name!r} is not installed: pip install 'paced-fast[{name}]'") from error


class Logger:
    """A sink whose failures cost what it would have shown: one warning, then it is tried again ever more rarely."""

    def __init__(self, name: str, run_dir: Path, config: object) -> None:
        """The sink `name` of a run, whose settings are `config` in JSON's own types; nothing is opened yet.

        Raises InputError for an unknown sink, or naming the extra to install when its package is missing.
        """
        self._name, self._module, self._run_dir, self._config = name, _module(name), run_dir, config
        self._sink: Sink | None = None
        self._failures = self._skipping = 0

    def open(self) -> None:
        """Open the sink, if it lets itself be opened."""
        self._try(lambda: None)

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Show the scalars of a step, unless the sink failed and it is too early to try again."""
        if self._skipping:
            self._skipping -= 1
            return
        self._try(lambda: self._opened()[0](scalars, step))

    def close(self) -> None:
        """Close the sink, if it was opened."""
        if self._sink is not None:
            self._try(self._sink[1])

    def _opened(self) -> Sink:
        if self._sink is None:
            self._sink = _open_sink(self._name, self._module, self._run_dir, self._config)
        return self._sink

    def _try(self, act: Callable[[], object]) -> None:
        try:
            self._opened()
            act()
        except Exception as error:  # of a package that is not ours, and of its network
            self._skipping = 1 << min(self._failures, _MOST_DOUBLINGS)
            self._failures += 1
            if self._failures == 1:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                logger.warning(
                    "logger %s failed (%s): the run goes on without it, and tries it again now and then",
                    self._name,
                    reason,
                )
            return
        if self._failures:
            logger.warning("logger %s works again: %d attempts had failed", self._name, self._failures)
        self._failures = 0


def _open_sink(name: str, module: Any, run_dir: Path, config: object) -> Sink:
    if name == "wandb":
        known = run_dir / WANDB_FILE
        same = _known_run(known)
        run = module.init(project="paced_fast", name=run_dir.name, dir=str(run_dir), config=config, **same)
        if not same:
            _remember(known, str(getattr(run, "id", "")))
        return lambda scalars, step: run.log(scalars, step=step), run.finish
    writer = module.SummaryWriter(str(run_dir / "tensorboard"))

    def log(scalars: dict[str, float], step: int) -> None:
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _remember(path: Path, name: str) -> None:
    try:
        path.write_text(json.dumps({"id": name}) if name else "{}")
    except OSError as error:
        logger.warning("%s cannot be written (%s): when resumed, the run begins another one at wandb", path, error)


def _known_run(path: Path) -> dict[str, str]:
    """What makes wandb go on with the run that a file names; nothing where it names none."""
    try:
        return {"id": str(json.loads(path.read_text())["id"]), "resume": "allow"}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
