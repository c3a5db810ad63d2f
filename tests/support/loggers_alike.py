"""Stand-ins for the packages of loggers, which are optional."""

from __future__ import annotations

import types
from typing import Any


class Wandb:
    """Stands for the package: what was asked of it, and which calls fail."""

    def __init__(self, *, failing: tuple[str, ...] = ()) -> None:
        self.failing, self.asked = set(failing), list[tuple[str, Any]]()
        self.id = "run-1"
        self.__spec__ = object()  # as an installed package has one

    def _take(self, name: str, given: Any) -> None:
        self.asked.append((name, given))
        if name in self.failing:
            raise ConnectionError(f"{name}:\nno network")

    def init(self, **given: Any) -> Wandb:
        self._take("init", given)
        return self

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._take("log", step)

    def log_artifact(self, artifact: Any) -> None:
        self._take("artifact", artifact)

    def finish(self) -> None:
        self._take("finish", None)

    def Histogram(self, **given: Any) -> Any:
        return given

    def Table(self, **given: Any) -> Any:
        return given

    def Artifact(self, name: str, type: str) -> Any:
        made = types.SimpleNamespace(name=name, type=type, files=[])
        made.add_file = made.files.append
        return made

    def count(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.asked)
