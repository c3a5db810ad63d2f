"""A pytest plugin that appends each failure to a file at once, so that a run that is killed leaves its reasons.

python -m pytest -p benchmarks.failures_as_they_happen --failures FILE
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the file."""
    parser.addoption("--failures", default=None, help="file to append each failed test and its traceback to, at once")


@pytest.hookimpl
def pytest_configure(config: pytest.Config) -> None:
    """Watch the reports, in the process that gets those of every worker."""
    if config.getoption("--failures") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(Path(config.getoption("--failures"))))


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"FAILED {report.nodeid} ({report.when})\n{report.longreprtext[-4000:]}\n\n")
