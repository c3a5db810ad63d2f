"""Command line of the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from paced_fast.errors import InputError
from paced_fast.report import make_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the report of a run folder and names it on standard output; exit status 2 on InputError."""
    parser = argparse.ArgumentParser(prog="python -m paced_fast.report", description="Draw the report of a run.")
    parser.add_argument("run_dir", help="folder with metrics.jsonl")
    try:
        path = make_report(parser.parse_args(arguments).run_dir)
    except InputError as error:
        parser.exit(2, f"report: {error}\n")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
