"""Report of a run as one HTML page, or a comparison of several runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from paced_fast.errors import InputError, interrupts_in_one_line
from paced_fast.report import compare, make_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of a run folder, or a comparison of several, and print its path to standard output.

    On InputError: one line of message and exit status 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m paced_fast.report",
        description="Write the report of a run (report.html and plots/ in its folder) or a comparison of several runs.",
    )
    parser.add_argument("run_dir", nargs="+", help="run folder, with metrics.jsonl in it")
    parser.add_argument("--out", help="file of the comparison; default: compare.html beside the first run folder")
    parser.add_argument("--page-only", action="store_true", help="write report.html of one run, and no plots/")
    options = parser.parse_args(arguments)
    try:
        if options.page_only and len(options.run_dir) > 1:
            raise InputError("--page-only is for one run: a comparison has no plots")
        if len(options.run_dir) > 1:
            path = compare(options.run_dir, options.out)
        elif options.out is not None:
            raise InputError("--out is for a comparison: give two or more run folders, or leave it out")
        else:
            path = make_report(options.run_dir[0], pictures=not options.page_only)
    except InputError as error:
        parser.exit(2, f"report: {error}\n")
    # A folder's name may hold bytes that are not valid text.
    sys.stdout.write(f"{path}\n".encode("utf-8", "backslashreplace").decode("utf-8"))


if __name__ == "__main__":
    with interrupts_in_one_line():
        main()
