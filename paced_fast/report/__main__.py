"""Report of a run as one HTML page, or a comparison of several runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from paced_fast.config import command
from paced_fast.errors import InputError, interrupts_in_one_line
from paced_fast.report import compare, make_report


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportArguments:
    """Write the report of a run, or a comparison of several runs."""

    run_dirs: tuple[str, ...]
    """Folder of a run, finished or still going on; of several, their curves are laid over each other."""
    out: str | None = None
    """File of the comparison. Default: compare.html beside the first run folder."""
    page_only: bool = False
    """Write report.html alone, without plots/, which has its figures as pictures."""


COMMAND = command.Command(
    name="report",
    purpose="Write the report of a run into its folder (report.html and plots/), or a comparison of several runs.",
    words={"run_dirs": "RUN_DIR ..."},
    examples={
        "paced-fast report runs/first": "writes runs/first/report.html",
        "paced-fast report runs/first runs/second": "writes runs/compare.html",
    },
    metavars={"out": "FILE"},
    synonyms=dict.fromkeys(("output", "output-file", "html", "run-dir"), "out"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of a run folder, or a comparison of several, and print its path to standard output.

    On InputError: one line of message and exit status 2.
    """
    try:
        options = command.read(COMMAND, ReportArguments, sys.argv[1:] if arguments is None else arguments)
        first, *others = options.run_dirs
        if options.page_only and others:
            raise InputError("--page-only is for one run: a comparison has no plots")
        if others:
            path = compare(options.run_dirs, options.out)
        elif options.out is not None:
            raise InputError("--out is for a comparison: give two or more run folders, or leave it out")
        else:
            path = make_report(first, pictures=not options.page_only)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    # A folder's name may hold bytes that are not valid text.
    sys.stdout.write(f"{path}\n".encode("utf-8", "backslashreplace").decode("utf-8"))


if __name__ == "__main__":
    with interrupts_in_one_line():
        main()
